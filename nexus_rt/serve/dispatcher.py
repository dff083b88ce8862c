"""From the queue to a result: loads the models, claims jobs, runs them, and watches the clock, the
store and the workers meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from pathlib import Path

from nexus_rt.core.errors import InputError, NexusError, shorten
from nexus_rt.serve.generate import Event, Task
from nexus_rt.serve.job import Job
from nexus_rt.serve.problems import INTERNAL_ERROR, JobFailed, Problem, WorkerLost, wrong
from nexus_rt.serve.profile import Profile
from nexus_rt.serve.records import JobRecords
from nexus_rt.serve.requests import ClipRequest
from nexus_rt.serve.runners import Runner
from nexus_rt.serve.running import RunningJob
from nexus_rt.serve.settings import Settings
from nexus_rt.serve.store import Store
from nexus_rt.serve.watchdog import Bounds, Call

log = logging.getLogger("nexus_rt.serve")
TICK = 0.25  # seconds between looks at deadlines, expiries and workers
PROBE = 2.0  # seconds between looks at the store's disk
SILENT_STORE = 30.0  # seconds without a look that ended, after which the disk counts as hung
HELD = 15.0  # seconds that a request is held while the models are being loaded
PATIENCE = (1.0, 60.0)  # seconds before a worker that would not load is tried again


class Backoff:
    """Waits that double from one failure to the next, within `PATIENCE`."""

    def __init__(self) -> None:
        self.seconds = PATIENCE[0]

    async def wait(self) -> None:
        await asyncio.sleep(self.seconds)
        self.seconds = min(2 * self.seconds, PATIENCE[1])


def log_error(message: str, error: Exception, *expected: type[Exception]) -> None:
    """Log an error, with its traceback unless it is of an expected kind."""
    log.error("%s", message, exc_info=not isinstance(error, expected))


class Dispatcher(JobRecords):
    """The jobs of one store on one runner."""

    def __init__(self, settings: Settings, store: Store, runner: Runner) -> None:
        super().__init__(settings, store, runner.capacity)
        self.runner = runner
        # what a runner has whose workers can be begun again (`runners.Restarting`)
        self._prepare = getattr(runner, "prepare", None)
        self._unable = getattr(runner, "unable", None)
        self._kill = getattr(runner, "kill", None)
        self.metrics.ready.set_function(lambda: float(self.ready))
        self.profile: Profile | None = None
        self.problem: str | None = None  # why the models are not there
        self.trouble: str | None = None  # why the store cannot be written
        self._probed = time.monotonic()  # when the store was last looked at
        self._loaded = asyncio.Event()  # the one or the other
        self.live: dict[str, RunningJob] = {}
        self.stopping = False
        self._adrift: list[Job] = []  # claimed, and their end is not written down yet
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task] = []

    async def start(self) -> None:
        """Take up what an earlier server left, then load the models beside serving."""
        await self.open()
        watches = (self._load(), self._watch_clock(), self._watch_store(), self._watch_workers())
        self._tasks = [asyncio.create_task(watch) for watch in watches]

    async def _load(self) -> None:
        backoff = Backoff()
        while not self.stopping:
            try:
                profile, warmed = await self.runner.start()
            except Exception as error:
                if self.stopping:  # what loads is stopped too
                    return
                self.problem = str(error) or type(error).__name__
                self._loaded.set()
                log_error(f"the models cannot be loaded: {self.problem}", error, NexusError)
                await backoff.wait()
                continue
            self.profile, self.problem = profile, None
            self._loaded.set()
            if warmed is not None:
                self.prices.learn(*warmed)
            log.info("ready", extra={"device": profile.device})
            for _ in range(self.capacity):
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
        if len(stuck) >= self.capacity:
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
        job = await self.add(request, planned, owner, remixed_from)
        self._wake.set()
        return job

    async def cancel(self, job: Job) -> bool:
        """End a job that has not ended, running or not; False where it had."""
        return await self.fail(job, "cancelled", "cancelled by its client.")

    async def delete(self, job: Job) -> None:
        """Forget a job and its files; a running one stops before its next step."""
        if self.trouble is not None:  # on a full disk the row can go after its files alone
            await self.remove_files(job.id)
        await self.forget(job.id)

    def stop_running(self, job_id: str) -> None:
        live = self.live.get(job_id)
        if live is not None and live.call.cancel(job_id):
            self.runner.cancel(job_id)

    def progress(self, job: Job) -> int:
        """Percent."""
        if job.status == "completed":
            return 100
        live = self.live.get(job.id)
        return live.progress if live is not None and job.status == "in_progress" else 0

    async def _work(self) -> None:
        """One slot of the runner: a job, or a batch, after another."""
        backoff = Backoff()
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
                backoff = Backoff()
            except Exception as error:
                # a worker that does not load, a store that cannot be written: neither is a job's
                if isinstance(error, NexusError):
                    self.problem = shorten(error)
                message = f"jobs cannot be run: {shorten(error)}"
                log_error(message, error, NexusError, sqlite3.Error, OSError)
                self._adrift += jobs
                await backoff.wait()

    async def _run(self, jobs: list[Job]) -> None:
        """Run jobs that were claimed together."""
        began = time.time()
        tasks, refused = [], []
        for job in jobs:
            try:
                tasks.append((job, self._task(job)))
            except Problem as problem:  # queued for other models
                refused.append((job, problem.code, problem.message))
            except (InputError, TypeError, KeyError):  # queued by another version
                refused.append((job, "invalid_value", "its request cannot be read."))
        if tasks:
            planned = tasks[0][1].planned
            bounds = Bounds.of(self.prices, planned, len(tasks), self.settings.step_timeout)
            call = Call(frozenset(job.id for job, _ in tasks), bounds)
        for job, task in tasks:  # before anything is waited for: a cancel finds them
            left = self.prices.left(task.planned)
            self.live[job.id] = RunningJob(job, task.planned, left, call)
            self.metrics.wait.observe(max(0.0, began - job.created_at))
            self.hub.publish(job.id, "started", {"id": job.id, "attempt": job.attempts})
        for job, code, why in refused:
            await self.fail(job, code, why)
        try:
            clips = await self.runner.run([t for _, t in tasks], self._emit) if tasks else []
        except WorkerLost as loss:
            await self._lost(jobs, loss, call)
        except NexusError:
            for job in jobs:
                await self.requeue(job)
            raise
        except Exception as error:
            failure = error if isinstance(error, JobFailed) else JobFailed(*INTERNAL_ERROR)
            if failure is not error:  # a fault of ours is one job's failure, not the queue's end
                log.exception("a job failed", extra={"job": jobs[0].id})
            for job in jobs:
                if self.stopping and failure.code == "cancelled":
                    await self.requeue(job)
                else:
                    await self.fail(job, failure.code, failure.message, job.attempts)
        else:
            by_id = {job.id: job for job in jobs}
            for clip in clips:
                await self.finish(by_id[clip.id], self.live[clip.id].planned, clip)
        finally:
            for job in jobs:
                self.live.pop(job.id, None)
                self.hub.forget(job.id)

    async def _lost(self, jobs: list[Job], loss: WorkerLost, call: Call) -> None:
        """The worker of running jobs went down: they wait again, or are given up."""
        self.metrics.lost.inc()
        why = str(loss) if call.hung is None else f"the worker hung: {call.hung}"
        log.error("worker lost: %s", loss, extra={"job": jobs[0].id})
        for job in jobs:
            lost = not self.stopping  # a stop may end the workers before the server
            if lost and job.losses + 1 >= self.settings.attempts:
                await self.give_up(job, job.losses + 1)
            elif await self.requeue(job, lost):
                self.hub.publish(job.id, "queued", {"id": job.id, "reason": why})

    def _task(self, job: Job) -> Task:
        """A claimed job as a worker gets it: planned as it was at the door, or, after a restart,
        now.

        Raises:
            Problem: the models cannot make it. InputError, TypeError, KeyError: another version's.
        """
        request = ClipRequest.stored(job.request)
        if job.id not in self.planned:
            self.planned[job.id] = self.known().check(request)
        return Task(job.id, request, self.planned[job.id], self._lora_files(request))

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
        """An event of a running job's worker, to its watchers."""
        live = self.live.get(event["id"])
        if live is not None and (details := live.heard(event)) is not None:
            self.hub.publish(event["id"], event["kind"], details)

    async def _watch_clock(self) -> None:
        """Deadlines, expiries, and jobs whose end could not be written down."""
        while True:
            try:
                for job in list(self._adrift):  # no attempt of theirs runs any more
                    await self.requeue(job)
                    self._adrift.remove(job)
                    self._wake.set()
                for job in await self.call(self.store.overdue, time.time()):
                    seconds = job.deadline_at - job.created_at
                    why = f"it had not ended {seconds:g} seconds after its creation."
                    await self.fail(job, "deadline_exceeded", why)
                for job in await self.call(self.store.expired, time.time()):
                    await self.delete(job)
            except Exception as error:
                log_error(f"the clock failed: {shorten(error)}", error, sqlite3.Error, OSError)
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

    async def _idle(self, seconds: float) -> None:
        """Wait until nothing runs, at most so many seconds."""
        until = time.monotonic() + seconds
        while self.live and time.monotonic() < until:
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Let what runs end within the grace, else queue it again; then free the models."""
        if self.stopping and not self._tasks:
            return
        self.stopping = True
        self.hub.close()
        await self._idle(self.settings.grace)
        for job_id in list(self.live):
            self.stop_running(job_id)
        await self._idle(max(60.0, self.settings.grace))  # within one step
        held = [live.job for live in self.live.values()]  # a step longer than our patience
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        self._tasks = []
        await self.runner.close()
        for job in held:
            await self.requeue(job)
        await self.close()
