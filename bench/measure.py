"""Measuring one call: its spans, its peak memory, its energy; and the figures made of several."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nexus_rt.core.devices import synchronize
from nexus_rt.core.process import resident_bytes
from nexus_rt.core.tracing import Trace, record


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

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        if self.bytes is not None:
            self._thread.join()
            self.bytes = max(self.bytes, resident_bytes())


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
        start = time.perf_counter()
        result = call()
        synchronize(device)
        total = 1000 * (time.perf_counter() - start)
    after = joules(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Run(result, total, trace, host.bytes, peak, None if before is None else after - before)


def step_durations(trace: Trace) -> list[float]:
    """Milliseconds of each denoising step: from the start of its first span to the end of its
    last."""
    return [stop - start for start, stop in trace.steps().values()]


def interleaved(
    calls: dict[Any, Callable[[], Any]],
    device: torch.device,
    runs: int,
    warmup: int,
    between: Callable[[], Any] = lambda: None,
) -> dict[Any, list[Run]]:
    """Every call `runs` times after `warmup`, in turn, so that what the machine does besides falls
    on all of them; `between` is called once a counted round."""
    by_call: dict[Any, list[Run]] = {name: [] for name in calls}
    for i in range(warmup + runs):
        for name, call in calls.items():
            run = measured(call, device)
            if i >= warmup:
                by_call[name].append(run)
        if i >= warmup:
            between()
    return by_call


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, 95th percentile and the runs themselves, milliseconds to four digits."""
    rounded = [float(f"{v:.4g}") for v in values]
    return {
        "p50": statistics.median(rounded),
        "p95": float(f"{percentile(rounded, 0.95):.4g}"),
        "runs": rounded,
    }
