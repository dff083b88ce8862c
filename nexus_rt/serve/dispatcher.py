"""From the queue to a result: claims jobs, runs them, and writes down how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nexus_rt.core.errors import InputError, NexusError, shorten
from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.serve import answers
from nexus_rt.serve.clips import FILES, write_clip
from nexus_rt.serve.events import EventBroker
from nexus_rt.serve.generate import Clip, Event, Task
from nexus_rt.serve.job import JOB_ID, Job, NewJob
from nexus_rt.serve.metrics import Metrics
from nexus_rt.serve.prices import Prices, step_kinds, units
from nexus_rt.serve.problems import JobFailed, Problem, WorkerLost, wrong
from nexus_rt.serve.profile import Profile
from nexus_rt.serve.requests import ClipRequest
from nexus_rt.serve.runners import Runner
from nexus_rt.serve.settings import Settings
from nexus_rt.serve.store import NoRoom, QueueFull, Store
from nexus_rt.serve.watchdog import Bounds, Call

T = TypeVar("T")
log = logging.getLogger("nexus_rt.serve")
OURS = re.compile(rf"{JOB_ID}(\.part)?")
BYTES_PER_PIXEL = 0.25  # of a result's files, before any has been made
TICK = 0.25  # seconds between looks at deadlines, expiries and workers
PROBE = 2.0  # seconds between looks at the store's disk
SILENT_STORE = 30.0  # seconds without a look that ended, after which the disk counts as hung
INTERNAL = ("waiting", "begun", "phase")  # events of a runner that are not a watcher's
HELD = 15.0  # seconds that a request is held while the models are being loaded
MAX_PLANNED = 1000  # waiting jobs whose plans are kept; of the others they are made again
PATIENCE = (1.0, 60.0)  # seconds before a worker that would not load is tried again


@dataclass
class RunningJob:
    """A running job.

    left: milliseconds that the cost model gives it after 0, 1, ... steps; None where it has no
        price. done: its steps; progress: percent. call: the runner's that it is in.
    """

    job: Job
    planned: GenerationRequest
    left: list[float] | None
    call: Call
    done: int = 0
    progress: int = 0

    @property
    def ms_left(self) -> float | None:
        return None if self.left is None else round(self.left[self.done], 1)

    def reach(self, step: int) -> None:
        """So many steps are done."""
        steps = len(self.planned.plan)
        self.done = min(step, steps)
        share = self.done / steps
        if self.left is not None and self.left[0]:
            share = 1 - self.left[self.done] / self.left[0]
        self.progress = max(self.progress, min(99, int(100 * share)))

    def state(self) -> dict[str, Any]:
        """Where it is: step, phase, percent, milliseconds left by the cost model."""
        steps = self.planned.plan.steps
        at = steps[max(0, self.done - 1)]
        return {
            "step": self.done,
            "steps": len(steps),
            "phase": at.alone or "bridge",
            "runs": at.runs,
            "progress": self.progress,
            "ms_left": self.ms_left,
        }


class Dispatcher:
    """The jobs of one store on one runner."""

    def __init__(self, settings: Settings, store: Store, runner: Runner) -> None:
        self.settings, self.store, self.runner = settings, store, runner
        # what a runner has whose workers can be begun again (`runners.Restarting`)
        self._prepare = getattr(runner, "prepare", None)
        self._unable = getattr(runner, "unable", None)
        self._kill = getattr(runner, "kill", None)
        self.hub = EventBroker()
        self.metrics = Metrics(store.counts, store.used)
        self.metrics.ready.set_function(lambda: float(self.ready))
        self.prices = Prices()
        self.profile: Profile | None = None
        self.problem: str | None = None  # why the models are not there
        self.trouble: str | None = None  # why the store cannot be written
        self._probed = time.monotonic()  # when the store was last looked at
        self._loaded = asyncio.Event()  # the one or the other
        self.live: dict[str, RunningJob] = {}
        self._planned: dict[str, GenerationRequest] = {}  # of jobs that have not ended
        self.stopping = False
        self._adrift: list[Job] = []  # claimed, and their end is not written down yet
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task] = []
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="nexus-rt-store")
        self.videos = store.videos

    async def call(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """A call of the store or the disk, in the thread that is theirs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._disk, partial(function, *arguments, **named))

    async def start(self) -> None:
        """Take up what an earlier server left, then load the models beside serving."""
        self.prices = Prices(await self.call(self.store.noted, "steps"))
        await self.call(self._clean)
        for job in await self.call(self.store.recover):
            log.info("requeued", extra={"job": job.id, "losses": job.losses})
            if job.losses >= self.settings.attempts:
                await self._give_up(job, job.losses)
        watches = (self._load(), self._watch_clock(), self._watch_store(), self._watch_workers())
        self._tasks = [asyncio.create_task(watch) for watch in watches]

    def _clean(self) -> None:
        """Remove the files of jobs that are not there; what is not ours stays."""
        known = self.store.ids()
        for folder in self.videos.iterdir():
            if OURS.fullmatch(folder.name) and folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    async def _load(self) -> None:
        delay = PATIENCE[0]
        while not self.stopping:
            try:
                profile, warmed = await self.runner.start()
            except Exception as error:
                if self.stopping:  # what loads is stopped too
                    return
                self.problem = str(error) or type(error).__name__
                self._loaded.set()
                known = isinstance(error, NexusError)
                log.error("the models cannot be loaded: %s", self.problem, exc_info=not known)
                await asyncio.sleep(delay)
                delay = min(2 * delay, PATIENCE[1])
                continue
            self.profile, self.problem = profile, None
            self._loaded.set()
            if warmed is not None:
                self.prices.learn(*warmed)
            log.info("ready", extra={"device": profile.device})
            for _ in range(self.runner.capacity):
                self._tasks.append(asyncio.create_task(self._work()))
            return

    @property
    def unready(self) -> tuple[str, str] | None:
        """Why no job can be taken and run now, as a word and a sentence; None where one can."""
        if self.stopping:
            return "stopping", "the server stops"
        if self.problem is not None:
            return "failed", "the models cannot be loaded; the server's log says why"
        if self.profile is None:
            return "loading", "the models are being loaded"
        if self.trouble is not None:
            return "failed", self.trouble
        if time.monotonic() - self._probed > SILENT_STORE:
            return "failed", "the job store does not answer"
        if (why := self._unable() if self._unable else None) is not None:
            return "restarting", why
        stuck = [call.hung for call in self.calls if call.hung is not None]
        if len(stuck) >= self.runner.capacity:
            return "hung", f"the worker hangs: {stuck[0]}"
        return None

    @property
    def ready(self) -> bool:
        return self.unready is None

    @property
    def calls(self) -> list[Call]:
        """What the runner runs."""
        return list({id(live.call): live.call for live in self.live.values()}.values())

    def known(self) -> Profile:
        """The models' profile.

        Raises:
            Problem: 503; they are not there yet.
        """
        if self.profile is None:
            why = f"cannot be loaded ({self.problem})" if self.problem else "are being loaded"
            raise Problem(503, "not_ready", f"the models {why}; try again.", retry_after=5)
        return self.profile

    async def loaded(self) -> Profile:
        """As `known`, after a while for the models to be loaded: a server that has just started
        need not be asked again."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._loaded.wait(), HELD)
        return self.known()

    async def submit(
        self, request: ClipRequest, owner: str, remixed_from: str | None = None
    ) -> Job:
        """Queue a request.

        Raises:
            Problem: 400, the models cannot make it; 429, the key's queue or the quota is full;
                503, no job can be kept.
        """
        planned = (await self.loaded()).check(request, self.settings.max_steps)
        if self.stopping:
            raise Problem(503, "stopping", "the server stops; try again later.", retry_after=10)
        if self.trouble is not None:
            raise Problem(503, "storage_failed", f"{self.trouble}; try again.", retry_after=10)
        now, settings = time.time(), self.settings
        price = self.prices.total(planned)
        pixels = math.prod(planned.size)
        new = NewJob(
            owner=owner,
            request=request.as_row(),
            created_at=now,
            deadline_at=now + min(request.deadline or math.inf, self.settings.deadline),
            batch_key=request.batch_key,
            priority=request.priority,
            cost=units(planned) if price is None else price,
            room=round(BYTES_PER_PIXEL * pixels) + 2**14,
            remixed_from=remixed_from,
        )
        try:
            job = await self.call(
                self.store.add, new, settings.max_queue, settings.quota, settings.share
            )
        except QueueFull:
            self.metrics.refused.labels("queue_full").inc()
            waiting = await self.call(self.store.waiting_cost, owner)
            seconds = waiting / 1000 / self.runner.capacity / settings.max_queue
            whose = " of this key" if settings.api_keys else ""
            raise Problem(
                429,
                "queue_full",
                f"{settings.max_queue} jobs{whose} wait already; try again later.",
                retry_after=min(60.0, max(1.0, seconds)) if price is not None else 5.0,
            ) from None
        except NoRoom:
            self.metrics.refused.labels("insufficient_quota").inc()
            at = await self.call(self.store.next_expiry, owner)
            whose = "this key's" if settings.api_keys else "the"
            raise Problem(
                429,
                "insufficient_quota",
                f"{whose} results take the whole quota of {settings.share} bytes; delete some, or"
                " wait until they expire.",
                retry_after=60.0 if at is None else max(1.0, at - now),
            ) from None
        if len(self._planned) < MAX_PLANNED:
            self._planned[job.id] = planned
        self.metrics.submitted.inc()
        details = {"prompt": request.prompt} if self.settings.log_prompts else {}
        log.info("queued", extra={"job": job.id, "size": str(planned.size), **details})
        self._wake.set()
        return job

    async def cancel(self, job: Job) -> bool:
        """End a job that has not ended, running or not; False where it had."""
        return await self._failed(job, "cancelled", "cancelled by its client.")

    async def delete(self, job: Job) -> None:
        """Forget a job and its files; a running one stops before its next step."""
        if self.trouble is not None:  # on a full disk the row can go after its files alone
            await self.call(shutil.rmtree, self.videos / job.id, ignore_errors=True)
        await self.call(self.store.delete, job.id)
        self._planned.pop(job.id, None)
        self._stop_running(job.id)
        self.hub.publish(job.id, "deleted", {"id": job.id})
        await self.call(shutil.rmtree, self.videos / job.id, ignore_errors=True)

    def _stop_running(self, job_id: str) -> None:
        """Stop a job before its next step, once; nothing where it does not run."""
        live = self.live.get(job_id)
        if live is not None and live.call.cancel(job_id):
            self.runner.cancel(job_id)

    def progress(self, job: Job) -> int:
        """Percent."""
        if job.status == "completed":
            return 100
        live = self.live.get(job.id)
        return live.progress if live is not None and job.status == "in_progress" else 0

    def file(self, job: Job, variant: str) -> Path:
        """A file of a completed job."""
        return self.videos / job.id / FILES[variant]

    async def _work(self) -> None:
        """One slot of the runner: a job, or a batch, after another."""
        delay = PATIENCE[0]
        while not self.stopping:
            jobs: list[Job] = []
            try:
                self._wake.clear()
                if self._prepare is not None:
                    await self._prepare()
                self.problem = None
                if self.trouble is not None:  # a clip could not be kept
                    await self._wake.wait()
                    continue
                jobs = await self.call(self.store.claim, time.time(), self.settings.batch)
                if not jobs:
                    await self._wake.wait()
                    continue
                self._wake.set()  # for another slot
                await self._run(jobs)
                delay = PATIENCE[0]
            except Exception as error:
                # a worker that does not load, a store that cannot be written: neither is a job's
                if isinstance(error, NexusError):
                    self.problem = shorten(error)
                expected = isinstance(error, (NexusError, sqlite3.Error, OSError))
                log.error("jobs cannot be run: %s", shorten(error), exc_info=not expected)
                self._adrift += jobs
                await asyncio.sleep(delay)
                delay = min(2 * delay, PATIENCE[1])

    async def _run(self, jobs: list[Job]) -> None:
        """Run jobs that were claimed together."""
        began = time.time()
        tasks, runs, refused = [], [], []
        for job in jobs:
            try:
                request = ClipRequest.stored(job.request)
                planned = self._plan(job.id, request)
                tasks.append(Task(job.id, request, planned, self._lora_files(request)))
                runs.append((job, planned))
            except Problem as problem:  # queued for other models
                refused.append((job, problem.code, problem.message))
            except (InputError, TypeError, KeyError):  # queued by another version
                refused.append((job, "invalid_value", "its request cannot be read."))
        if runs:
            bounds = Bounds.of(self.prices, runs[0][1], len(runs), self.settings.step_timeout)
            call = Call(frozenset(job.id for job, _ in runs), bounds)
        for job, planned in runs:  # before anything is waited for: a cancel finds them
            self.live[job.id] = RunningJob(job, planned, self.prices.left(planned), call)
            self.metrics.wait.observe(max(0.0, began - job.created_at))
            self.hub.publish(job.id, "started", {"id": job.id, "attempt": job.attempts})
        for job, code, why in refused:
            await self._failed(job, code, why)
        try:
            clips = await self.runner.run(tasks, self._emit) if tasks else []
        except JobFailed as failure:
            for job in jobs:
                if self.stopping and failure.code == "cancelled":
                    await self.call(self.store.requeue, job, lost=False)
                else:
                    await self._failed(job, failure.code, failure.message, job.attempts)
        except WorkerLost as loss:
            self.metrics.lost.inc()
            why = str(loss) if call.hung is None else f"the worker hung: {call.hung}"
            log.error("worker lost: %s", loss, extra={"job": jobs[0].id})
            for job in jobs:
                lost = not self.stopping  # a stop may end the workers before the server
                if lost and job.losses + 1 >= self.settings.attempts:
                    await self._give_up(job, job.losses + 1)
                elif await self.call(self.store.requeue, job, lost=lost):
                    self.hub.publish(job.id, "queued", {"id": job.id, "reason": why})
        except NexusError:
            for job in jobs:
                await self.call(self.store.requeue, job, lost=False)
            raise
        except Exception:  # a fault of ours is one job's failure, and no end of the queue
            log.exception("a job failed", extra={"job": jobs[0].id})
            for job in jobs:
                why = "the server failed; its log says why."
                await self._failed(job, "internal_error", why, job.attempts)
        else:
            by_id = {job.id: job for job in jobs}
            for clip in clips:
                await self._finish(by_id[clip.id], clip)
        finally:
            for job in jobs:
                self.live.pop(job.id, None)
                self.hub.forget(job.id)

    def _plan(self, job_id: str, request: ClipRequest) -> GenerationRequest:
        """What a job generates: as it was planned at the door, or, after a restart, now.

        Raises:
            Problem: the models cannot make it.
        """
        if job_id not in self._planned:
            self._planned[job_id] = self.known().check(request)
        return self._planned[job_id]

    def _lora_files(self, request: ClipRequest) -> dict[str, tuple[str, ...]]:
        """The files of a request's LoRAs, by generator.

        Raises:
            Problem: the server has no LoRAs any more.
        """
        files: dict[str, tuple[str, ...]] = {}
        folder = self.settings.lora_folder
        if request.loras and folder is None:
            raise wrong("lora", "lora names one, and this server has none; leave lora out.")
        for name in request.loras:
            generator, _, rest = name.partition(":")
            stem, _, scale = rest.rpartition("@")
            path = Path(os.path.abspath(f"{folder}/{stem}.safetensors"))
            files[generator] = (*files.get(generator, ()), f"{path}@{scale}")
        return files

    def _emit(self, event: Event) -> None:
        """What a worker says of a running job, to its watchers."""
        job_id, kind = event["id"], event["kind"]
        live = self.live.get(job_id)
        if live is None:
            return
        live.call.heard(event)
        if kind in INTERNAL:
            return
        details = {k: v for k, v in event.items() if k not in ("kind", "fresh")}
        if kind == "step":
            live.reach(event["step"])
            details |= live.state()
        self.hub.publish(job_id, kind, details)

    async def _finish(self, job: Job, clip: Clip) -> None:
        """Keep a clip, unless its job was ended meanwhile."""
        planned = self.live[job.id].planned
        try:
            size = await self.call(self._keep, job, clip)
        except OSError as error:
            await self._failed(
                job,
                "storage_full",
                f"the result cannot be written ({shorten(error)}).",
                job.attempts,
            )
            return
        now = time.time()
        done = self.store.complete
        kept = await self.call(done, job, now, now + self.settings.keep, size, clip.perf)
        if not kept:  # cancelled, or overdue, in its last moment
            await self.call(shutil.rmtree, self.videos / job.id, ignore_errors=True)
            return
        self._planned.pop(job.id, None)
        if clip.perf["meta"]["batch"] == 1:
            self.prices.learn(planned, clip.perf)
            await self.call(self.store.note, "steps", self.prices.as_row())
        self.metrics.finished(clip.perf, dict(enumerate(step_kinds(planned))))
        self.metrics.ended.labels("completed").inc()
        milliseconds = round(clip.perf["total_duration_ms"], 1)
        log.info("completed", extra={"job": job.id, "ms": milliseconds})
        await self._tell_end(job.id)

    def _keep(self, job: Job, clip: Clip) -> int:
        """Have a clip's files on disk; their bytes."""
        return write_clip(self.videos / job.id, clip)

    async def _give_up(self, job: Job, losses: int) -> None:
        await self._failed(job, "worker_lost", f"its process went down or hung {losses} times.")

    async def _failed(self, job: Job, code: str, message: str, attempt: int = 0) -> bool:
        """Write down a failure, and tell; False where the job had ended."""
        now = time.time()
        ended = await self.call(
            self.store.fail, job.id, now, now + self.settings.keep, code, message, attempt
        )
        self._stop_running(job.id)
        if ended:
            self._planned.pop(job.id, None)
            self.metrics.ended.labels(code).inc()
            log.info("failed", extra={"job": job.id, "code": code})
            await self._tell_end(job.id)
        return ended

    async def _tell_end(self, job_id: str) -> None:
        """The last that a job's watchers hear: the job as it ended."""
        job = await self.call(self.store.get, job_id)
        if job is not None and job.ended:
            self.hub.publish(job_id, job.status, answers.video(job, self.progress(job)))

    async def _watch_clock(self) -> None:
        """Deadlines, expiries, and jobs whose end could not be written down."""
        while True:
            try:
                for job in list(self._adrift):  # no attempt of theirs runs any more
                    await self.call(self.store.requeue, job, lost=False)
                    self._adrift.remove(job)
                    self._wake.set()
                for job in await self.call(self.store.overdue, time.time()):
                    seconds = job.deadline_at - job.created_at
                    why = f"it had not ended {seconds:g} seconds after its creation."
                    await self._failed(job, "deadline_exceeded", why)
                for job in await self.call(self.store.expired, time.time()):
                    await self.delete(job)
            except Exception as error:
                expected = isinstance(error, (sqlite3.Error, OSError))
                log.error("the clock failed: %s", shorten(error), exc_info=not expected)
            await asyncio.sleep(TICK)

    async def _watch_store(self) -> None:
        """Whether jobs can be kept: while they cannot, none is taken and none is begun."""
        while True:
            try:
                trouble = await self.call(self.store.trouble)
            except Exception as error:
                trouble = f"the job store cannot be looked at ({shorten(error)})"
            if trouble != self.trouble:
                log.log(
                    logging.ERROR if trouble else logging.INFO, "%s", trouble or "store is back"
                )
                self.trouble = trouble
                self._wake.set()
            self._probed = time.monotonic()
            await asyncio.sleep(PROBE)

    async def _watch_workers(self) -> None:
        """Workers that hang, and those that went down without a job. Nothing here waits for the
        disk: a slow one hides no hang."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for call in self.calls:
                if why := call.tick(now - last):
                    self._end_hung(call, why)
            last = now
            if not self.live and self.profile is not None and self._unable and self._unable():
                self._wake.set()

    def _end_hung(self, call: Call, why: str) -> None:
        """A call's worker counts as hung: have it begun again, where it can be."""
        self.metrics.hung.inc()
        job_id = min(call.ids)
        log.error("a worker hangs: %s", why, extra={"job": job_id})
        if self._kill is not None:
            self._kill(job_id)

    async def stop(self) -> None:
        """Let what runs end within the grace, else queue it again; then free the models."""
        if self.stopping and not self._tasks:
            return
        self.stopping = True
        self.hub.close()
        until = time.monotonic() + self.settings.grace
        while self.live and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for job_id in list(self.live):
            self._stop_running(job_id)
        until = time.monotonic() + max(60.0, self.settings.grace)
        while self.live and time.monotonic() < until:  # within one step
            await asyncio.sleep(0.05)
        held = [live.job for live in self.live.values()]  # a step longer than our patience
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        self._tasks = []
        await self.runner.close()
        for job in held:
            await self.call(self.store.requeue, job, lost=False)
        await self.call(self.store.close)
        self._disk.shutdown(wait=False)
