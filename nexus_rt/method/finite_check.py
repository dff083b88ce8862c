"""The check that every prediction is finite, without a GPU that waits for it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.devices import Reading, Readings
from nexus_rt.core.errors import NumericsError
from nexus_rt.method.engine import Diagnosable, supports
from nexus_rt.method.step import Step

MAX_UNCHECKED_STEPS = 2  # steps that may be enqueued on a GPU before one is known to be finite


@dataclass
class FiniteCheck:
    """The sums of all predictions, on their way to the host behind the steps that make them, so
    that the GPU need not wait at every step. On a CPU they are there at once.

    engines: by generator, to say what is wrong with their weights.
    """

    engines: Mapping[str, Any]
    readings: Readings = field(default_factory=Readings)
    sums: deque[tuple[Reading, str, Step]] = field(default_factory=deque)

    def add(self, raw: Tensor, name: str, step: Step) -> None:
        """Note a generator's prediction at a step."""
        self.sums.append((self.readings.start(raw.sum(dtype=torch.float32)), name, step))

    def raise_if_bad(self, before: int) -> None:
        """Raise if a prediction before a step was not finite. Looks only at sums already on the
        host, and waits for any older than `MAX_UNCHECKED_STEPS`.

        Raises:
            NumericsError: names the generator, the step and, where its weights are at fault, the
                weights.
        """
        while self.sums and self.sums[0][2].index < before:
            total, _, step = self.sums[0]
            if not (total.ready or step.index < before - MAX_UNCHECKED_STEPS):
                return
            self._settle()

    def wait(self) -> None:
        """Check all predictions.

        Raises:
            NumericsError: as `raise_if_bad`.
        """
        while self.sums:
            self._settle()

    def _settle(self) -> None:
        total, name, step = self.sums.popleft()
        if not math.isfinite(total.value()):
            self._refuse(name, step)

    def _refuse(self, name: str, step: Step) -> None:
        engine = self.engines[name]
        wider = "try a wider dtype (bfloat16 or float32) or a smaller guidance_scale."
        if not supports(engine, Diagnosable):  # exported, or another process's
            cause = f"its weights cannot be looked at here: check the checkpoint, or {wider}"
        elif bad := engine.not_finite():
            names = ", ".join(bad[:3])
            cause = f"its weights hold NaN or infinity in {names}: load an undamaged checkpoint."
        else:
            cause = f"its weights are finite: {wider}"
        raise NumericsError(
            f"the {name} generator's velocity is not finite at step {step.index} (timestep"
            f" {step.timestep}); {cause}",
            param=name,
        )
