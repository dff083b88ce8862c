"""Which silence of a worker is a hang: bounds from the cost model, and the clock of one call."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from nexus_rt.core.limits import REWRITE_TIMEOUT
from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.serve.prices import STAGES, Prices, step_kinds

FACTOR = 10.0  # of a price
MIN_SECONDS = 60.0  # of a priced step or stage
UNPRICED_SECONDS = 900.0  # without a price, or where kernels are compiled and graphs recorded
UNPRICED_STEPS = 10.0  # of a stage without a price, in step timeouts
MAX_TICK = 1.0  # seconds that count of one look: a server that stood still was not listening


@dataclass(frozen=True)
class Bounds:
    """Seconds that a worker may be silent in a call.

    steps, stages: predicted milliseconds of each step, and of encode, decode and write; None where
        no price is known.
    rewriting: seconds that a rewriter may take for all prompts, in the encode stage.
    step_timeout: of one step, instead of a multiple of its price.
    """

    steps: tuple[float | None, ...]
    stages: dict[str, float | None]
    rewriting: float = REWRITE_TIMEOUT
    step_timeout: float | None = None

    @classmethod
    def of(
        cls,
        prices: Prices,
        request: GenerationRequest,
        batch: int = 1,
        step_timeout: float | None = None,
    ) -> Bounds:
        """The bounds of a call of `batch` clips."""
        cells = request.size.cells
        kinds = step_kinds(request)
        known = {kind: prices.bound(kind, cells) for kind in {*kinds, *STAGES}}
        known = {kind: None if ms is None else batch * ms for kind, ms in known.items()}
        steps = tuple(known[kind] for kind in kinds)
        return cls(steps, {s: known[s] for s in STAGES}, REWRITE_TIMEOUT, step_timeout)

    def step(self, index: int, fresh: bool) -> float:
        """Of a step; fresh: the worker has not made a clip of this kind."""
        if self.step_timeout is not None:
            return self.step_timeout
        return self._priced(self.steps[min(index, len(self.steps) - 1)], fresh)

    def stage(self, name: str, fresh: bool) -> float:
        """Of encode, decode or write."""
        ms = self.stages[name]
        if self.step_timeout is not None:
            priced = UNPRICED_STEPS * self.step_timeout if ms is None else FACTOR * ms / 1000
            return max(self.step_timeout, priced)
        return self._priced(ms, fresh)

    def _priced(self, ms: float | None, fresh: bool) -> float:
        least = UNPRICED_SECONDS if fresh or ms is None else MIN_SECONDS
        return max(least, FACTOR * (ms or 0.0) / 1000)


@dataclass
class Call:
    """A call that a worker runs, from its events.

    ids: of its jobs. waiting: it has no worker yet, whose loading has a bound of its own. fresh:
        the worker has not made a clip of this kind. stage: encode, rewrite, denoise, decode or
        write. silent: seconds since the last event. ending: seconds since all of its jobs were
        cancelled. hung: why its worker counts as hung.
    """

    ids: frozenset[str]
    bounds: Bounds
    waiting: bool = False
    fresh: bool = True
    stage: str = "encode"
    done: int = 0
    silent: float = 0.0
    ending: float | None = None
    hung: str | None = None
    _limit: float = math.inf  # of `ending`
    _cancelled: set[str] = field(default_factory=set)

    @property
    def phase(self) -> str:
        """Where it is, in words."""
        return f"step {self.done + 1}" if self.stage == "denoise" else f"the {self.stage} stage"

    @property
    def limit(self) -> float:
        """Seconds until the next event."""
        if self.stage == "denoise":
            return self.bounds.step(self.done, self.fresh)
        if self.stage == "rewrite":
            return self.bounds.stage("encode", self.fresh) + self.bounds.rewriting
        seconds = self.bounds.stage(self.stage, self.fresh)
        if self.stage == "encode":  # the next event is the first step's
            seconds += self.bounds.step(0, self.fresh)
        return seconds

    def heard(self, event: dict[str, Any]) -> None:
        """An event of the worker."""
        self.silent = 0.0
        kind = event["kind"]
        self.waiting = kind == "waiting"
        if kind == "phase":
            self.stage = event["phase"]
        elif kind == "stage":
            self.stage = event["stage"]
            self.fresh = event.get("fresh", self.fresh)
        elif kind == "step":
            self.done = event["step"]
            self.stage = "denoise" if self.done < len(self.bounds.steps) else "decode"

    def cancel(self, job_id: str) -> bool:
        """A job of it is cancelled; False where it was before."""
        if job_id in self._cancelled:
            return False
        self._cancelled.add(job_id)
        if self._cancelled >= self.ids:
            self.ending, self._limit = 0.0, self.limit
        return True

    def tick(self, seconds: float) -> str | None:
        """Time passes; why the worker counts as hung, once."""
        if self.waiting or self.hung is not None:
            return None
        seconds = min(seconds, MAX_TICK)
        self.silent += seconds
        if self.ending is not None:
            self.ending += seconds
        if self.silent > (limit := self.limit):
            self.hung = f"nothing was heard in {self.phase} for {limit:.4g} s"
        elif self.ending is not None and self.ending > self._limit:
            self.hung = f"it did not stop within {self._limit:.4g} s of its cancellation"
        return self.hung
