"""The frequency-banded blend of two generators' velocities: Unified Progressive Frequency Bridging.

Lumos-Nexus (arXiv 2605.31603) blends low and high bands of both velocities with a 3x3 Gaussian. Expanded, the large
generator is never filtered: `u = (1-w) v_L + w (g v_S + (1-g) LF(v_S))` with g = gamma_hf, one filter on one tensor.
The `fft` and `dct` splits are this runtime's progressive frequency handoff: one share per spatial frequency,
`a(rho) = w [LP(rho) + g (1 - LP(rho))]`, `u = v_L + F^-1{a . F{v_S - v_L}}`. Every one of these filters is a short
sum of two-sided matrix products `A_r X B_r^T`, so no transform and no convolution is taken at run time.

Velocities are float32 [B, C, T, H, W]; RMS is per sample over C, T, H, W; filters act on each H x W plane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_rt.errors import InputError, choose

SPLITS = ("gaussian", "fft", "dct")
LOWPASSES = ("gaussian", "butterworth", "ideal")
ENERGIES = ("reference", "progressive", "none")
EPS = 1e-6
RANK_TOLERANCE = 1e-7  # of the largest singular value: below float32's own rounding


@dataclass(frozen=True)
class BlendConfig:
    """How velocities are split and shared.

    split: "gaussian" is the published one; "fft" (circular) and "dct" (even reflection) the progressive handoff.
    lowpass, order, rho_min, rho_max: of "fft" and "dct"; all low-passes have gain 1/sqrt(2) at their cutoff (the ideal
        one drops from 1 to 0 there); rho is the radial frequency as a fraction of Nyquist; order is Butterworth's.
    sigma_min, sigma_max: of "gaussian", in latent cells. gamma_hf: the small generator's share of high frequencies.
    """

    split: str = "gaussian"
    lowpass: str = "gaussian"
    order: int = 2
    gamma_hf: float = 0.7
    sigma_min: float = 0.35
    sigma_max: float = 0.7
    rho_min: float = 0.1
    rho_max: float = 0.9

    def __post_init__(self) -> None:
        choose("split", self.split, SPLITS)
        choose("lowpass", self.lowpass, LOWPASSES)
        if not 0 <= self.gamma_hf <= 1:
            raise InputError(f"gamma_hf is {self.gamma_hf}; expected a share between 0 and 1.")
        if not 0 < self.sigma_min <= self.sigma_max or not 0 < self.rho_min <= self.rho_max:
            raise InputError("sigma_min and rho_min must be positive and not above sigma_max and rho_max.")
        if self.order < 1:
            raise InputError(f"order is {self.order}; a Butterworth low-pass has order 1 or more.")

    def sigma(self, w: float) -> float:
        """Standard deviation of the Gaussian at gate w, in latent cells."""
        return self.sigma_min + (self.sigma_max - self.sigma_min) * w

    def cutoff(self, w: float) -> float:
        """Cutoff of the fft and dct splits at gate w, as a fraction of Nyquist; it closes as the handoff proceeds."""
        return self.rho_min + (self.rho_max - self.rho_min) * w


def gaussian_taps(height: int, width: int, sigma: float) -> Tensor:
    """Normalised 1-D Gaussian of the published size: `max(3, 2*floor(sqrt(H W)/1024)+1)` taps, float64."""
    size = max(3, 2 * math.floor(math.sqrt(height * width) / 1024) + 1)
    x = torch.arange(size, dtype=torch.float64) - size // 2
    taps = torch.exp(-0.5 * (x / sigma) ** 2)
    return taps / taps.sum()


def lowpass_gain(rho: Tensor, cutoff: float, lowpass: str, order: int) -> Tensor:
    """Gain LP(rho; cutoff) of a low-pass family at radial frequencies rho (fractions of Nyquist), float64."""
    ratio = rho / cutoff
    if lowpass == "gaussian":
        return torch.exp(-0.5 * math.log(2) * ratio**2)
    if lowpass == "butterworth":
        return 1 / torch.sqrt(1 + ratio ** (2 * order))
    return (ratio <= 1).to(rho.dtype)


def _basis(size: int, split: str) -> tuple[Tensor, Tensor]:
    """Frequencies [K] as fractions of Nyquist and projectors [K, size, size] onto each, float64.

    fft: a frequency and its mirror image share one real projector; dct: DCT-II basis vectors (orthonormal).
    """
    n = torch.arange(size, dtype=torch.float64)
    if split == "dct":
        k = torch.arange(size, dtype=torch.float64)
        basis = torch.cos(math.pi * (n[None] + 0.5) * k[:, None] / size) * math.sqrt(2 / size)
        basis[0] /= math.sqrt(2)
        return k / size, basis[:, :, None] * basis[:, None, :]
    k = torch.arange(size // 2 + 1, dtype=torch.float64)
    twice = torch.where((k == 0) | (2 * k == size), 1.0, 2.0).double()
    angle = 2 * math.pi * k[:, None, None] * (n[:, None] - n[None, :]) / size
    return 2 * k / size, twice[:, None, None] / size * torch.cos(angle)


@lru_cache(maxsize=512)
def filter_matrices(
    height: int, width: int, split: str, lowpass: str, order: int, cutoff: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The low-pass of a split as matrices: `LF(X) = sum_r A_r X B_r^T`; `cutoff` is sigma for the gaussian split.

    Returns A [H, R*H] (the A_r side by side) and B [R*W, W] (the B_r on top of each other), float32; R is 1 where the
    filter is separable (gaussian split, Gaussian low-pass), about 10 for Butterworth.
    """
    if split == "gaussian":
        taps = gaussian_taps(height, width, cutoff)
        a, b = (_band(size, taps) for size in (height, width))
        return a.float().to(device), b.float().to(device)
    fy, py = _basis(height, split)
    fx, px = _basis(width, split)
    if lowpass == "gaussian":
        left = lowpass_gain(fy, cutoff, lowpass, order)[None]
        right = lowpass_gain(fx, cutoff, lowpass, order)[None]
    else:
        gain = lowpass_gain(torch.hypot(fy[:, None], fx[None]), cutoff, lowpass, order)
        u, s, v = torch.linalg.svd(gain, full_matrices=False)
        rank = int((s > RANK_TOLERANCE * s[0]).sum()) if s[0] > 0 else 1
        left, right = (u[:, :rank] * s[:rank]).T, v[:rank]
    a = torch.einsum("rk,kij->irj", left, py).reshape(height, -1)
    b = torch.einsum("rk,kij->rij", right, px).reshape(-1, width)
    return a.float().to(device), b.float().to(device)


