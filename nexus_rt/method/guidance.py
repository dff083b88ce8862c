"""Classifier-free guidance: the scales of both generators, and the rule of a step's own."""

from __future__ import annotations

from dataclasses import dataclass

from nexus_rt.limits import GUIDANCE_SCALE, Scale
from nexus_rt.plan import Step


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
