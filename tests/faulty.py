"""A part of the GPU suite whose rows hang, crash and break the device, for tests of what survives."""

import os
import signal
import time

from nexus_rt.bench.gpu.units import Unit


def units(setting):
    return {
        "before": Unit(lambda: {"right": True, "process": os.getpid()}),
        "hangs": Unit(lambda: time.sleep(1000), 1.0),
        "crashes": Unit(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
        "is killed": Unit(lambda: os.kill(os.getpid(), signal.SIGKILL)),
        "leaves": Unit(lambda: os._exit(3)),
        "breaks the device": Unit(lambda: _illegal_access(setting)),
        "raises": Unit(lambda: 1 / 0),
        "after": Unit(
            lambda: {"right": True, "process": os.getpid(), "seen": sorted(setting.results)}
        ),
    }


def hanging(setting):
    return {f"modulate {i}": Unit(lambda: time.sleep(1000), 2.0) for i in range(3)}


def slow(setting):
    return {f"row {i}": Unit(lambda: time.sleep(0.4) or {"right": True}) for i in range(20)}


def mixed(setting):
    """One headline row behind another row."""
    return {
        "other": Unit(lambda: {"right": True}),
        "first": Unit(lambda: {"right": True}, estimate=1.0),
    }


def lengthy(setting):
    """A headline row that outlasts its part's limit."""
    return {"long": Unit(lambda: time.sleep(9) or {"right": True}, 60.0, estimate=1.0)}


def unequipped(setting):
    def imports():
        import msgspec  # noqa: F401

        return {"right": True}

    return {"row": Unit(imports)}


def unmade(setting):
    """Labels are there in the parent; in a worker, which has an environment of its own, nothing is."""
    if os.environ.get("NEXUS_RT_TEST_PARENT") != str(os.getpid()):
        raise ImportError("no such library")
    return {"row": Unit(lambda: {})}


def _illegal_access(setting):
    """As CUDA does it: an error now, and no call of this process works any more."""

    def refuse():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    setting.synchronize = refuse
    refuse()
