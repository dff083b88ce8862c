"""Classifier-free guidance: the scales of both generators, and the rule of a step's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nexus_rt.plan import Scale, Step

# The paper's code writes v_c + s (v_c - v_u) with s = 5.0; in diffusers' meaning that is g = s + 1
# = 6.0.
GUIDANCE_SCALE = 6.0


def _scale(value: Scale) -> Scale:
    return (float(value[0]), float(value[1])) if isinstance(value, tuple) else float(value)


@dataclass(frozen=True)
class Guidance:
    """Guidance scales of the two generators, `v_u + g (v_c - v_u)`; 1 is none. A generator of
    experts may have two, for high noise and for low."""

    small: Scale
    large: Scale

    @classmethod
    def of(cls, first: Scale, second: Scale | None = None) -> Guidance:
        """`guidance_scale` and `guidance_scale_2`: the large generator's is the first where there
        is no second."""
        return cls(_scale(first), _scale(first if second is None else second))

    @classmethod
    def of_call(cls, defaults: Any, first: Scale | None, second: Scale | None) -> Guidance:
        """A call's scales against a pair's `Defaults`: one that is given is both generators'; none
        is the pair's own."""
        if first is not None:
            return cls.of(first, second)
        return cls.of(
            defaults.guidance_scale, defaults.guidance_scale_2 if second is None else second
        )

    def at(self, step: Step, generator: str) -> float:
        """The scale of "small" or "large" at a step: the plan's own, else the call's."""
        return step.scale(generator, getattr(self, generator))
