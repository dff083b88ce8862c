"""What kernels are held against: formulas in float64, on the device of the run, and their
comparison beside what eager PyTorch loses at the same precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def compare(got: Tensor, wanted: Tensor, eager: Tensor, slack: float = 1e-6) -> dict[str, Any]:
    """Errors against float64 beside what eager PyTorch loses at the same precision; right within
    twice that and a share `slack` of the largest value."""
    error, lost = (float((t.double() - wanted).abs().max()) for t in (got, eager))
    finite = bool(got.isfinite().all())
    scale = float(wanted.abs().max())
    return {
        "error": error,
        "eager_error": lost,
        "right": finite and error <= 2 * lost + slack * max(1.0, scale),
    }


def compare_rows(
    got: tuple[Tensor, Tensor], eager: tuple[Tensor, Tensor], wanted: Tensor
) -> dict[str, Any]:
    """8-bit rows against what they stand for: not much farther than PyTorch's."""
    off = lambda rows: float((rows[0].double() * rows[1].double() - wanted).norm() / wanted.norm())
    error, lost = off(got), off(eager)
    return {"relative_error": error, "eager_error": lost, "right": error <= 1.05 * lost + 1e-3}


def squares(*velocities: Tensor) -> Tensor:
    """Sums of squares of every sample [N, B]."""
    return torch.stack([v.square().flatten(1).sum(1) for v in velocities])


def gelu(y: Tensor) -> Tensor:
    """The tanh form."""
    return 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())


def stencil(v: Tensor, side: float) -> Tensor:
    """The low band of planes by the separable filter (side, 1 - 2 side, side), zeros around."""
    taps = torch.tensor([side, 1 - 2 * side, side], dtype=torch.float64, device=v.device)
    padded = torch.nn.functional.pad(v, (1, 1, 1, 1))
    h, w = v.shape[-2:]
    shifted = [
        taps[i] * taps[j] * padded[..., i : i + h, j : j + w] for i in range(3) for j in range(3)
    ]
    return torch.stack(shifted).sum(0)


def low_pass(x: Tensor, split: str, lowpass: str, cutoff: float) -> Tensor:
    """By torch.fft; a DCT-II is the FFT of the plane continued by its mirror image."""
    h, w = x.shape[-2:]
    if split == "dct":
        x = torch.cat([x, x.flip(-1)], -1)
        x = torch.cat([x, x.flip(-2)], -2)
    rows, columns = (
        2 * torch.fft.fftfreq(n, dtype=torch.float64, device=x.device).abs() for n in x.shape[-2:]
    )
    rho = torch.hypot(rows[:, None], columns[None]) / cutoff
    gain = 2.0 ** (-(rho**2) / 2) if lowpass == "gaussian" else 1 / (1 + rho**4).sqrt()
    return torch.fft.ifft2(torch.fft.fft2(x) * gain).real[..., :h, :w]


def solver_step(
    x: Tensor,
    v: Tensor,
    sums: Tensor,
    w: float,
    scalars: list[float],
    last: Tensor,
    m1: Tensor,
    m2: Tensor,
) -> Tensor:
    """Progressive energy, corrector and predictor as `nexus_rt.kernels.solver_step` writes them."""
    small, large, blended = (sums / v[0].numel()).sqrt()
    factor = (w * small + (1 - w) * large) / (blended + 1e-6)
    sigma, c, p = scalars[0], scalars[1:5], scalars[5:]
    clean = x.double() - sigma * factor.view(-1, 1, 1, 1, 1) * v.double()
    corrected = c[0] * last.double() + c[1] * clean + c[2] * m1.double() + c[3] * m2.double()
    return p[0] * corrected + p[1] * clean + p[2] * m1.double()


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * (1 + scale.double()[:, None]) + shift.double()[
        :, None
    ]


def norm_rope(x: Tensor, weight: Tensor, angle: Tensor, heads: int) -> Tensor:
    n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    z = torch.view_as_complex(n.unflatten(-1, (heads, -1, 2)).contiguous())
    turn = torch.complex(angle.cos().double(), angle.sin().double())
    return torch.view_as_real(z * turn[:, None]).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    score = q @ k.mT / math.sqrt(q.shape[-1])
    score = score if bias is None else score + bias.double()[:, None, None]
    return (score.softmax(-1) @ v).transpose(1, 2)