def _band(size: int, taps: Tensor) -> Tensor:
    """The zero-padded 1-D convolution by symmetric taps as a banded matrix [size, size]."""
    offset = torch.arange(size)[:, None] - torch.arange(size)[None] + taps.numel() // 2
    inside = (offset >= 0) & (offset < taps.numel())
    return torch.where(inside, taps[offset.clamp(0, taps.numel() - 1)], 0.0)


def _filtered(v: Tensor, w: float, config: BlendConfig, low: float, keep: float) -> Tensor:
    """`keep * v + low * LF(v)` of each plane: two matrix products, the first factor riding along in the second."""
    height, width = v.shape[-2:]
    cutoff = config.sigma(w) if config.split == "gaussian" else config.cutoff(w)
    a, b = filter_matrices(height, width, config.split, config.lowpass, config.order, cutoff, v.device)
    rank, planes = b.shape[0] // width, v.reshape(-1, height, width)
    right = F.linear(planes, b)  # [N, H, R*W]: X B_r^T for every r
    if rank > 1:
        right = right.unflatten(-1, (rank, width)).transpose(1, 2).flatten(1, 2)  # [N, R*H, W]
    return torch.baddbmm(planes, a.expand(len(planes), -1, -1), right, beta=keep, alpha=low).view_as(v)


