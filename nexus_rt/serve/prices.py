"""What a request will take: a cost model that learns from the jobs that ran.

A step's price is of its kind, which is how many forwards each generator makes in it, and of the
clip's latent cells. A size that has not run yet is priced from the nearest one of the same kind, in
proportion to its cells; a kind that has not, from the price of one forward. The first prices come
from the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from nexus_rt.pipeline.request import GenerationRequest

SHARE = 0.3  # of a new measurement in the running average
STAGES = ("encode", "decode", "write")


def step_forwards(request: GenerationRequest) -> list[dict[str, int]]:
    """Forwards of a plan's generators in each of its steps."""
    plan, guidance = request.plan, request.guidance
    return [
        {g: plan.forwards(step, g, getattr(guidance, g)) for g in plan.generators}
        for step in plan.steps
    ]


def step_kinds(request: GenerationRequest) -> list[str]:
    """What runs in each step of a plan, as its price is kept: "small:2 large:1"."""
    return [
        " ".join(f"{g}:{n}" for g, n in forwards.items() if n) or "reused"
        for forwards in step_forwards(request)
    ]


def _forwards(kind: str) -> dict[str, int]:
    pairs = (word.split(":") for word in kind.split() if ":" in word)
    return {generator: int(count) for generator, count in pairs}


class Prices:
    """Milliseconds by kind and latent cells, as running averages."""

    def __init__(self, known: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.known: dict[str, dict[int, float]] = {
            kind: {int(cells): ms for cells, ms in sizes.items()}
            for kind, sizes in (known or {}).items()
        }

    def as_row(self) -> dict[str, dict[str, float]]:
        """As the store keeps them."""
        return {k: {str(c): round(ms, 3) for c, ms in s.items()} for k, s in self.known.items()}

    def observe(self, kind: str, cells: int, ms: float) -> None:
        """A measurement; the first of a kind and size counts whole."""
        if not math.isfinite(ms) or ms < 0:
            return
        sizes = self.known.setdefault(kind, {})
        before = sizes.get(cells)
        sizes[cells] = ms if before is None else before + SHARE * (ms - before)

    def ms(self, kind: str, cells: int) -> float | None:
        """The price of a step or stage; None where nothing says."""
        own = self._scaled(kind, cells)
        if own is not None or kind in STAGES:
            return own
        if not (wanted := _forwards(kind)):
            return 0.0  # a step that computes nothing
        parts = [self._forward(generator, cells) for generator in wanted]
        if any(p is None for p in parts):
            return None
        return sum(p * n for p, n in zip(parts, wanted.values(), strict=True) if p is not None)

    def bound(self, kind: str, cells: int) -> float | None:
        """A price that is rather too high: of a clip larger than any that ran, it grows with the
        square of the cells, as attention's does."""
        ms = self.ms(kind, cells)
        ran = [c for sizes in self.known.values() for c in sizes]
        return ms if not ms else ms * max(1.0, cells / max(ran))

    def _scaled(self, kind: str, cells: int) -> float | None:
        sizes = self.known.get(kind)
        if not sizes:
            return None
        near = min(sizes, key=lambda c: abs(math.log(c / cells)))
        return sizes[near] * cells / near

    def _forward(self, generator: str, cells: int) -> float | None:
        """One forward of a generator, from the kinds that run it alone."""
        prices = []
        for kind in self.known:
            forwards = _forwards(kind)
            if list(forwards) == [generator]:
                scaled = self._scaled(kind, cells)
                assert scaled is not None  # the kind is known
                prices.append(scaled / forwards[generator])
        return min(prices) if prices else None

    def steps(self, request: GenerationRequest) -> list[float | None]:
        """The price of every step of a plan."""
        cells = request.size.cells
        kinds = step_kinds(request)
        known = {kind: self.ms(kind, cells) for kind in set(kinds)}
        return [known[kind] for kind in kinds]

    def learn(self, request: GenerationRequest, perf: Mapping[str, Any]) -> None:
        """What a finished job measured (`Clip.perf`), of a clip by itself."""
        cells = request.size.cells
        rows = {row["step"]: row["duration_ms"] for row in perf["denoise_steps_ms"]}
        for index, kind in enumerate(step_kinds(request)):
            # the first step of a call also prepares
            if index in rows and (index or len(rows) == 1):
                self.observe(kind, cells, rows[index])
        for row in perf["steps"]:
            if row["name"] in STAGES:
                self.observe(row["name"], cells, row["duration_ms"])

    def left(self, request: GenerationRequest) -> list[float] | None:
        """Milliseconds left of a job after 0, 1, ... steps, the first of which is the whole; None
        where a price is not known."""
        cells = request.size.cells
        steps = self.steps(request)
        encode, *rest = (self.ms(stage, cells) for stage in STAGES)
        after = [ms for ms in (*rest, *reversed(steps)) if ms is not None]
        if encode is None or len(after) < len(rest) + len(steps):
            return None
        sums = list(accumulate(after))[len(rest) - 1 :][::-1]
        return [sums[0] + encode, *sums[1:]]

    def total(self, request: GenerationRequest) -> float | None:
        """Milliseconds of a whole job; None where a price is not known."""
        left = self.left(request)
        return None if left is None else left[0]


def units(request: GenerationRequest) -> float:
    """Work where no price is known: forwards, a large one ten small ones, times latent cells."""
    counts = request.plan.evaluations(request.guidance.small, request.guidance.large)
    return (counts["small"] + 10 * counts["large"]) * request.size.cells
