"""Which weights are where, and when: decided before the first step, from the plan, the engines'
bytes and a budget.

A call has phases: encoding, one phase for every run of steps with the same engines, decoding. Five
modes, the first that fits is taken:

resident    everything stays where it runs;
freed       both engines stay; the encoders leave before denoising, the VAE comes for decoding;
prefetched  an engine comes while the one before it runs alone, which leaves after its last step;
swapped     an engine comes when it is needed, and the step after the swap waits for it;
streamed    as swapped, and an engine that can comes block by block as it runs: the least memory,
            slower at every step.

Peaks are weights plus one block of working memory, which engines share as they never run at once.
The working memory is an estimate (`nexus_rt.pipeline.memory_use`), not a measurement.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nexus_rt.core.amounts import amount
from nexus_rt.core.devices import on_device
from nexus_rt.core.errors import InputError
from nexus_rt.core.log import chose
from nexus_rt.core.tracing import span
from nexus_rt.method.engine import Reserving, Resident, Streamed, supports
from nexus_rt.method.plan import Plan
from nexus_rt.pipeline.memory_use import MemoryUse

MODES = ("resident", "freed", "prefetched", "swapped", "streamed")


@dataclass(frozen=True)
class Phase:
    """A stretch of a call: steps first to last (-1, -1 outside denoising), what runs, what is there
    besides, peak bytes."""

    name: str
    first: int
    last: int
    runs: tuple[str, ...]
    present: tuple[str, ...]
    arriving: tuple[str, ...]
    peak: int


@dataclass(frozen=True)
class ResidencyPlan:
    """A mode and its phases. host: bytes of pinned host memory that what leaves the device takes,
    as PyTorch allocates it (`nexus_rt.memory.pinned`)."""

    mode: str
    phases: tuple[Phase, ...]
    budget: int | None
    host: int = 0

    @property
    def stays(self) -> bool:
        """Whether every engine is there from the first step to the last."""
        return self.mode in ("resident", "freed")

    @property
    def peak(self) -> int:
        return max(p.peak for p in self.phases)

    def table(self) -> str:
        """Lines to print: what is resident when, and peak bytes."""
        lines = [f"{'phase':8} {'steps':>7} {'peak':>10}  resident (arriving)"]
        for p in self.phases:
            steps = "" if p.first < 0 else f"{p.first}-{p.last}"
            arriving = f" ({', '.join(p.arriving)})" if p.arriving else ""
            lines.append(
                f"{p.name:8} {steps:>7} {amount(p.peak):>10}  {', '.join(p.present)}{arriving}"
            )
        budget = "" if self.budget is None else f" of {amount(self.budget)}"
        return "\n".join(
            [
                *lines,
                f"{self.mode}: at most {amount(self.peak)}{budget}; working memory is estimated",
                *([f"pinned host memory: {amount(self.host)}"] if self.host else []),
            ]
        )


def is_engine(part: str) -> bool:
    """Whether a part is a generator's engine: "small", "large", or an expert such as
    "large:high"."""
    return part.partition(":")[0] in ("small", "large")


def _stretches(plan: Plan) -> list[tuple[int, int, tuple[str, ...]]]:
    """Runs of steps with the same engines: first, last, engines."""
    segments: list[tuple[int, int, tuple[str, ...]]] = []
    for step in plan.steps:
        runs = step.engines
        if segments and segments[-1][2] == runs:
            segments[-1] = (segments[-1][0], step.index, runs)
        else:
            segments.append((step.index, step.index, runs))
    return segments


def _phases(plan: Plan, parts: Mapping[str, MemoryUse], mode: str) -> tuple[Phase, ...]:
    """The phases of a mode; parts are the engines, and any encoders and "vae"."""
    encoders = tuple(n for n in parts if not is_engine(n) and n != "vae")
    engines = plan.engines
    vae = ("vae",) if "vae" in parts else ()
    stretches = _stretches(plan)

    def phase(
        name: str, first: int, last: int, runs: tuple, present: tuple, arriving: tuple = ()
    ) -> Phase:
        working = max((parts[n].working for n in runs), default=0)
        there = [parts[n] for n in (*present, *arriving)]
        weights = sum(
            p.streamed if mode == "streamed" and p.streamed is not None else p.weights
            for p in there
        )
        return Phase(name, first, last, runs, present, arriving, weights + working)

    everything = (*encoders, *engines, *vae)
    phases = (
        [phase("encode", -1, -1, encoders, everything if mode == "resident" else encoders)]
        if encoders
        else []
    )
    for i, (first, last, runs) in enumerate(stretches):
        arriving: tuple[str, ...] = ()
        if mode == "resident":
            present = everything
        elif mode == "freed":
            present = engines
        else:
            present = runs
            if mode == "prefetched" and i + 1 < len(stretches):
                arriving = tuple(n for n in stretches[i + 1][2] if n not in runs)
        phases.append(
            phase("both" if len(runs) > 1 else runs[0], first, last, runs, present, arriving)
        )
    if vae:
        phases.append(phase("decode", -1, -1, vae, everything if mode == "resident" else vae))
    return tuple(phases)


def plan_residency(
    plan: Plan, parts: Mapping[str, MemoryUse], budget: int | None = None, mode: str | None = None
) -> ResidencyPlan:
    """The most comfortable mode that fits a budget.

    Args:
        parts: the engines that the plan runs ("small", "large", or experts as in "large:high"), and
            any of the encoders and "vae".
        budget: bytes; None takes "resident". mode: this one, if it fits.

    Raises:
        InputError: no mode fits; names the smallest budget that would do.
    """
    missing = [n for n in plan.engines if n not in parts]
    if missing:
        raise InputError(
            f"plan {plan.name!r} runs the {missing[0]} generator, whose size is not known.",
            code="missing",
            param=missing[0],
        )
    host = sum(parts[n].host for n in plan.engines)
    tried = [
        ResidencyPlan(m, _phases(plan, parts, m), budget, 0 if m in ("resident", "freed") else host)
        for m in ([mode] if mode else MODES)
    ]
    for candidate in tried:
        if budget is None or candidate.peak <= budget:
            if budget is not None and mode is None:
                chose(
                    "residency",
                    candidate.mode,
                    f"its peak is {amount(candidate.peak)} of {amount(budget)}",
                )
            return candidate
    least = min(tried, key=lambda r: r.peak)
    worst = max(least.phases, key=lambda p: p.peak)
    raise InputError(
        f"{amount(budget or 0)} do not hold this plan: its {worst.name!r} phase needs"
        f" {amount(worst.peak)} for {', '.join(worst.present)}; the smallest budget that would do"
        f" is {amount(least.peak)}. A plan without a bridge, smaller frames or weights of a lower"
        " precision need less.",
        code="out_of_memory",
        param="vram",
    )


class Residency:
    """Moves engines as a `ResidencyPlan` says: call `enter` before every step, `close` at the end.

    An engine that arrives is loaded by a thread of its own, on a stream of its own, while the steps
    before it run.
    """

    def __init__(self, plan: ResidencyPlan, engines: Mapping[str, Resident]) -> None:
        self.plan, self.engines = plan, engines
        self.threads: dict[str, threading.Thread] = {}
        self.reserved: dict[str, torch.cuda.Event] = {}  # when an engine's places are free
        self.failed: dict[str, BaseException] = {}
        self.current: Phase | None = None

    @property
    def stays(self) -> bool:
        """Whether every engine is there from the first step to the last."""
        return self.plan.stays

    def enter(self, index: int) -> None:
        """Bring what a step runs, start what comes next, let go of what is over.

        Raises:
            Whatever loading an engine raised.
        """
        phase = next(p for p in self.plan.phases if p.first <= index <= p.last)
        with span("swap", step=index):
            if phase is not self.current:
                self.current = phase
                with span("residency", step=index, phase=phase.name):
                    self._begin(phase)

    def _begin(self, phase: Phase) -> None:
        for name, engine in self.engines.items():
            if name not in (*phase.present, *phase.arriving) and engine.resident:
                engine.unload()
        for name in (n for n in phase.present if n in self.engines):
            self._wait(name)
            engine = self.engines[name]
            if self.plan.mode == "streamed" and supports(engine, Streamed):
                engine.load(streamed=True)
            else:
                engine.load()
        for name in phase.arriving:
            engine = self.engines[name]
            if name not in self.threads and not engine.resident:
                self._reserve(name)
                self.threads[name] = threading.Thread(target=self._fetch, args=(name,), daemon=True)
                self.threads[name].start()

    def _reserve(self, name: str) -> None:
        """Allocate an engine's places here, and note when what is queued has left them."""
        engine = self.engines[name]
        if supports(engine, Reserving):
            engine.reserve()
        device = getattr(engine, "device", None)
        if device is not None and device.type == "cuda":
            with on_device(device):
                self.reserved[name] = torch.cuda.Event()
                self.reserved[name].record(torch.cuda.current_stream(device))

    def close(self) -> None:
        """Wait for what is on its way: after an error too, so that no thread outlives the call."""
        for name in list(self.threads):
            self.threads.pop(name).join()

    def _fetch(self, name: str) -> None:
        try:
            device = getattr(self.engines[name], "device", None)
            if device is None or device.type != "cuda":
                self.engines[name].load()
                return
            stream = torch.cuda.Stream(device)
            # reserved places may be memory that what is queued still uses
            stream.wait_event(self.reserved[name])
            with torch.cuda.stream(stream):
                self.engines[name].load()
            stream.synchronize()
        except BaseException as error:  # raised where the engine is needed
            self.failed[name] = error

    def _wait(self, name: str) -> None:
        thread = self.threads.pop(name, None)
        if thread is not None:
            thread.join()
        if name in self.failed:
            raise self.failed.pop(name)