def low_frequencies(v: Tensor, w: float, config: BlendConfig) -> Tensor:
    """The low band LF(v) of the split at gate w: [..., H, W] to the same shape, float32."""
    return _filtered(v.float().contiguous(), w, config, 1.0, 0.0)


def rms(v: Tensor) -> Tensor:
    """Root mean square of each sample: [B, ...] -> [B, 1, 1, ...], float32."""
    flat = v.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
    return (norm / math.sqrt(flat.shape[1])).view(-1, *[1] * (v.ndim - 1))


def target_rms(v_small: Tensor | None, v_large: Tensor | None, w: float, energy: str) -> Tensor:
    """The RMS a blended velocity is scaled to, per sample.

    `reference`: `(rms(v_S) + rms(v_L rms(v_S)/(rms(v_L)+eps))) / 2`, the published rule, which pulls every step to the
    small generator's. `progressive`: `w rms(v_S) + (1-w) rms(v_L)`, which needs nothing of an absent generator.
    """
    if energy == "reference":
        small, large = rms(v_small), rms(v_large)
        return (small + large * small / (large + EPS)) / 2
    if v_large is None:
        return rms(v_small)
    if v_small is None:
        return rms(v_large)
    return w * rms(v_small) + (1 - w) * rms(v_large)


def blend(
    v_small: Tensor | None,
    v_large: Tensor | None,
    w: float,
    config: BlendConfig = BlendConfig(),
    energy: str = "reference",
) -> Tensor:
    """Blend two guided velocities at gate w.

    Args:
        v_small, v_large: [B, C, T, H, W], any floating dtype, computed in float32. One may be None where the other has
            all the weight: `v_large` at w = 1, `v_small` at w = 0. At w = 1 the gaussian split needs only `v_small`
            and is applied; fft and dct hand part of the high band to the large generator, and where it is absent the
            small one keeps it.
        w: the small generator's weight, 0 to 1.
        energy: "reference", "progressive" or "none".

    Returns:
        The blended velocity, float32 [B, C, T, H, W].

    Raises:
        InputError: shapes differ, w outside 0..1, an unknown energy, or a generator missing that the blend needs.
    """
    choose("energy", energy, ENERGIES)
    if not 0 <= w <= 1:
        raise InputError(f"w is {w}; the small generator's weight lies between 0 and 1.")
    lone = (v_small is None) + (v_large is None)
    if lone == 2 or (v_small is None and w != 0) or (v_large is None and w != 1):
        raise InputError(f"at w={w} the blend needs the velocity that is missing; leave one out only where it has no share.")
    if lone and energy == "reference":
        raise InputError("energy 'reference' needs both velocities; use 'progressive' where one generator runs alone.")
    if not lone and v_small.shape != v_large.shape:
        raise InputError(f"velocities have shapes {tuple(v_small.shape)} and {tuple(v_large.shape)}; expected equal ones.")
    v_small, v_large = (v if v is None else v.float() for v in (v_small, v_large))
    if v_small is None or (w == 0 and energy != "reference"):
        return v_large.clone()
    if v_large is None and config.split != "gaussian":
        return v_small.clone()
    gamma = config.gamma_hf
    x = v_small if config.split == "gaussian" else v_small - v_large
    u = _filtered(x.contiguous(), w, config, w * (1 - gamma), w * gamma)
    if v_large is not None:
        u.add_(v_large, alpha=1 - w if config.split == "gaussian" else 1.0)
    if energy == "none":
        return u
    return u.mul_(target_rms(v_small, v_large, w, energy) / (rms(u) + EPS))


def guide(conditional: Tensor, unconditional: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance `v_u + scale (v_c - v_u)` in float32: diffusers' meaning of `guidance_scale`."""
    conditional = conditional.float()
    return conditional if unconditional is None else torch.lerp(unconditional.float(), conditional, scale)
