"""Units of work in processes of their own: a hang, an illegal access or a kill costs one row, and
the next goes on in a fresh process.

Processes are forked from a server that has imported PyTorch and Triton and has not touched the GPU,
so that a new one costs a CUDA context and no import.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from nexus_rt.bench.failures import failure

START_S = 120.0  # a worker's first sign of life: imports, where the server has none of them
# seconds from a fork to the first unit: a CUDA context, the setting, the libraries' first calls
WORKER_S = 4.0
PRELOADED = ["torch", "triton", "nexus_rt.bench.gpu.setting"]
NOT_REACHED = "not_reached"

Row = dict[str, Any]
Note = Callable[[str, Row], None]


@dataclass(frozen=True)
class Unit:
    """What makes one row.

    limit: seconds after which it counts as hung. estimate: predicted seconds of a headline row,
        which is made before all others (`estimates`); 0 for the others.
    """

    call: Callable[[], Row]
    limit: float = 40.0
    estimate: float = 0.0

    @property
    def headline(self) -> bool:
        return self.estimate > 0


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    source: "module:function" of `units(setting) -> {label: Unit}`; cheap, and free of the GPU, as
        it is asked for labels too. limit: seconds for all its rows. lanes: processes at a time;
        more than one where nothing is timed. needs: packages without which it has no rows.
    """

    source: str
    limit: float
    lanes: int = 1
    needs: tuple[str, ...] = ("msgspec",)

    def units(self, setting: Any) -> dict[str, Unit]:
        """The part's units, in order."""
        module, _, function = self.source.partition(":")
        return getattr(importlib.import_module(module), function)(setting)

    def headline_seconds(self, setting: Any) -> float:
        """Predicted seconds of its headline rows, the start of its workers included; 0 without
        any."""
        estimates = [u.estimate for u in self.units(setting).values() if u.headline]
        each = max(sum(estimates) / self.lanes, max(estimates, default=0.0))
        return WORKER_S + each if estimates else 0.0


def _work(connection: Any, part: Part, make: Callable[[], Any], environment: dict) -> None:
    """A worker's life: a label comes, its row goes back; it ends after an error that its device
    does not survive."""
    os.environ.update(environment)
    try:
        setting = make()
        units = part.units(setting)
    except BaseException as error:
        connection.send((failure(error), False))
        return
    connection.send((None, True))
    while (label := connection.recv()) is not None:
        try:
            row = units[label].call()
            setting.synchronize()  # what a kernel did wrong may show only now
        except Exception as error:
            why = setting.lacking(error)
            row = {NOT_REACHED: why} if why else {"failed": failure(error)}
        alive = setting.works()
        connection.send((row, alive))
        if not alive:
            return


class Worker:
    """A process that runs units of one part."""

    def __init__(self, part: Part, make: Callable[[], Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, part, make, dict(os.environ)), daemon=True
        )
        self.process.start()
        theirs.close()

    def answer(self, seconds: float) -> tuple[Any, bool]:
        """What the worker sends within so many seconds, and whether it lives on."""
        ready = wait([self.connection, self.process.sentinel], max(0.0, seconds))
        if not ready:
            self.kill()
            return {"failed": f"it had not ended after {seconds:.0f} s and was killed"}, False
        try:
            if self.connection.poll():
                return self.connection.recv()
        except (EOFError, OSError):
            pass
        self.process.join(5)
        return {"failed": f"its process died: {_ending(self.process.exitcode)}"}, False

    def run(self, label: str, seconds: float) -> tuple[Row, bool]:
        """The row of a unit, and whether the worker can take another."""
        try:
            self.connection.send(label)
        except OSError:
            return {"failed": f"its process died: {_ending(self.process.exitcode)}"}, False
        return self.answer(seconds)

    def end(self) -> None:
        """Let it go."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(5)
        self.kill()

    def kill(self) -> None:
        """End it, whatever it does; one that the driver holds is left behind."""
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.connection.close()


def _ending(code: int | None) -> str:
    if code is None:
        return "for no known reason"
    if code < 0:
        return f"of {signal.Signals(-code).name}"
    return f"with exit code {code}"


class _Lanes:
    """The rows of a part still to make, and the workers that make them."""

    def __init__(
        self, part: Part, make: Callable[[], Any], labels: dict[str, Unit], deadline: float
    ) -> None:
        self.part, self.make, self.units, self.deadline = part, make, labels, deadline
        self.todo = deque(labels)
        self.workers: set[Worker] = set()
        self.over = False
        self.broken: Exception | None = None  # what taking a row down raised
        self.lock = threading.Lock()

    def walk(self, note: Note) -> None:
        """Take one row after another, in a process that is replaced when it dies."""
        worker: Worker | None = None
        try:
            while not self.over:
                try:
                    label = self.todo.popleft()
                except IndexError:
                    return
                left = self.deadline - time.monotonic()
                if left < 1:
                    row = {NOT_REACHED: "the time was over"}
                else:
                    if worker is None:
                        worker, why = self._start(left)
                        left = self.deadline - time.monotonic()
                    if worker is None:
                        row, alive = {"failed": f"no process for it: {why}"}, False
                    else:
                        row, alive = worker.run(label, min(self.units[label].limit, left))
                        if not alive:
                            self._drop(worker)
                            worker = None
                    if not alive and time.monotonic() >= self.deadline:
                        row = {NOT_REACHED: "the time was over before it had ended"}
                if self.over:
                    return
                with self.lock:
                    note(label, row)
        except Exception as error:
            self.broken = error
            self.over = True
        finally:
            if worker is not None:
                worker.end()
                self._drop(worker)

    def _start(self, left: float) -> tuple[Worker | None, str]:
        worker = Worker(self.part, self.make)
        with self.lock:
            self.workers.add(worker)
        why, alive = worker.answer(min(START_S, left))
        if alive:
            return worker, ""
        self._drop(worker)
        return None, why if isinstance(why, str) else why["failed"]

    def _drop(self, worker: Worker) -> None:
        worker.kill()
        with self.lock:
            self.workers.discard(worker)

    def stop(self) -> None:
        """End every worker: the run is over."""
        self.over = True
        with self.lock:
            workers = list(self.workers)
        for worker in workers:
            if worker.process.is_alive():
                worker.process.kill()


def run_part(
    part: Part,
    setting: Any,
    make: Callable[[], Any],
    deadline: float,
    note: Note,
    known: set[str],
    headline: bool = False,
) -> None:
    """Make the rows of a part; each is noted as it comes, one that fails with why, one that the
    time does not reach as such.

    Args:
        setting: of this process, which is asked for labels. make: makes a worker's own; it travels
            to the worker. known: labels that are left out. headline: the headline rows alone.
    """
    units = {
        label: unit
        for label, unit in part.units(setting).items()
        if label not in known and (unit.headline or not headline)
    }
    lanes = _Lanes(part, make, units, min(deadline, time.monotonic() + part.limit))
    threads = [
        threading.Thread(target=lanes.walk, args=(note,), daemon=True)
        for _ in range(min(part.lanes, len(units)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # short, so that an interrupt is seen
    except BaseException:
        lanes.stop()
        raise
    if lanes.broken is not None:
        raise lanes.broken
