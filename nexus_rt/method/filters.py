"""The low-pass filters of the splits, as a few matrix products on both sides of a plane.

Two products where the filter is separable, four (there, a gain, and back) where it is not. Planes
are [..., H, W]; rho is the radial frequency as a fraction of Nyquist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nexus_rt.core.devices import hold, send
from nexus_rt.method.blend_config import BlendConfig

GAINS = {  # at rho / cutoff
    "gaussian": lambda ratio, order: torch.exp(-0.5 * math.log(2) * ratio**2),
    "butterworth": lambda ratio, order: 1 / torch.sqrt(1 + ratio ** (2 * order)),
    "ideal": lambda ratio, order: (ratio <= 1).to(ratio.dtype),
}


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
    return GAINS[lowpass](rho / cutoff, order)


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


def filter_at(w: float, config: BlendConfig, v: Tensor) -> Filter:
    """The low-pass at weight w for planes like `v`'s, held while a graph that reads it lives."""
    cutoff = config.sigma(w) if config.split == "gaussian" else config.cutoff(w)
    size = v.shape[-2:]
    return hold(split_filter(*size, config.split, config.lowpass, config.order, cutoff, v.device))


def filtered(v: Tensor, w: float, config: BlendConfig, *, keep: float, low: float) -> Tensor:
    """`keep * v + low * LF(v)` of each plane: two or four matrix products, the first factor riding
    along in the last."""
    f = filter_at(w, config, v)
    planes = v.reshape(-1, *v.shape[-2:])
    left = f.left.expand(len(planes), -1, -1)
    y = planes @ f.right
    if f.gain is not None:
        y = torch.bmm(left, y).mul_(f.gain) @ f.right.T
        left = left.mT
    return torch.baddbmm(planes, left, y, beta=keep, alpha=low).view_as(v)
