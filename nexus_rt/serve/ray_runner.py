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
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nexus_rt.core.checks import number
from nexus_rt.core.errors import InputError, NexusError, shorten, shown
from nexus_rt.serve.generate import Clip, Event, Loaded, ServedPipeline, Task
from nexus_rt.serve.messages import Message, answer, call_soon, result
from nexus_rt.serve.problems import JobFailed, WorkerLost
from nexus_rt.serve.runners import LOAD_TIMEOUT, in_thread
from nexus_rt.serve.worker import SIGNALS

log = logging.getLogger("nexus_rt.serve")
NAME = "nexus-rt"
UP, DOWN = 2.0, 300.0  # seconds of a longer or a shorter queue before replicas come or go
ROUTING = 5.0  # seconds that a job may wait for a replica before none counts as able


def parse_replicas(text: str) -> tuple[int, int]:
    """ "2" or "1-8": the least and the most replicas.

    Raises:
        InputError: no such numbers.
    """
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= low <= high:
        raise InputError(
            f"--replicas is {shown(text, 40)}; expected N or MIN-MAX, from 1 up.",
            param="--replicas",
        )
    return low, high


class Replica:
    """A pipeline in a replica's process; `max_ongoing_requests` is 1."""

    def __init__(
        self,
        make: Callable[[Any], Any],
        argument: Any,
        every: int,
        warmup: bool,
        place: str,
        cancels: Any,
    ) -> None:
        self.cancels = cancels
        if os.path.isdir(place):  # relative names of models mean what they mean to the server
            os.chdir(place)
        self.served = ServedPipeline(make(argument), every)
        self.loaded = self.served.loaded(warmup)

    async def describe(self) -> Loaded:
        """What the pipeline can make, and what the warm-up took."""
        return self.loaded

    async def generate(self, tasks: list[Task]) -> AsyncIterator[Message]:
        """("begun", (pid, actor)), ("event", ...) as they come, then ("clips", ...) or
        ("failed", ...)."""
        import ray

        loop, ended = asyncio.get_running_loop(), False
        messages: asyncio.Queue[Message] = asyncio.Queue()

        def put(message: Message) -> None:
            call_soon(loop, messages.put_nowait, message)

        def work() -> None:
            put(answer(self.served, tasks, lambda event: put(("event", event))))

        context = ray.get_runtime_context()
        running = loop.run_in_executor(None, work)
        hearing = asyncio.create_task(self._hear([task.id for task in tasks]))
        try:
            yield "begun", (os.getpid(), context.get_actor_name())
            while True:
                message = await messages.get()
                ended = message[0] != "event"
                yield message
                if ended:
                    return
        finally:  # the stream is cancelled: the pipeline is free again within one step
            hearing.cancel()
            for task in () if ended else tasks:
                self.served.cancel(task.id)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(running)

    async def _hear(self, ids: list[str]) -> None:
        """Cancel jobs as the server says; all of them where it is gone."""
        from ray.exceptions import RayError

        known: set[str] = set()
        while len(known) < len(ids):
            try:
                known |= await self.cancels.wait.remote(ids, known)
            except RayError:
                known = set(ids)
            for job_id in known:
                self.served.cancel(job_id)


class Cancels:
    """An actor: the ids of cancelled jobs, for the replicas that run them. A stream that is
    cancelled says nothing more, neither that its replica has stopped nor that it hangs."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.changed = asyncio.Condition()

    async def cancel(self, job_id: str) -> None:
        """A job is cancelled."""
        async with self.changed:
            self.ids.add(job_id)
            self.changed.notify_all()

    async def wait(self, ids: list[str], known: set[str]) -> set[str]:
        """Those of `ids` that are cancelled, once they are more than `known`."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.ids.intersection(ids) - known)
            return self.ids.intersection(ids)

    async def forget(self, ids: list[str]) -> None:
        """Jobs that have ended."""
        self.ids.difference_update(ids)


