"""Classifier-free guidance: the scales of both generators, and velocities that it is applied to as
late as can be.

Guidance and the energy factor are put off until something reads the whole tensor anyway: the fused
kernels apply them as they read, and `tensor()` applies them in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nexus_rt.core.limits import GUIDANCE_SCALE, Scale
from nexus_rt.kernels.formulas import guide
from nexus_rt.method.step import Step


def _scale(value: Scale) -> Scale:
    return (float(value[0]), float(value[1])) if isinstance(value, tuple) else float(value)


@dataclass(frozen=True)
class Guidance:
    """Guidance scales of the two generators, `v_u + g (v_c - v_u)`; 1 is none. A generator of two
    experts may have two, for high noise and for low."""

    small: Scale = GUIDANCE_SCALE
    large: Scale = GUIDANCE_SCALE

    @classmethod
    def of(cls, first: Scale, second: Scale | None = None) -> Guidance:
        """The small generator's scale and the large one's, which is the first where it is None."""
        return cls(_scale(first), _scale(first if second is None else second))

    def at(self, step: Step, generator: str) -> float:
        """The scale of "small" or "large" at a step: the plan's own, else the call's."""
        return step.scale(generator, getattr(self, generator))


@dataclass(frozen=True)
class Prediction:
    """A generator's prediction at a step, [B, C, T, H, W] in its own dtype, and the unconditional
    one where the step is guided."""

    conditional: Tensor
    unconditional: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, raw: Tensor, scale: float) -> Prediction:
        """From an engine's output: [2 B, ...], conditional samples first, where the scale is not
        1."""
        raw = raw.contiguous()  # the kernels read it as it lies
        if scale == 1.0:
            return cls(raw)
        conditional, unconditional = raw.chunk(2)
        return cls(conditional, unconditional, scale)

    def tensor(self) -> Tensor:
        """The guided velocity, float32."""
        return guide(self.conditional, self.unconditional, self.scale)


@dataclass(frozen=True)
class Velocity:
    """What the solver takes: a prediction, and the energy factor it still wants.

    sums [3, B, P]: partial sums of squares of v_S, v_L and the prediction, for `energy` at gate
    `w`; None where there is no factor to apply.
    """

    prediction: Prediction
    sums: Tensor | None = None
    energy: str = "none"
    w: float = 1.0

    def tensor(self) -> Tensor:
        """The velocity, float32 [B, C, T, H, W]."""
        v = self.prediction.tensor()
        if self.sums is None:
            return v
        from nexus_rt.kernels.solver_step import energy_factor

        factor = energy_factor(self.sums, v[0].numel(), self.energy, self.w)
        return v * factor.view(-1, *[1] * (v.ndim - 1))
