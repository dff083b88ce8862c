"""The formulas of a step and of a Wan block that PyTorch's path, the kernels' references and the
exported graphs share; plain PyTorch, no triton."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # beside an RMS that is divided by

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


def rope_angles(
    head_dim: int, grid: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Angles of 3-D RoPE for a grid of (frames, rows, columns) tokens: [L, 1, head_dim / 2].

    Wan gives rows and columns `2*(d//6)` dimensions each and frames the rest, theta 10000. The
    grid's sizes may be symbols of an exported graph; the frequencies are computed in float64.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (size, dim) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        position = torch.arange(size, device=device, dtype=dtype)
        angle = position[:, None] * frequency.to(device, dtype)  # [size, dim / 2]
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(angle.view(shape).expand(*grid, dim // 2))
    return torch.cat(angles, -1).flatten(0, 2).unsqueeze(1)


def rope_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each [L, 1, head_dim]; the sines carry the sign of the rotation (-,
    +, -, +, ...), so that `rotated = x * cos + swap_pairs(x) * sin`."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [..., L, heads, head_dim] by `rope_tables`."""
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.addcmul(x * cos, torch.stack((x1, x0), -1).flatten(-2), sin)


def qk_norm_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, L, heads, head_dim] of a fused projection [B, L, 3 D], RMS-normed over
    all heads and rotated by `rope_tables`."""
    out = []
    for x, weight in zip(qkv.chunk(3, -1), (weight_q, weight_k), strict=False):
        normed = F.rms_norm(x, x.shape[-1:], weight, eps).unflatten(-1, (heads, -1))
        out.append(apply_rope(normed, cos, sin).to(qkv.dtype))
    return out[0], out[1]


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream x + gate y [B, L, D], and its LayerNorm * (1 + scale) + shift, both in x's dtype;
    scale, shift, gate [B, D], float32 inside. Without y the stream is x, without a gate the gate is
    1."""
    if y is not None:
        x = (
            x.float() + y.float()
            if gate is None
            else torch.addcmul(x.float(), y.float(), gate.unsqueeze(1))
        ).to(x.dtype)
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return x, torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1)).to(x.dtype)
