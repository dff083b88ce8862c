"""What this package shares with the rest of a process: one lock over first imports and loads, the
end of forking, and memory.

transformers and its helpers build models under patches of `torch.nn` that are not safe in threads;
under this lock nobody else of ours builds one. A process that has loaded or computed with several
threads cannot fork: reading weights starts PyTorch's team of threads as a call does, and the child
waits for threads it does not have. It is told so at its first load or call.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from nexus_rt.core.errors import NexusError

_computed: tuple[int, int] | None = None  # process that loads or computes, most threads it had


def computes() -> None:
    """Mark this process as loading or computing, so that a forked child is refused. Comes before
    any lock: a child may have got one that no thread of its own will leave.

    Raises:
        NexusError: it was forked from one that had, with several threads.
    """
    global _computed
    import torch

    own, threads = os.getpid(), torch.get_num_threads()
    process, most = _computed or (own, 0)
    if process != own and most > 1:
        raise NexusError(
            f"this process was forked from process {process} after that one had loaded models or"
            " computed: its threads are not here, and a call would wait for them forever. Start"
            " workers with multiprocessing's 'spawn' (gunicorn without --preload), or load and"
            " call in the workers alone.",
            code="unsupported",
        )
    _computed = own, max(threads, most)


class _Loading:
    """The lock over first imports and loads, which marks the process as computing."""

    def __init__(self) -> None:
        self.renew()
        os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """A free lock: in a child, the thread that held the parent's is not there."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        computes()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


LOADING = _Loading()  # held while anything is imported for the first time, or loaded


def resident_bytes(pid: int | None = None) -> int | None:
    """The resident memory of a process, this one by default; None where the system does not say."""
    import resource

    statm = Path(f"/proc/{'self' if pid is None else pid}/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else None
