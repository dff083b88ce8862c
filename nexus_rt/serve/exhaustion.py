"""Which memory ran out: the device's, or the machine's.

A host without memory has many words for it: Python's MemoryError, torch's allocator, C++'s
std::bad_alloc, ENOMEM, and a SIGKILL by the kernel, which names nobody. All of them are a job's
`out_of_memory`: to run it again would end alike.
"""

from __future__ import annotations

import errno
import resource
import signal
from pathlib import Path
from typing import Literal

import torch

from nexus_rt.core.errors import NexusError

HOST = "the machine's memory does not hold it; ask for a smaller clip."
HOST_WORDS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "Cannot allocate memory",
    "not enough memory: you tried to allocate",
    "unable to mmap",
)
DEVICE_WORDS = ("CUDA out of memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
VMSTAT = Path("/proc/vmstat")


def exhausted(error: BaseException) -> Literal["device", "host"] | None:
    """The memory that an error, or what it came from, is about."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    for one in chain:
        if isinstance(one, torch.OutOfMemoryError):
            return "device"
        if isinstance(one, MemoryError):
            return "host"
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return "host"
        if not isinstance(one, NexusError):  # ours may quote a client
            words = str(one)
            if any(w in words for w in DEVICE_WORDS):
                return "device"
            if any(w in words for w in HOST_WORDS):
                return "host"
    return None


def oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since it booted; 0 where it does not
    say."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def killed_for_memory(exit_code: int | None, kills_before: int) -> bool:
    """Whether a process that ended so ran out of host memory.

    The kernel's kill is a SIGKILL while its count of such kills grew. Under a limit of the address
    space (`ulimit -v`) an allocation of C++ that fails aborts.

    Args:
        kills_before: `oom_kills` when the process was last known to be well.
    """
    if exit_code == -signal.SIGKILL:
        return oom_kills() > kills_before
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return exit_code == -signal.SIGABRT and limit != resource.RLIM_INFINITY
