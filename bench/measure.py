"""Measuring one call: its spans, its peak memory, its energy; and the figures made of several."""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nexus_rt.core.devices import synchronize
from nexus_rt.core.process import resident_bytes
from nexus_rt.core.timing import elapsed_ms, in_turn
from nexus_rt.core.tracing import Trace, record

K = TypeVar("K")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class HostPeak:
    """The highest resident memory while a block runs, looked at every 20 ms (more often, and the
    looking shows in what is timed); None where it is not known."""

    def __enter__(self) -> HostPeak:
        self.bytes, self._over = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.bytes is not None:
            self._thread.start()
        return self

    def _look(self) -> None:
        now = resident_bytes()
        if self.bytes is not None and now is not None:
            self.bytes = max(self.bytes, now)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self._look()

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        if self.bytes is not None:
            self._thread.join()
            self._look()


def joules(device: torch.device) -> float | None:
    """Energy the GPU has used since its driver was loaded; None where NVML does not say."""
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except Exception:  # no package, no driver, a GPU that does not count: the figure is left out
        return None


@dataclass
class Run:
    """One measured call. peaks in bytes, energy in joules; None where it is not known."""

    result: Any
    total_ms: float
    trace: Trace
    peak_host: int | None
    peak_device: int | None
    energy: float | None


def measured(call: Callable[[], Any], device: torch.device) -> Run:
    """Run a call once, watched."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    before = joules(device)
    with HostPeak() as host, record(device) as trace:
        results: list[Any] = []
        total = elapsed_ms(lambda: results.append(call()), device)
    after = joules(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    energy = None if before is None or after is None else after - before
    return Run(results[0], total, trace, host.bytes, peak, energy)


def step_durations(trace: Trace) -> list[float]:
    """Milliseconds of each denoising step: from the start of its first span to the end of its
    last."""
    return [stop - start for start, stop in trace.steps().values()]


def interleaved(
    calls: Mapping[K, Callable[[], Any]],
    device: torch.device,
    runs: int,
    warmup: int,
    between: Callable[[], Any] = lambda: None,
) -> dict[K, list[Run]]:
    """Every call `runs` times after `warmup`, in turn; `between` is called once a counted round."""
    return in_turn(calls, lambda call: measured(call, device), runs, warmup, between)


def ratio_of(ours_ms: Sequence[float], theirs_ms: Sequence[float]) -> float:
    """How many times faster ours is: the median of the ratios, pair by pair."""
    return statistics.median(b / a for a, b in zip(ours_ms, theirs_ms, strict=True))


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, 95th percentile and the runs themselves, milliseconds to four digits."""
    rounded = [float(f"{v:.4g}") for v in values]
    return {
        "p50": statistics.median(rounded),
        "p95": float(f"{percentile(rounded, 0.95):.4g}"),
        "runs": rounded,
    }