class RayRunner:
    """A Ray Serve deployment of `low` to `high` replicas, on the cluster that `RAY_ADDRESS` names
    or on this machine.

    make: called with `argument` in every replica; returns its pipeline. Importable there.
    load_timeout: seconds until a replica has loaded and warmed up.

    Raises:
        InputError: a load timeout that cannot be.
    """

    def __init__(
        self,
        make: Callable[[Any], Any],
        argument: Any,
        low: int = 1,
        high: int = 1,
        preview_every: int = 1,
        warmup: bool = True,
        load_timeout: float = LOAD_TIMEOUT,
    ) -> None:
        self.load_timeout = number("load_timeout", load_timeout, 0.1, 1e8)
        self._made_of = (make, argument, preview_every, warmup, os.getcwd())
        self.low, self.high, self.capacity = low, high, high
        self.pids: dict[str, int] = {}  # job -> process of the replica that runs it
        self._streams: dict[str, tuple[set[str], Any]] = {}
        self._actors: dict[str, str] = {}  # job -> name of its replica's actor
        self._waiting: dict[str, float] = {}  # job -> when it began to wait for a replica
        self._cancelled: set[str] = set()
        self._started = False
        self._cancels: Any = None
        # a cluster of ours ends with the thread that started it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nexus-rt-ray")

    async def start(self) -> Loaded:
        loop = asyncio.get_running_loop()
        connecting = loop.run_in_executor(self._thread, self._connect)
        handlers = python_handlers()
        while not connecting.done():
            await asyncio.wait([connecting], timeout=0.05)
            restore(handlers)
        await connecting
        try:
            return await asyncio.wait_for(in_thread(self._deploy), self.load_timeout)
        except asyncio.TimeoutError:
            raise NexusError(
                f"no replica was loaded within {self.load_timeout:g} s; give them longer"
                " (--load-timeout), or look at the disk that the models are on.",
                code="timeout",
                param="load_timeout",
            ) from None

    def _connect(self) -> None:
        """Join the cluster, or start one."""
        try:
            import ray
            from ray import serve  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--ray needs Ray Serve ({error}); pip install 'nexus-rt[serve,ray]'.",
                code="missing_package",
                param="ray",
            ) from error
        try:
            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
                self._started = True
        except Exception as error:
            raise NexusError(f"Ray does not start ({shorten(error)}).") from error
        if self._started:
            for name in ("ray", "ray.serve"):  # a line or more a replica, in a format of its own
                logging.getLogger(name).setLevel(logging.WARNING)

    def _deploy(self) -> Loaded:
        """Start the replicas; what they can make."""
        import ray
        from ray import serve

        try:
            if self._cancels is None:
                self._cancels = ray.remote(num_cpus=0, max_restarts=-1)(Cancels).remote()
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
            app = deployment.bind(*self._made_of, self._cancels)
            self.handle = serve.run(app, name=NAME, route_prefix=None)
            return self.handle.describe.remote().result()
        except NexusError:
            raise
        except Exception as error:
            raise NexusError(
                f"Ray Serve does not start the replicas ({shorten(error)})."
            ) from error

    def unable(self) -> str | None:
        if self._actors or not self._waiting:
            return None
        if time.monotonic() - min(self._waiting.values()) < ROUTING:
            return None
        return "no replica takes a job; they are being started"

    async def prepare(self) -> None:
        """Nothing: Ray starts a replica for one that went down."""

    async def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        from ray.exceptions import OutOfMemoryError, RayError

        ids = {task.id for task in tasks}
        stream: Any = self.handle.options(stream=True).generate.remote(list(tasks))
        for job_id in ids:
            self._streams[job_id] = (ids, stream)
            self._waiting[job_id] = time.monotonic()
            emit({"id": job_id, "kind": "waiting"})
        try:
            return await self._results(ids, stream, emit)
        except asyncio.TimeoutError:
            stream.cancel()
            raise NexusError(
                f"no replica took a job within {self.load_timeout:g} s; the cluster's log says"
                " why.",
                code="timeout",
                param="load_timeout",
            ) from None
        except (RayError, asyncio.CancelledError) as error:
            if ids <= self._cancelled:
                raise JobFailed("cancelled", "stopped, as asked.") from None
            if isinstance(error, asyncio.CancelledError):
                raise
            if isinstance(error, OutOfMemoryError) or "running low on memory" in str(error):
                raise JobFailed(
                    "out_of_memory",
                    "the replica was ended for want of its machine's memory; ask for a smaller"
                    " clip.",
                ) from error
            raise WorkerLost(f"the replica is gone ({shorten(error)})") from error
        finally:
            for job_id in ids:
                for known in (self._streams, self._waiting, self._actors, self.pids):
                    known.pop(job_id, None)
            if ids & self._cancelled:
                self._cancels.forget.remote(list(ids))
            self._cancelled -= ids

    async def _results(
        self, ids: set[str], stream: Any, emit: Callable[[Event], None]
    ) -> list[Clip]:
        timeout: float | None = self.load_timeout  # until a replica has the job
        while True:
            try:
                kind, value = message = await asyncio.wait_for(anext(stream), timeout)
            except StopAsyncIteration:
                raise WorkerLost("the replica ended its answer early") from None
            if kind == "begun":
                timeout = None
                pid, actor = value
                for job_id in ids:
                    self.pids[job_id], self._actors[job_id] = pid, actor
                    self._waiting.pop(job_id, None)
                    emit({"id": job_id, "kind": "begun"})
                log.info("begun", extra={"job": min(ids), "pid": pid})
                for job_id in ids & self._cancelled:
                    self._cancels.cancel.remote(job_id)
            elif (clips := result(message, emit)) is not None:
                return clips

    def cancel(self, job_id: str) -> None:
        if job_id not in self._streams or job_id in self._cancelled:
            return
        self._cancelled.add(job_id)
        ids, stream = self._streams[job_id]
        if job_id in self._actors:
            self._cancels.cancel.remote(job_id)
        elif ids <= self._cancelled:  # no replica has it yet
            stream.cancel()

    def kill(self, job_id: str) -> None:
        if (actor := self._actors.get(job_id)) is not None:
            threading.Thread(target=_kill, args=(actor,), daemon=True, name="nexus-rt-kill").start()

    async def close(self) -> None:
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        import ray
        from ray import serve

        with contextlib.suppress(Exception):  # a cluster that is gone has nothing to give back
            self.handle.shutdown()
            serve.delete(NAME)
            ray.kill(self._cancels)
        if self._started:
            with contextlib.suppress(Exception):
                serve.shutdown()
            ray.shutdown()


def _kill(actor: str) -> None:
    """End a replica; Ray Serve starts another."""
    import ray

    try:
        # Serve's own namespace, whatever the server's is
        known = ray.util.list_named_actors(all_namespaces=True)
        for row in (row for row in known if row["name"] == actor):
            ray.kill(ray.get_actor(actor, namespace=row["namespace"]))
    except Exception as error:  # it went down by itself
        log.warning("a replica cannot be ended: %s", shorten(error))


def python_handlers() -> dict[int, Any]:
    """Python's handlers of the signals that end a server; none outside the main thread, which is
    the only one that may set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.getsignal(signum) for signum in SIGNALS}


def restore(handlers: dict[int, Any]) -> None:
    """Set handlers again: Ray's core installs one of its own for SIGTERM, which aborts, below
    Python's sight."""
    for signum, handler in handlers.items():
        if handler is not None:
            signal.signal(signum, handler)
