"""What this package shares with the rest of a process: one lock over first imports and loads, the
end of forking, and memory.

transformers and its helpers build models under patches of `torch.nn` that are not safe in threads;
under this lock nobody else of ours builds one. A process that has computed with several threads
cannot fork: the child waits for threads it does not have. It is told so at its first call.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from nexus_rt.errors import NexusError

LOADING = threading.RLock()  # held while anything is imported for the first time, or loaded
_computed: tuple[int, int] | None = None  # process and threads of the first computation


def computes() -> None:
    """Mark this process as computing, so that a forked child is refused.

    Raises:
        NexusError: it was forked from one that had, with several threads.
    """
    global _computed
    if _computed is None:
        import torch

        _computed = os.getpid(), torch.get_num_threads()
    elif _computed[0] != os.getpid():
        if _computed[1] > 1:
            raise NexusError(
                f"this process was forked from process {_computed[0]} after that one had computed:"
                " its threads are not here, and a call would wait for them forever. Start workers"
                " with multiprocessing's 'spawn' (gunicorn without --preload), or load and call in"
                " the workers alone."
            )
        _computed = os.getpid(), _computed[1]


def resident_bytes(pid: int | None = None) -> int | None:
    """The resident memory of a process, this one by default; None where the system does not say."""
    import resource

    statm = Path(f"/proc/{'self' if pid is None else pid}/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else None
