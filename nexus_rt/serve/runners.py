"""What runs jobs: the protocol, a pipeline in a thread of this process, and one in a process of its
own (`nexus_rt.serve.worker`), which is begun again when it goes down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol

from nexus_rt.errors import NexusError, cut
from nexus_rt.serve.generate import Clip, Event, ServedPipeline, Task
from nexus_rt.serve.problems import JobFailed, WorkerLost
from nexus_rt.serve.profile import Profile
from nexus_rt.serve.worker import SIGNALS, WarmUp, work

if TYPE_CHECKING:
    from nexus_rt.pipeline import NexusPipeline

log = logging.getLogger("nexus_rt.serve")


class Runner(Protocol):
    """Where jobs run. capacity: calls at a time."""

    capacity: int

    async def start(self) -> tuple[Profile, WarmUp | None]:
        """Load the models; what they can make, and what the warm-up took.

        Raises:
            NexusError: they cannot be loaded.
        """
        ...

    async def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        """The clips of tasks of one batch that were not cancelled; `emit` is called in the event
        loop.

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


class ThreadRunner:
    """A pipeline that this process holds already, in a thread."""

    capacity = 1

    def __init__(self, pipe: NexusPipeline, preview_every: int = 1, warmup: bool = True) -> None:
        self.pipe, self.preview_every, self.warmup = pipe, preview_every, warmup

    async def start(self) -> tuple[Profile, WarmUp | None]:
        return await asyncio.to_thread(self._start)

    def _start(self) -> tuple[Profile, WarmUp | None]:
        self.pipe.set_progress_bar_config(disable=True)
        self.served = ServedPipeline(self.pipe, self.preview_every)
        return self.served.profile, self.served.warm_up() if self.warmup else None

    async def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(emit, event)

        return await asyncio.to_thread(self.served.run, tasks, tell)

    def cancel(self, job_id: str) -> None:
        self.served.cancel(job_id)

    async def close(self) -> None:
        """Nothing: the pipeline is its owner's."""


class ProcessRunner:
    """A pipeline in a process of its own: a fault in it takes no server down, and it is begun
    again.

    make: called with `argument` in the process; returns the pipeline. Importable there.
    log_level: of the process's log, as JSON lines on standard error; None configures none.
    """

    capacity = 1

    def __init__(
        self,
        make: Callable[[Any], NexusPipeline],
        argument: Any,
        preview_every: int = 1,
        warmup: bool = True,
        log_level: str | None = None,
    ) -> None:
        self._made_of = (make, argument, preview_every, warmup, log_level)
        self._process: Any = None
        self._pipe: Connection | None = None
        self._messages: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._sending = threading.Lock()
        self._cancelled: set[str] = set()  # some perhaps before a new process could be told

    async def start(self) -> tuple[Profile, WarmUp | None]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=work, args=(theirs, *self._made_of), name="nexus-rt-worker", daemon=True
        )
        await asyncio.to_thread(_start_quietly, self._process)
        theirs.close()
        self._pipe, self._messages = ours, asyncio.Queue()
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=_read, args=(ours, loop, self._messages), daemon=True, name="nexus-rt-reader"
        ).start()
        kind, value = await self._messages.get()
        if kind == "ready":
            return value
        await self._stop()
        if kind == "failed":
            raise NexusError(value[1])
        raise NexusError(
            f"the worker ended with exit code {self._process.exitcode} while it loaded; its"
            " messages are above."
        )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    async def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        self._cancelled &= {task.id for task in tasks}
        if not self.alive:
            await self._stop()
            await self.start()
        if left := [task for task in tasks if task.id not in self._cancelled]:
            return await self._results(left, emit)
        raise JobFailed("cancelled", "stopped before it began, as asked.")

    async def _results(self, tasks: list[Task], emit: Callable[[Event], None]) -> list[Clip]:
        self._send(("run", tasks))
        while True:
            kind, value = await self._messages.get()
            if kind == "event":
                emit(value)
            elif kind == "clips":
                return value
            elif kind == "failed":
                raise JobFailed(*value)
            elif kind == "lost":
                await self._stop()
                raise WorkerLost(f"the worker ended with exit code {self._process.exitcode}")

    def _send(self, message: tuple[str, Any]) -> None:
        with self._sending, contextlib.suppress(OSError, ValueError):  # "lost" comes
            if self._pipe is not None:
                self._pipe.send(message)

    def cancel(self, job_id: str) -> None:
        self._cancelled.add(job_id)
        self._send(("cancel", job_id))

    async def close(self) -> None:
        self._send(("close", None))
        await self._stop(patience=5.0)

    async def _stop(self, patience: float = 0.5) -> None:
        """End the process, gently first."""
        if self._process is None or self._process.pid is None:
            return
        await asyncio.to_thread(self._process.join, patience)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join, 10.0)
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def _start_quietly(process: Any) -> None:
    """Start a process that a terminal's Ctrl-C does not reach: it inherits this thread's mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read(
    pipe: Connection, loop: asyncio.AbstractEventLoop, messages: asyncio.Queue[tuple[str, Any]]
) -> None:
    """A worker's messages into the event loop, until it is gone."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            message = ("lost", None)
        except Exception as error:  # a message of a dying process that is not whole
            log.warning("a worker's message cannot be read: %s", cut(error))
            message = ("lost", None)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(messages.put_nowait, message)
        if message[0] == "lost":
            return
