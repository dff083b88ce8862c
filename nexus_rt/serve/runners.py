"""What runs jobs: the protocol, a pipeline in a thread of this process, and one in a process of its
own (`nexus_rt.serve.worker`), which is begun again when it goes down or hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nexus_rt.core.checks import number
from nexus_rt.core.errors import NexusError
from nexus_rt.serve.generate import Clip, Event, Loaded, ServedPipeline, Task
from nexus_rt.serve.link import Link
from nexus_rt.serve.messages import call_soon, result
from nexus_rt.serve.problems import JobFailed, WorkerLost

if TYPE_CHECKING:
    from nexus_rt.pipeline.pipeline import NexusPipeline

T = TypeVar("T")
LOAD_TIMEOUT = 1800.0  # seconds of loading and warming up


class Runner(Protocol):
    """Where jobs run. capacity: calls at a time.

    A runner whose workers can be begun again also has the methods of `Restarting`. None of the
    methods blocks the event loop.
    """

    capacity: int

    async def start(self) -> Loaded:
        """Load the models; what they can make, and what the warm-up took.

        Raises:
            NexusError: they cannot be loaded.
        """
        ...

    async def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        """The clips of tasks of one batch that were not cancelled; `emit` is called in the event
        loop. An event of kind "waiting" comes while no worker has the tasks.

        Raises:
            JobFailed: the job's own failure. WorkerLost: the worker went down.
        """
        ...

    def cancel(self, job_id: str) -> None:
        """Stop a job that `run` has, or is about to be given, before its next step."""
        ...

    async def close(self) -> None:
        """Stop what runs and free the models."""
        ...


class Restarting(Protocol):
    """What a runner has besides, whose workers can be begun again."""

    async def prepare(self) -> None:
        """Begin a worker that went down while it had no job.

        Raises:
            NexusError: it cannot be begun.
        """
        ...

    def unable(self) -> str | None:
        """Why no worker can take a job now; None where one can."""
        ...

    def kill(self, job_id: str) -> None:
        """End the worker of a job that `run` has, which raises `WorkerLost` then."""
        ...


class ThreadRunner:
    """A pipeline that this process holds already, in a thread."""

    capacity = 1

    def __init__(self, pipe: NexusPipeline, preview_every: int = 1, warmup: bool = True) -> None:
        self.pipe, self.preview_every, self.warmup = pipe, preview_every, warmup

    async def start(self) -> Loaded:
        return await in_thread(self._start)

    def _start(self) -> Loaded:
        self.served = ServedPipeline(self.pipe, self.preview_every)
        return self.served.loaded(self.warmup)

    async def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        loop = asyncio.get_running_loop()

        tell = partial(call_soon, loop, emit)
        return await in_thread(lambda: self.served.run(tasks, tell))

    def cancel(self, job_id: str) -> None:
        self.served.cancel(job_id)

    async def close(self) -> None:
        """Nothing: the pipeline is its owner's."""


async def in_thread(function: Callable[[], T]) -> T:
    """A call in a thread that the end of the process does not wait for: a pipeline may hang."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def work() -> None:
        value, error = None, None
        try:
            value = function()
        except BaseException as raised:  # handed to the caller
            error = raised
        call_soon(loop, settle, value, error)

    threading.Thread(target=work, daemon=True, name="nexus-rt-pipeline").start()
    return await future


class ProcessRunner:
    """A pipeline in a process of its own: a fault in it takes no server down, and it is begun
    again.

    make: called with `argument` in the process; returns the pipeline. Importable there.
    log_level: of the process's log, as JSON lines on standard error; None configures none.
    load_timeout: seconds of loading and warming up, after which the process is ended.

    Raises:
        InputError: a load timeout that cannot be.
    """

    capacity = 1

    def __init__(
        self,
        make: Callable[[Any], NexusPipeline],
        argument: Any,
        preview_every: int = 1,
        warmup: bool = True,
        log_level: str | None = None,
        load_timeout: float = LOAD_TIMEOUT,
    ) -> None:
        self.load_timeout = number("load_timeout", load_timeout, 0.1, 1e8)
        self._made_of = (make, argument, preview_every, warmup, log_level)
        self._link: Link | None = None
        self._loading = False
        self._running: frozenset[str] = frozenset()
        self._cancelled: set[str] = set()  # some perhaps before a new process has the job

    async def start(self) -> Loaded:
        self._loading = True
        try:
            return await self._start()
        finally:
            self._loading = False

    async def _start(self) -> Loaded:
        if self._link is not None:
            await self._link.end(0.0)
        link = self._link = Link(self._made_of, asyncio.get_running_loop())
        try:
            kind, value = await asyncio.wait_for(link.messages.get(), self.load_timeout)
        except asyncio.TimeoutError:
            await link.end(0.0)
            raise NexusError(
                f"the models were not loaded within {self.load_timeout:g} s; give them longer"
                " (--load-timeout), or look at the disk that they are on.",
                code="timeout",
                param="load_timeout",
            ) from None
        if kind == "ready":
            return value
        await link.end(0.5)
        if kind == "failed":
            code, words = value
            raise NexusError(words, code=code)
        if value.for_memory:
            raise NexusError(
                f"{value} while it loaded: the machine's memory does not hold the models; free"
                " some, or load smaller ones.",
                code="out_of_memory",
            )
        raise NexusError(f"{value} while it loaded; its messages are above.")

    def unable(self) -> str | None:
        if self._loading:
            return "the worker is being started"
        return "the worker went down" if self._link is None or self._link.ended else None

    async def prepare(self) -> None:
        if not self._loading and (self._link is None or self._link.ended):
            await self.start()

    async def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        ids = frozenset(task.id for task in tasks)
        self._cancelled &= ids
        try:
            for task in tasks:
                emit({"id": task.id, "kind": "waiting"})
            await self.prepare()
            if left := [task for task in tasks if task.id not in self._cancelled]:
                return await self._results(left, emit)
            raise JobFailed("cancelled", "stopped before it began.")
        finally:
            self._running = frozenset()
            self._cancelled -= ids

    async def _results(self, tasks: list[Task], emit: Callable[[Event], None]) -> list[Clip]:
        link = self._link
        assert link is not None  # it was prepared
        self._running = frozenset(task.id for task in tasks)
        link.send(("run", tasks))
        for task in tasks:
            emit({"id": task.id, "kind": "begun"})
        while True:
            kind, value = message = await link.messages.get()
            if (clips := result(message, emit)) is not None:
                return clips
            if kind == "lost":
                if value.for_memory:
                    raise JobFailed(
                        "out_of_memory",
                        "the worker was ended for want of the machine's memory; ask for a smaller"
                        " clip.",
                    )
                raise WorkerLost(str(value))

    def cancel(self, job_id: str) -> None:
        if job_id in self._cancelled:
            return
        self._cancelled.add(job_id)
        if job_id in self._running and self._link is not None:
            self._link.send(("cancel", job_id))

    def kill(self, job_id: str) -> None:
        if job_id in self._running and self._link is not None:
            self._link.kill()

    async def close(self) -> None:
        if self._link is not None:
            self._link.send(("close", None))
            await self._link.end(5.0)
