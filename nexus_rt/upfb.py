"""The frequency-banded blend of two generators' velocities: Unified Progressive Frequency Bridging.

Lumos-Nexus (arXiv 2605.31603) blends low and high bands of both velocities with a 3x3 Gaussian.
Expanded, the large generator is never filtered: `u = (1-w) v_L + w (g v_S + (1-g) LF(v_S))` with
g = gamma_hf, one filter on one tensor. The `fft` and `dct` splits are this runtime's progressive
frequency handoff: one share per spatial frequency, `a(rho) = w [LP(rho) + g (1 - LP(rho))]`,
`u = v_L + F^-1{a . F{v_S - v_L}}`. Every one of these filters is a few matrix products on both
sides of a plane: two where it is separable, four (there, a gain, and back) where it is not.

Velocities are float32 [B, C, T, H, W]; RMS is per sample over C, T, H, W; filters act on each H x W
plane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nexus_rt.block_ops import choose_ops
from nexus_rt.checks import instance, number, whole
from nexus_rt.devices import hold, send
from nexus_rt.errors import InputError, choose
from nexus_rt.kernels.formulas import ENERGIES, EPS, target_energy
from nexus_rt.velocity import Prediction, Velocity

SPLITS = ("gaussian", "fft", "dct")
LOWPASSES = {  # gain at rho / cutoff
    "gaussian": lambda ratio, order: torch.exp(-0.5 * math.log(2) * ratio**2),
    "butterworth": lambda ratio, order: 1 / torch.sqrt(1 + ratio ** (2 * order)),
    "ideal": lambda ratio, order: (ratio <= 1).to(ratio.dtype),
}

MAX_WIDTH, MAX_ORDER = 1e6, 100  # of sigma_max and rho_max, and of Butterworth's order


@dataclass(frozen=True)
class BlendConfig:
    """How velocities are split and shared.

    split: "gaussian" is the published one; "fft" (circular) and "dct" (even reflection) the
        progressive handoff.
    lowpass, order, rho_min, rho_max: of "fft" and "dct"; all low-passes have gain 1/sqrt(2) at
        their cutoff (the ideal one drops from 1 to 0 there); rho is the radial frequency as a
        fraction of Nyquist; order is Butterworth's.
    sigma_min, sigma_max: of "gaussian", in latent cells. gamma_hf: the small generator's share of
        high frequencies.
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
        for name in ("gamma_hf", "sigma_min", "sigma_max", "rho_min", "rho_max"):
            object.__setattr__(self, name, number(name, getattr(self, name), -MAX_WIDTH, MAX_WIDTH))
        object.__setattr__(self, "order", whole("order", self.order, 1, MAX_ORDER))
        if not 0 <= self.gamma_hf <= 1:
            raise InputError(f"gamma_hf is {self.gamma_hf}; expected a share between 0 and 1.")
        if not 0 < self.sigma_min <= self.sigma_max or not 0 < self.rho_min <= self.rho_max:
            raise InputError(
                "sigma_min and rho_min must be positive and not above sigma_max and rho_max."
            )

    def sigma(self, w: float) -> float:
        """Standard deviation of the Gaussian at gate w, in latent cells."""
        return self.sigma_min + (self.sigma_max - self.sigma_min) * w

    def cutoff(self, w: float) -> float:
        """Cutoff of the fft and dct splits at gate w, as a fraction of Nyquist; it closes as the
        handoff proceeds."""
        return self.rho_min + (self.rho_max - self.rho_min) * w


def gaussian_taps(height: int, width: int, sigma: float) -> Tensor:
    """Normalised 1-D Gaussian of the published size: `max(3, 2*floor(sqrt(H W)/1024)+1)` taps,
    float64."""
    size = max(3, 2 * math.floor(math.sqrt(height * width) / 1024) + 1)
    x = torch.arange(size, dtype=torch.float64) - size // 2
    taps = torch.exp(-0.5 * (x / sigma) ** 2)
    return taps / taps.sum()


def lowpass_gain(rho: Tensor, cutoff: float, lowpass: str, order: int) -> Tensor:
    """Gain LP(rho; cutoff) of a low-pass family at radial frequencies rho (fractions of Nyquist),
    float64."""
    return LOWPASSES[lowpass](rho / cutoff, order)


@dataclass(frozen=True)
class Filter:
    """The low-pass of a split on planes X [H, W], as matrices, float32.

    LF(X) = left X right where it is separable (gain is None): the gaussian split, the Gaussian
    low-pass. Any other is diagonal in its transform: LF(X) = left^T (gain * (left X right))
    right^T, of whatever rank the gain is, and two steps of a plan differ in the gain alone.
    """

    left: Tensor
    right: Tensor
    gain: Tensor | None = None


