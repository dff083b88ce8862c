"""Jobs on the replicas of a Ray Serve deployment: `nexus-rt serve --ray`.

The queue, the store and the routes stay where the server is; a replica holds one pipeline, gets a
job or a batch, and streams back its events and its clips, so that no disk is shared. As many jobs
are handed out as there may be replicas, and Ray scales the replicas by them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from nexus_rt.errors import InputError, NexusError, cut
from nexus_rt.serve.generate import Clip, Event, ServedPipeline, Task
from nexus_rt.serve.problems import JobFailed, WorkerLost
from nexus_rt.serve.profile import Profile
from nexus_rt.serve.worker import WarmUp

log = logging.getLogger("nexus_rt.serve")
NAME = "nexus-rt"
UP, DOWN = 2.0, 300.0  # seconds of a longer or a shorter queue before replicas come or go


def parse_replicas(text: str) -> tuple[int, int]:
    """ "2" or "1-8": the least and the most replicas.

    Raises:
        InputError: no such numbers.
    """
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise InputError(f"--replicas is {cut(repr(text), 40)}; expected N or MIN-MAX, from 1 up.")
    return low, high


class Replica:
    """A pipeline in a replica's process; `max_ongoing_requests` is 1."""

    def __init__(
        self, make: Callable[[Any], Any], argument: Any, every: int, warmup: bool, place: str
    ) -> None:
        if os.path.isdir(place):  # relative names of models mean what they mean to the server
            os.chdir(place)
        pipe = make(argument)
        pipe.set_progress_bar_config(disable=True)
        self.served = ServedPipeline(pipe, every)
        self.warmed = self.served.warm_up() if warmup else None

    async def describe(self) -> tuple[Profile, WarmUp | None]:
        """What the pipeline can make, and what the warm-up took."""
        return self.served.profile, self.warmed

    async def generate(self, tasks: list[Task]) -> AsyncIterator[tuple[str, Any]]:
        """("begun", pid), ("event", ...) as they come, then ("clips", ...) or ("failed", ...)."""
        loop, ended = asyncio.get_running_loop(), False
        messages: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def put(message: tuple[str, Any]) -> None:
            loop.call_soon_threadsafe(messages.put_nowait, message)

        def emit(event: Event) -> None:
            put(("event", event))

        def work() -> None:
            try:
                put(("clips", self.served.run(tasks, emit)))
            except JobFailed as error:
                put(("failed", (error.code, error.message)))

        running = loop.run_in_executor(None, work)
        try:
            yield "begun", os.getpid()
            while True:
                message = await messages.get()
                ended = message[0] != "event"
                yield message
                if ended:
                    return
        finally:  # cancelled: the pipeline is free again within one step
            for task in () if ended else tasks:
                self.served.cancel(task.id)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(running)


class RayRunner:
    """A Ray Serve deployment of `low` to `high` replicas, on the cluster that `RAY_ADDRESS` names
    or on this machine.

    make: called with `argument` in every replica; returns its pipeline. Importable there.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        argument: Any,
        low: int = 1,
        high: int = 1,
        preview_every: int = 1,
        warmup: bool = True,
    ) -> None:
        self._made_of = (make, argument, preview_every, warmup, os.getcwd())
        self.low, self.high, self.capacity = low, high, high
        self.pids: dict[str, int] = {}  # job -> process of the replica that runs it
        self._streams: dict[str, tuple[set[str], Any]] = {}
        self._cancelled: set[str] = set()
        self._started = False

    async def start(self) -> tuple[Profile, WarmUp | None]:
        return await asyncio.to_thread(self._start)

    def _start(self) -> tuple[Profile, WarmUp | None]:
        try:
            import ray
            from ray import serve
        except ImportError as error:
            raise InputError(
                f"--ray needs Ray Serve ({error}); pip install 'nexus-rt[serve,ray]'."
            ) from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
            self._started = True
            for name in ("ray", "ray.serve"):  # a line or more a replica, in a format of its own
                logging.getLogger(name).setLevel(logging.WARNING)
        try:
            gpus = ray.cluster_resources().get("GPU", 0)
            options = {"num_gpus": 1} if gpus else {"num_cpus": 1}
            serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
            scaling: dict[str, Any] = {"num_replicas": self.low}
            if self.high > self.low:
                scaling = {
                    "autoscaling_config": {
                        "min_replicas": self.low,
                        "max_replicas": self.high,
                        "target_ongoing_requests": 1,
                        "metrics_interval_s": 1.0,
                        "look_back_period_s": UP,
                        "upscale_delay_s": UP,
                        "downscale_delay_s": DOWN,
                    }
                }
            deployment: Any = serve.deployment(
                Replica,
                max_ongoing_requests=1,
                max_queued_requests=-1,
                ray_actor_options=options,
                graceful_shutdown_timeout_s=30,
                **scaling,
            )
            app = deployment.bind(*self._made_of)
            self.handle = serve.run(app, name=NAME, route_prefix=None)
            return self.handle.describe.remote().result(timeout_s=600)
        except NexusError:
            raise
        except Exception as error:
            raise NexusError(f"Ray Serve does not start the replicas ({cut(error)}).") from error

    async def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        from ray.exceptions import RayError

        ids = {task.id for task in tasks}
        stream: Any = self.handle.options(stream=True).generate.remote(list(tasks))
        for job_id in ids:
            self._streams[job_id] = (ids, stream)
        try:
            async for kind, value in stream:
                if kind == "begun":
                    self.pids |= dict.fromkeys(ids, value)
                    log.info("begun", extra={"job": tasks[0].id, "pid": value})
                elif kind == "event":
                    emit(value)
                elif kind == "clips":
                    return value
                elif kind == "failed":
                    raise JobFailed(*value)
            raise WorkerLost("the replica ended its answer early")
        except JobFailed:
            raise
        except (RayError, asyncio.CancelledError) as error:
            if ids <= self._cancelled:
                raise JobFailed("cancelled", "stopped, as asked.") from None
            if isinstance(error, asyncio.CancelledError):
                raise
            raise WorkerLost(f"the replica is gone ({cut(error)})") from error
        finally:
            for job_id in ids:
                self._streams.pop(job_id, None)
                self.pids.pop(job_id, None)
            self._cancelled -= ids

    def cancel(self, job_id: str) -> None:
        if job_id not in self._streams:
            return
        self._cancelled.add(job_id)
        ids, stream = self._streams[job_id]
        if ids <= self._cancelled:
            stream.cancel()

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        import ray
        from ray import serve

        with contextlib.suppress(Exception):  # a cluster that is gone has nothing to give back
            self.handle.shutdown()
            serve.delete(NAME)
        if self._started:
            with contextlib.suppress(Exception):
                serve.shutdown()
            ray.shutdown()
