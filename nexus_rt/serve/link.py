"""A worker process and the two threads at its pipe: the event loop waits for neither.

A pipe's buffer is finite, and a worker that computes or hangs does not empty it. So a thread
writes, out of a queue without bound, and another reads, reaps the process and says how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nexus_rt.core.errors import shorten
from nexus_rt.serve.exhaustion import killed_for_memory, oom_kills
from nexus_rt.serve.messages import Message, call_soon
from nexus_rt.serve.worker import SIGNALS, work

log = logging.getLogger("nexus_rt.serve")
REAPING = 5.0  # seconds from a pipe's end to its process's, which is killed then
UNKILLABLE = 30.0  # seconds from a kill to giving up on a process that a driver holds


@dataclass(frozen=True)
class Exit:
    """How a worker ended. code: None where it does not end. for_memory: the host's ran out."""

    code: int | None
    for_memory: bool = False

    def __str__(self) -> str:
        if self.code is None:
            return "the worker cannot be ended: its device's driver holds it"
        return f"the worker ended with exit code {self.code}"


class Link:
    """A worker that is being started, runs, or has ended.

    messages: of the worker, then ("lost", Exit). ended: whether that has come.
    arguments: of `nexus_rt.serve.worker.work`, after the pipe.
    """

    def __init__(self, arguments: tuple[Any, ...], loop: asyncio.AbstractEventLoop) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.ended = False
        self._loop = loop
        self._gone = asyncio.Event()
        self._killed = False
        self._kills = oom_kills()
        self._out: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._process: Any = None
        threading.Thread(
            target=self._live, args=(arguments,), daemon=True, name="nexus-rt-reader"
        ).start()

    def send(self, message: Message) -> None:
        """Have a message written when the pipe takes it; none where the worker has ended."""
        self._out.put(message)

    def kill(self) -> None:
        """End the worker and its children at once."""
        self._killed = True
        if self._process is None:  # `_live` looks at `_killed`
            return
        kill_group(self._process)
        self._loop.call_later(UNKILLABLE, self._lost, Exit(None))

    async def end(self, patience: float) -> None:
        """Have the worker ended, gently for `patience` seconds."""
        if not self.ended and patience:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._gone.wait(), patience)
        if not self.ended:
            self.kill()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._gone.wait(), 2 * REAPING)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        call_soon(self._loop, call, *arguments)

    def _lost(self, how: Exit) -> None:
        if self.ended:
            return
        self.ended = True
        self._gone.set()
        self._out.put(None)
        self.messages.put_nowait(("lost", how))

    def _live(self, arguments: tuple[Any, ...]) -> None:
        """Start the process, hear it, and reap it; its parent to the kernel is this thread."""
        try:
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work, args=(theirs, *arguments), name="nexus-rt-worker", daemon=True
            )
            start_quietly(process)
            theirs.close()
            self._process = process
        except Exception as error:  # no process, no descriptor, an argument that is not pickled
            words = f"no worker can be started ({shorten(error)})"
            self._tell(self.messages.put_nowait, ("failed", ("failed", words)))
            self._tell(self._lost, Exit(None))
            return
        if self._killed:
            kill_group(process)
        writer = threading.Thread(
            target=self._write, args=(ours,), daemon=True, name="nexus-rt-writer"
        )
        writer.start()
        self._read(ours)
        process.join(REAPING)
        if process.exitcode is None:
            kill_group(process)
            process.join()
        code = process.exitcode
        kill_group(process)  # what it had started
        memory = not self._killed and killed_for_memory(code, self._kills)
        self._tell(self._lost, Exit(code, memory))
        self._out.put(None)
        writer.join(REAPING)
        if not writer.is_alive():
            ours.close()

    def _read(self, pipe: Any) -> None:
        """The worker's messages into the event loop, until its end of the pipe is closed."""
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                return
            except Exception as error:  # a message of a dying process that is not whole
                log.warning("a worker's message cannot be read: %s", shorten(error))
                return
            self._tell(self.messages.put_nowait, message)

    def _write(self, pipe: Any) -> None:
        """What is sent into the pipe; this thread alone waits while the worker does not read."""
        while (message := self._out.get()) is not None:
            try:
                pipe.send(message)
            except (OSError, ValueError):  # the worker is gone, as `_read` says
                return


def kill_group(process: Any) -> None:
    """SIGKILL to a worker and what it has started; nothing where they have ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)  # `work` makes a group of its own
    except (ProcessLookupError, PermissionError):
        if process.exitcode is None:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGKILL)


def start_quietly(process: Any) -> None:
    """Start a process that a terminal's Ctrl-C does not reach: it inherits this thread's mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
