"""A process that dies must not leave the others waiting for it: each says every half second that it
is there, and one that sees another gone ends with the reason."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nexus_rt.core.errors import NexusError, shorten

BEAT_S, SILENT_S, GRACE_S = 0.5, 5.0, 1.0
DONE = "done"
FIRST_GONE = "process 0, which keeps the others together, has ended ({})"
# words of the errors of a collective whose other side is gone
COLLECTIVE = ("gloo", "NCCL", "Connection", "peer", "remote")


def _leave(reason: str) -> None:
    """End this process: it may be inside of a collective that will never finish."""
    print(f"nexus-rt: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


class Watch:
    """Signs of life of every process, in a store of their own.

    leave: what is done where another process has gone; ends this one unless a test says otherwise.
    """

    def __init__(
        self, rank: int, world: int, store: Any, leave: Callable[[str], None] = _leave
    ) -> None:
        self.rank, self.world, self.store, self.leave = rank, world, store, leave
        self.seen = {r: ("", time.monotonic()) for r in range(world) if r != rank}
        self.over = threading.Event()
        self.ending = threading.Event()  # this process is ending by itself
        self.found: str | None = None  # why another has gone
        store.set(f"beat/{rank}", "0")
        self.thread = threading.Thread(target=self._walk, daemon=True)
        self.thread.start()

    @classmethod
    def begin(cls, rank: int, world: int) -> Watch:
        """Between the processes of the default group, whose first holds the store."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        open_at = lambda port: dist.TCPStore(
            host, port, world, rank == 0, timedelta(seconds=10), wait_for_workers=False
        )
        store = open_at(0) if rank == 0 else None
        port = [store.port if store is not None else 0]
        dist.broadcast_object_list(port, 0)
        return cls(rank, world, store or open_at(port[0]))

    def failed(self, error: BaseException) -> BaseException:
        """Tell the others why this process ends; what to raise: where the error is that another
        does not answer, why that does not."""
        self.ending.set()
        if isinstance(error, RuntimeError) and any(w in str(error) for w in COLLECTIVE):
            end = time.monotonic() + SILENT_S + 4 * BEAT_S
            while self.found is None and time.monotonic() < end:
                time.sleep(BEAT_S / 5)
            if self.found is not None:
                error = NexusError(
                    f"{self.found}; this process was waiting for it.", code="unreachable"
                )
        reason = f"{type(error).__name__}: {shorten(error)}"
        try:
            self.store.set(f"end/{self.rank}", reason)
            if self.rank == 0:
                time.sleep(2 * BEAT_S + GRACE_S)  # the store ends with this process
        except (RuntimeError, OSError):  # it went first
            pass
        self.over.set()
        return error

    def close(self) -> None:
        """This process has done its share; the one that holds the store stays until all have."""
        try:
            self.store.set(f"end/{self.rank}", DONE)
            end = time.monotonic() + 2 * SILENT_S
            while self.rank == 0 and self.seen and not self.over.is_set():
                if time.monotonic() > end:
                    break
                time.sleep(BEAT_S / 10)
        except (RuntimeError, OSError):
            pass
        self.over.set()
        self.thread.join(2 * BEAT_S)

    def _walk(self) -> None:
        beat = 0
        while not self.over.wait(BEAT_S):
            beat += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beat))
                self.found = self.found or self._gone()
            except (RuntimeError, OSError) as error:
                self.found = self.found or FIRST_GONE.format(shorten(error, 100))
            if self.found and not self.ending.is_set():
                # this process may be about to say it itself
                if self.ending.wait(GRACE_S) or self.over.is_set():
                    continue
                self.leave(self.found)
                return

    def _gone(self) -> str | None:
        """Why a process is not there any more; None where all are."""
        for rank, (last, when) in list(self.seen.items()):
            if self.store.check([f"end/{rank}"]):
                reason = self.store.get(f"end/{rank}").decode()
                del self.seen[rank]
                if reason != DONE:
                    return f"process {rank} ended: {reason}"
                continue
            beats = self.store.check([f"beat/{rank}"])
            now = self.store.get(f"beat/{rank}").decode() if beats else ""
            if now != last:
                self.seen[rank] = (now, time.monotonic())
            elif time.monotonic() - when > SILENT_S:
                return f"process {rank} has given no sign of life for {SILENT_S:.0f} s"
        return None
