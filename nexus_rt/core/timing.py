"""Milliseconds of calls, and calls measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

import torch

from nexus_rt.core.devices import synchronize

K = TypeVar("K")
C = TypeVar("C", bound=Callable[[], object])
T = TypeVar("T")
CPU = torch.device("cpu")


def elapsed_ms(call: Callable[[], object], device: torch.device = CPU) -> float:
    """Milliseconds of one run of a call, the work of the device included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def in_turn(
    calls: Mapping[K, C],
    measure: Callable[[C], T],
    runs: int,
    warmup: int,
    between: Callable[[], object] = lambda: None,
) -> dict[K, list[T]]:
    """Measurements of every call, taken in turn, so that each finds the caches as the others leave
    them and what the machine does besides falls on all of them.

    between: called once a counted round.
    """
    measured: dict[K, list[T]] = {name: [] for name in calls}
    for i in range(warmup + runs):
        for name, call in calls.items():
            value = measure(call)
            if i >= warmup:
                measured[name].append(value)
        if i >= warmup:
            between()
    return measured


def medians_ms(
    calls: Mapping[K, Callable[[], object]],
    runs: int = 5,
    warmup: int = 2,
    device: torch.device = CPU,
) -> dict[K, float]:
    """Median milliseconds of every call, taken in turn."""
    durations = in_turn(calls, lambda call: elapsed_ms(call, device), runs, warmup)
    return {name: median(values) for name, values in durations.items()}


def median_ms(
    call: Callable[[], object], runs: int = 5, warmup: int = 2, device: torch.device = CPU
) -> float:
    """Median milliseconds of a call."""
    return medians_ms({"": call}, runs, warmup, device)[""]
