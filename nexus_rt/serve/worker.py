"""A worker process: holds a pipeline, takes tasks from a pipe, and sends back what happens."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from nexus_rt.core.errors import CODES, NexusError
from nexus_rt.serve.exhaustion import HOST, exhausted
from nexus_rt.serve.generate import Event, ServedPipeline, Task
from nexus_rt.serve.logs import log_json
from nexus_rt.serve.messages import answer
from nexus_rt.serve.problems import JobFailed

if TYPE_CHECKING:
    from nexus_rt.pipeline.pipeline import NexusPipeline

log = logging.getLogger("nexus_rt.serve")
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the server's to decide on
UNUSABLE = 70  # exit code where only a fresh process helps
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
OUT_OF_MEMORY = (
    "out_of_memory",
    "the machine's memory does not hold the models; free some, or load smaller ones.",
)  # code and words


def work(
    pipe: Connection,
    make: Callable[[Any], NexusPipeline],
    argument: Any,
    preview_every: int,
    warmup: bool,
    log_level: str | None,
) -> None:
    """Load, say "ready" or "failed", then run what comes until the pipe ends."""
    from tqdm import tqdm

    detach()
    if log_level is not None:
        log_json(log_level)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    tqdm.set_lock(threading.RLock())  # its own would be a semaphore, left behind at the end
    worker = Worker(pipe)
    try:
        worker.served = ServedPipeline(make(argument), preview_every)
        loaded = worker.served.loaded(warmup)
    except Exception as error:
        worker.send("failed", load_failure(error))
        return
    worker.send("ready", loaded)
    worker.run()


def load_failure(error: Exception) -> tuple[str, str]:
    """Code and words of an error that ended loading; one that is not ours is logged."""
    ours = isinstance(error, (NexusError, JobFailed))
    if not ours:
        log.error("the models cannot be loaded", exc_info=error)
    if exhausted(error) == "host":
        return OUT_OF_MEMORY
    if not ours:
        return "failed", f"{type(error).__name__}: {error}"
    code = getattr(error, "code", None)
    return code if code in CODES else "failed", str(error)


def detach() -> None:
    """Be a process group that ends as a whole, and at once with the server: a worker that hangs
    does not hear that the server is gone."""
    with contextlib.suppress(OSError):  # it leads a group already
        os.setsid()
    server = os.getppid()
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(0)


class Worker:
    """The loop of a worker process, and the thread that hears the server meanwhile."""

    served: ServedPipeline

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.todo: list[list[Task]] = []
        self.arrived, self.sending = threading.Condition(), threading.Lock()

    def send(self, kind: str, value: Any) -> None:
        with self.sending, contextlib.suppress(OSError):  # `hear` ends a process without a server
            self.pipe.send((kind, value))

    def emit(self, event: Event) -> None:
        self.send("event", event)

    def hear(self) -> None:
        """Messages of the server, until it is gone: nobody would read a clip then."""
        while True:
            try:
                kind, value = self.pipe.recv()
            except (EOFError, OSError):
                os._exit(0)
            except Exception:  # no memory for a message: a worker that does not hear helps nobody
                os._exit(UNUSABLE)
            with self.arrived:
                if kind == "run":
                    self.todo.append(value)
                elif kind == "close":
                    os._exit(0)
                else:
                    self.served.cancel(value)
                self.arrived.notify()

    def run(self) -> None:
        """One list of tasks after another."""
        threading.Thread(target=self.hear, daemon=True).start()
        while True:
            with self.arrived:
                self.arrived.wait_for(lambda: self.todo)
                tasks = self.todo.pop(0)
            try:
                self.send(*answer(self.served, tasks, self.emit))
            except MemoryError:  # of a message
                self.send("failed", ("out_of_memory", HOST))
            if not self.answers():
                os._exit(UNUSABLE)

    def answers(self) -> bool:
        """Whether the device still computes; after an illegal address it does not."""
        device = self.served.pipe.device
        if device.type != "cuda":
            return True
        import torch

        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
        return True