@lru_cache(maxsize=16)
def _basis(size: int, split: str) -> tuple[Tensor, Tensor]:
    """Frequencies [size] as fractions of Nyquist and an orthonormal real basis [size, size], a row
    each, float64.

    dct: DCT-II. fft: cosines and sines of the Fourier series; a real even filter has one gain for
        both.
    """
    k = torch.arange(size, dtype=torch.float64)
    if split == "dct":
        basis = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / size) * math.sqrt(2 / size)
        basis[0] /= math.sqrt(2)
        return k / size, basis
    wave = torch.minimum(k, size - k)  # rows past the middle are the sines of the rows before it
    angle = 2 * math.pi * wave[:, None] * k[None] / size
    basis = torch.where((k <= size // 2)[:, None], torch.cos(angle), torch.sin(angle)) * math.sqrt(
        2 / size
    )
    basis[(wave == 0) | (2 * wave == size)] /= math.sqrt(2)
    return 2 * wave / size, basis


@lru_cache(maxsize=512)
def split_filter(
    height: int,
    width: int,
    split: str,
    lowpass: str,
    order: int,
    cutoff: float,
    device: torch.device,
) -> Filter:
    """The low-pass of a split for planes of a size; `cutoff` is sigma for the gaussian split."""
    if split == "gaussian":
        taps = gaussian_taps(height, width, cutoff)
        return Filter(*(send(_band(size, taps).float(), device) for size in (height, width)))
    (fy, rows), (fx, columns) = _basis(height, split), _basis(width, split)
    if lowpass == "gaussian":
        left, right = (
            b.T @ (lowpass_gain(f, cutoff, lowpass, order)[:, None] * b)
            for f, b in ((fy, rows), (fx, columns))
        )
        return Filter(send(left.float(), device), send(right.float(), device))
    gain = lowpass_gain(torch.hypot(fy[:, None], fx[None]), cutoff, lowpass, order)
    return Filter(*_transform(height, width, split, device), send(gain.float(), device))


@lru_cache(maxsize=16)
def _transform(height: int, width: int, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The matrices that take planes to frequencies, one copy for every cutoff."""
    rows, columns = _basis(height, split)[1], _basis(width, split)[1]
    return send(rows.float(), device), send(columns.T.float().contiguous(), device)


def _band(size: int, taps: Tensor) -> Tensor:
    """The zero-padded 1-D convolution by symmetric taps as a banded matrix [size, size]."""
    offset = torch.arange(size)[:, None] - torch.arange(size)[None] + taps.numel() // 2
    inside = (offset >= 0) & (offset < taps.numel())
    return torch.where(inside, taps[offset.clamp(0, taps.numel() - 1)], 0.0)


def _filter_at(w: float, config: BlendConfig, v: Tensor) -> Filter:
    cutoff = config.sigma(w) if config.split == "gaussian" else config.cutoff(w)
    size = v.shape[-2:]
    return hold(split_filter(*size, config.split, config.lowpass, config.order, cutoff, v.device))


def _filtered(v: Tensor, w: float, config: BlendConfig, low: float, keep: float) -> Tensor:
    """`keep * v + low * LF(v)` of each plane: two or four matrix products, the first factor riding
    along in the last."""
    f = _filter_at(w, config, v)
    planes = v.reshape(-1, *v.shape[-2:])
    left = f.left.expand(len(planes), -1, -1)
    y = planes @ f.right
    if f.gain is not None:
        y = torch.bmm(left, y).mul_(f.gain) @ f.right.T
        left = left.mT
    return torch.baddbmm(planes, left, y, beta=keep, alpha=low).view_as(v)


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

    The rules are `nexus_rt.kernels.formulas.target_energy`'s; `progressive` needs nothing of an
    absent generator.
    """
    sizes = [rms(v) for v in (v_small, v_large) if v is not None]
    if len(sizes) == 1 and energy != "reference":
        return sizes[0]
    small, large = sizes
    return target_energy(small, large, w, energy)


def combine(
    small: Prediction | None,
    large: Prediction | None,
    w: float,
    config: BlendConfig = BlendConfig(),
    energy: str = "reference",
    fused: bool = False,
) -> Velocity:
    """The blend of two predictions, guidance included; arguments and errors as `blend`.

    Args:
        fused: one Triton launch, and the energy factor left to the solver's; else PyTorch.
    """
    choose("energy", energy, ENERGIES)
    if not 0 <= w <= 1:
        raise InputError(f"w is {w}; the small generator's weight lies between 0 and 1.")
    lone = (small is None) + (large is None)
    if lone == 2 or (small is None and w != 0) or (large is None and w != 1):
        raise InputError(
            f"at w={w} the blend needs the velocity that is missing; leave one out only where it"
            " has no share."
        )
    if lone and energy == "reference":
        raise InputError(
            "energy 'reference' needs both velocities; use 'progressive' where one generator runs"
            " alone."
        )
    shapes = [tuple(p.conditional.shape) for p in (small, large) if p is not None]
    if len(set(shapes)) > 1:
        raise InputError(
            f"velocities have shapes {shapes[0]} and {shapes[1]}; expected equal ones."
        )
    if large is not None and (small is None or (w == 0 and energy != "reference")):
        return Velocity(large)
    assert small is not None  # at least one was given
    if large is None and config.split != "gaussian":
        return Velocity(small)
    return (_combine_triton if fused else _combine_torch)(small, large, w, config, energy)


def _combine_torch(
    small: Prediction, large: Prediction | None, w: float, config: BlendConfig, energy: str
) -> Velocity:
    gaussian, gamma = config.split == "gaussian", config.gamma_hf
    v_small, v_large = small.tensor(), None if large is None else large.tensor()
    x = v_small if gaussian or v_large is None else v_small - v_large
    u = _filtered(x.contiguous(), w, config, w * (1 - gamma), w * gamma)
    if v_large is not None:
        u.add_(v_large, alpha=1 - w if gaussian else 1.0)
    if energy != "none":
        u.mul_(target_rms(v_small, v_large, w, energy) / (rms(u) + EPS))
    return Velocity(Prediction(u))


def _combine_triton(
    small: Prediction, large: Prediction | None, w: float, config: BlendConfig, energy: str
) -> Velocity:
    from nexus_rt.kernels.band_blend import band_blend
    from nexus_rt.kernels.band_filter import band_filter

    scales, gamma = (small.scale, 1.0 if large is None else large.scale), config.gamma_hf
    if config.split == "gaussian":
        height, width = small.conditional.shape[-2:]
        taps = gaussian_taps(height, width, config.sigma(w))
        if len(taps) != 3:
            raise InputError(
                f"the Triton blend has a 3 x 3 stencil, and these planes need {len(taps)} taps; use"
                " kernels='torch'."
            )
        other, other_u = (None, None) if large is None else (large.conditional, large.unconditional)
        args = scales, 1 - w, w * gamma, w * (1 - gamma), float(taps[0])
        u, sums = band_blend(small.conditional, small.unconditional, other, other_u, *args)
    else:
        f = _filter_at(w, config, small.conditional)
        assert large is not None  # without it, `combine` leaves the small velocity as it is
        both = small.conditional, small.unconditional, large.conditional, large.unconditional
        u, sums = band_filter(*both, scales, w * gamma, w * (1 - gamma), f.left, f.right, f.gain)
    return Velocity(Prediction(u), None if energy == "none" else sums, energy, w)


def blend(
    v_small: Tensor | None,
    v_large: Tensor | None,
    w: float,
    config: BlendConfig = BlendConfig(),
    energy: str = "reference",
    kernels: str = "auto",
) -> Tensor:
    """Blend two guided velocities at gate w.

    Args:
        v_small, v_large: [B, C, T, H, W], any floating dtype, computed in float32. One may be None
            where the other has all the weight: `v_large` at w = 1, `v_small` at w = 0. At w = 1 the
            gaussian split needs only `v_small` and is applied; fft and dct hand part of the high
            band to the large generator, and where it is absent the small one keeps it.
        w: the small generator's weight, 0 to 1.
        energy: "reference", "progressive" or "none".
        kernels: "torch", "triton", or "auto": triton on a GPU that can run it.

    Returns:
        The blended velocity, float32 [B, C, T, H, W], a tensor of its own.

    Raises:
        InputError: shapes differ, w outside 0..1, an unknown energy, or a generator missing that
            the blend needs.
    """
    for name, velocity in (("v_small", v_small), ("v_large", v_large)):
        if velocity is not None:
            kind = instance(name, velocity, Tensor, "a tensor [B, C, T, H, W], or None").dtype
            if velocity.ndim != 5 or not kind.is_floating_point:
                raise InputError(
                    f"{name} is {list(velocity.shape)} of {kind}; expected a floating-point tensor"
                    " [B, C, T, H, W]."
                )
    if v_small is not None and v_large is not None and v_small.device != v_large.device:
        raise InputError(
            f"v_small is on {v_small.device} and v_large on {v_large.device}; expected one device."
        )
    number("w", w, -MAX_WIDTH, MAX_WIDTH)
    instance("config", config, BlendConfig, "a BlendConfig")
    choose("energy", energy, ENERGIES)
    single = lambda v: v.float() if v.dtype == torch.float64 else v
    small, large = (
        None if v is None else Prediction.of(single(v), 1.0) for v in (v_small, v_large)
    )
    given = next((v for v in (v_small, v_large) if v is not None), None)
    fused = given is not None and choose_ops(kernels, given.device).name == "triton"
    u = combine(small, large, w, config, energy, fused).tensor()
    return u.clone() if u is v_small or u is v_large else u
