"""What becomes of jobs: queued, queued again, completed, failed, forgotten. Every change is written
into the store first; then the job's watchers, the metrics and the log have it."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nexus_rt.core.errors import shorten
from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.serve import answers
from nexus_rt.serve.clips import FILES, write_clip
from nexus_rt.serve.events import EventBroker
from nexus_rt.serve.generate import Clip
from nexus_rt.serve.job import JOB_ID, Job, NewJob
from nexus_rt.serve.metrics import Metrics
from nexus_rt.serve.prices import Prices, step_kinds, units
from nexus_rt.serve.problems import Problem
from nexus_rt.serve.requests import ClipRequest
from nexus_rt.serve.settings import Settings
from nexus_rt.serve.store import NoRoom, QueueFull, Store

T = TypeVar("T")
log = logging.getLogger("nexus_rt.serve")
OURS = re.compile(rf"{JOB_ID}(\.part)?")
BYTES_PER_PIXEL = 0.25  # of a result's files, before any has been made
MAX_PLANNED = 1000  # waiting jobs whose plans are kept; of the others they are made again


class JobRecords:
    """The jobs of one store. capacity: calls that run at a time."""

    def __init__(self, settings: Settings, store: Store, capacity: int) -> None:
        self.settings, self.store, self.capacity = settings, store, capacity
        self.hub = EventBroker()
        self.metrics = Metrics(store.counts, store.used)
        self.prices = Prices()
        self.planned: dict[str, GenerationRequest] = {}  # of jobs that have not ended
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="nexus-rt-store")

    async def call(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """A call of the store or the disk, in the thread that is theirs."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._disk, partial(function, *arguments, **named))

    async def open(self) -> None:
        """Take up what an earlier server left."""
        self.prices = Prices(await self.call(self.store.noted, "steps"))
        await self.call(self._clean)
        for job in await self.call(self.store.recover):
            log.info("requeued", extra={"job": job.id, "losses": job.losses})
            if job.losses >= self.settings.attempts:
                await self.give_up(job, job.losses)

    async def close(self) -> None:
        """Close the store."""
        await self.call(self.store.close)
        self._disk.shutdown(wait=False)

    def _clean(self) -> None:
        """Remove the files of jobs that are not there; what is not ours stays."""
        known = self.store.ids()
        for folder in self.store.videos.iterdir():
            if OURS.fullmatch(folder.name) and folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    def folder(self, job_id: str) -> Path:
        """The folder of a completed job's files."""
        return self.store.videos / job_id

    def file(self, job: Job, variant: str) -> Path:
        """A file of a completed job."""
        return self.folder(job.id) / FILES[variant]

    async def remove_files(self, job_id: str) -> None:
        """Remove a job's files, where it has any."""
        await self.call(shutil.rmtree, self.folder(job_id), ignore_errors=True)

    def stop_running(self, job_id: str) -> None:
        """Stop a job before its next step, once; nothing where it does not run."""
        raise NotImplementedError

    async def add(
        self,
        request: ClipRequest,
        planned: GenerationRequest,
        owner: str,
        remixed_from: str | None = None,
    ) -> Job:
        """Queue a request; planned: what it generates.

        Raises:
            Problem: 429, the key's queue or the quota is full.
        """
        now, settings = time.time(), self.settings
        price = self.prices.total(planned)
        pixels = math.prod(planned.size)
        new = NewJob(
            owner=owner,
            request=request.as_row(),
            created_at=now,
            deadline_at=now + min(request.deadline or math.inf, settings.deadline),
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
            seconds = waiting / 1000 / self.capacity / settings.max_queue
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
        if len(self.planned) < MAX_PLANNED:
            self.planned[job.id] = planned
        self.metrics.submitted.inc()
        details = {"prompt": request.prompt} if settings.log_prompts else {}
        log.info("queued", extra={"job": job.id, "size": str(planned.size), **details})
        return job

    async def requeue(self, job: Job, lost: bool = False) -> bool:
        """Have a running attempt wait again; lost: its process went down. False where it is not
        current any more."""
        return await self.call(self.store.requeue, job, lost)

    async def finish(self, job: Job, planned: GenerationRequest, clip: Clip) -> None:
        """Keep a clip, unless its job was ended meanwhile."""
        try:
            size = await self.call(write_clip, self.folder(job.id), clip)
        except OSError as error:
            why = f"the result cannot be written ({shorten(error)})."
            await self.fail(job, "storage_full", why, job.attempts)
            return
        now = time.time()
        done = self.store.complete
        kept = await self.call(done, job, now, now + self.settings.keep, size, clip.perf)
        if not kept:  # cancelled, or overdue, in its last moment
            await self.remove_files(job.id)
            return
        self.planned.pop(job.id, None)
        if clip.perf["meta"]["batch"] == 1:
            self.prices.learn(planned, clip.perf)
            await self.call(self.store.note, "steps", self.prices.as_row())
        self.metrics.finished(clip.perf, dict(enumerate(step_kinds(planned))))
        milliseconds = round(clip.perf["total_duration_ms"], 1)
        await self._ended(job, "completed", "completed", ms=milliseconds)

    async def give_up(self, job: Job, losses: int) -> None:
        """End a job whose process was lost too often."""
        await self.fail(job, "worker_lost", f"its process went down or hung {losses} times.")

    async def fail(self, job: Job, code: str, message: str, attempt: int = 0) -> bool:
        """End a job, or only its attempt, without a clip; False where it had ended."""
        now = time.time()
        ended = await self.call(
            self.store.fail, job.id, now, now + self.settings.keep, code, message, attempt
        )
        self.stop_running(job.id)
        if ended:
            self.planned.pop(job.id, None)
            await self._ended(job, code, "failed", code=code)
        return ended

    async def _ended(self, job: Job, kind: str, word: str, **details: Any) -> None:
        """After an end is written down: the metrics, the log, and the last event of the job's
        watchers, the job as it ended."""
        self.metrics.ended.labels(kind).inc()
        log.info(word, extra={"job": job.id, **details})
        row = await self.call(self.store.get, job.id)
        if row is not None and row.ended:
            percent = 100 if row.status == "completed" else 0
            self.hub.publish(job.id, row.status, answers.video(row, percent))

    async def forget(self, job_id: str) -> None:
        """Forget a job in any state, and its files."""
        await self.call(self.store.delete, job_id)
        self.planned.pop(job_id, None)
        self.stop_running(job_id)
        self.hub.publish(job_id, "deleted", {"id": job_id})
        await self.remove_files(job_id)
