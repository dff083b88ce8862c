"""The step's formulas that PyTorch's path, the kernels' references and the exported graphs share;
plain PyTorch, no triton."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

EPS = 1e-6  # beside an RMS that is divided by
ENERGIES = ("none", "reference", "progressive")  # the kernels know a rule by its place

Size = TypeVar("Size", Tensor, float)


def guide(conditional: Tensor, unconditional: Tensor | None, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance `v_u + scale (v_c - v_u)` in float32: diffusers' meaning of
    `guidance_scale`."""
    conditional = conditional.float()
    return (
        conditional
        if unconditional is None
        else torch.lerp(unconditional.float(), conditional, scale)
    )


def target_energy(small: Size, large: Size, w: float, energy: str) -> Size:
    """The RMS that a blend is scaled to, given both velocities' own.

    `reference`: `(s + l s / (l + eps)) / 2`, the published rule, which pulls every step to the
    small generator's. `progressive`: `w s + (1 - w) l`.
    """
    if energy == "reference":
        return (small + large * small / (large + EPS)) / 2
    return w * small + (1 - w) * large
