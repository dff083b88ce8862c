"""Unified Progressive Frequency Bridging: two generators' velocities blended in frequency bands.

Lumos-Nexus, arXiv 2605.31603. The symbols, once:

    v_S, v_L   guided velocities of the small and the large generator, [B, C, T, H, W], float32
    w          the small generator's weight at a step: 1 at the first step, 0 at the last (`gate`)
    LF, HF     low and high band of a velocity, LF by a filter on each H x W plane, HF = v - LF
    g          gamma_hf: how much of its high band the small generator keeps
    u          the blend, before its energy is set

`published_blend` is the formula as written: both bands of both velocities. Expanded, the large
generator is never filtered, `u = (1-w) v_L + w (g v_S + (1-g) LF(v_S))`: `combine` computes this
form, one filter on one tensor. The splits `fft` and `dct` are this runtime's progressive frequency
handoff: what the small generator gives up of a frequency the large one takes, so that
`u = v_L + w (g x + (1-g) LF(x))` with x = v_S - v_L, and the filter's cutoff closes as w falls.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nexus_rt.core.checks import instance, number
from nexus_rt.core.errors import InputError, choose
from nexus_rt.core.limits import ENERGIES, GAMMA_W, TRAIN_STEPS
from nexus_rt.kernels.formulas import EPS, target_energy
from nexus_rt.method.blend_config import MAX_WIDTH, BlendConfig
from nexus_rt.method.filters import filter_at, filtered, gaussian_taps
from nexus_rt.method.guidance import Prediction, Velocity
from nexus_rt.ops.block_ops import choose_ops


def gate(timestep: float, gamma_w: float = GAMMA_W) -> float:
    """The small generator's weight `w(t) = (1 + cos(pi (1 - tau)^gamma_w)) / 2`, tau = t/999: 1 at
    t=999, 0 at t=0.

    Raises:
        InputError: no numbers of their ranges.
    """
    number("timestep", timestep, -1e9, 1e9)
    number("gamma_w", gamma_w, 1e-9, 1e9)
    tau = min(max(timestep / (TRAIN_STEPS - 1), 0.0), 1.0)
    return (1 + math.cos(math.pi * (1 - tau) ** gamma_w)) / 2


def published_blend(
    v_small: Tensor, v_large: Tensor, w: float, config: BlendConfig, energy: str = "reference"
) -> Tensor:
    """The blend as the paper writes it, band by band: four filtered tensors and the energy.

    Of the splits `fft` and `dct` likewise, where the large generator's high band gets what the
    small one leaves. The reference of `combine`; bands in float32.
    """
    g = config.gamma_hf
    low_small, low_large = (low_frequencies(v, w, config) for v in (v_small, v_large))
    high_small, high_large = v_small - low_small, v_large - low_large
    left_to_large = 1 - w if config.split == "gaussian" else 1 - g * w
    u = (w * low_small + (1 - w) * low_large) + (left_to_large * high_large + g * w * high_small)
    if energy == "none":
        return u
    return u * (target_rms(v_small, v_large, w, energy) / (rms(u) + EPS))


class Shares(NamedTuple):
    """The factors of the one-filter form `u = large v_L + keep x + low LF(x)`: x is v_S under the
    split `gaussian`, and v_S - v_L under `fft` and `dct`."""

    large: float
    keep: float
    low: float


def shares(w: float, config: BlendConfig) -> Shares:
    """The factors at weight w."""
    g = config.gamma_hf
    return Shares(1 - w if config.split == "gaussian" else 1.0, w * g, w * (1 - g))


def low_frequencies(v: Tensor, w: float, config: BlendConfig) -> Tensor:
    """The low band LF(v) of the split at weight w: [..., H, W] to the same shape, float32."""
    return filtered(v.float().contiguous(), w, config, keep=0.0, low=1.0)


def rms(v: Tensor) -> Tensor:
    """Root mean square of each sample, over C, T, H and W: [B, ...] -> [B, 1, 1, ...], at least
    float32."""
    flat = v.flatten(1)
    dtype = torch.promote_types(v.dtype, torch.float32)
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return (norm / math.sqrt(flat.shape[1])).view(-1, *[1] * (v.ndim - 1))


def target_rms(v_small: Tensor | None, v_large: Tensor | None, w: float, energy: str) -> Tensor:
    """The RMS that a blend is scaled to, per sample.

    The blend shrinks the high band, and averaging two velocities loses energy; the scale makes up
    for both. `reference`: the published rule, nearly the small generator's RMS at every step.
    `progressive`: `w rms(v_S) + (1 - w) rms(v_L)`, so that a step where one generator runs alone
    needs nothing of the other. (`nexus_rt.kernels.formulas.target_energy`.)
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
    config: BlendConfig = BlendConfig(),  # noqa: B008 (frozen)
    energy: str = "reference",
    *,
    use_triton: bool = False,
) -> Velocity:
    """The blend of two predictions, guidance included.

    Args:
        small, large, w, config, energy: as `blend` has them.
        use_triton: one launch, whose energy factor the solver's kernel applies as it reads the
            blend; else PyTorch.

    Raises:
        InputError: as `blend`.
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
    # Energy "reference" rescales a lone large velocity too: it ends at the small one's RMS.
    if large is not None and (small is None or (w == 0 and energy != "reference")):
        return Velocity(large)
    assert small is not None  # at least one was given
    # The published split filters the small velocity even where the large one has no share.
    if large is None and config.split != "gaussian":
        return Velocity(small)
    return (_combine_triton if use_triton else _combine_torch)(small, large, w, config, energy)


def _combine_torch(
    small: Prediction, large: Prediction | None, w: float, config: BlendConfig, energy: str
) -> Velocity:
    v_small, v_large = small.tensor(), None if large is None else large.tensor()
    share = shares(w, config)
    x = v_small if config.split == "gaussian" or v_large is None else v_small - v_large
    u = filtered(x.contiguous(), w, config, keep=share.keep, low=share.low)
    if v_large is not None:
        u.add_(v_large, alpha=share.large)
    if energy != "none":
        u.mul_(target_rms(v_small, v_large, w, energy) / (rms(u) + EPS))
    return Velocity(Prediction(u))


def _combine_triton(
    small: Prediction, large: Prediction | None, w: float, config: BlendConfig, energy: str
) -> Velocity:
    from nexus_rt.kernels.band_blend import band_blend
    from nexus_rt.kernels.band_filter import band_filter

    scales, share = (small.scale, 1.0 if large is None else large.scale), shares(w, config)
    if config.split == "gaussian":
        height, width = small.conditional.shape[-2:]
        taps = gaussian_taps(height, width, config.sigma(w))
        if len(taps) != 3:
            raise InputError(
                f"the Triton blend has a 3 x 3 stencil, and these planes need {len(taps)} taps; use"
                " kernels='torch'.",
                code="unsupported",
                param="kernels",
            )
        other, other_u = (None, None) if large is None else (large.conditional, large.unconditional)
        args = scales, share.large, share.keep, share.low, float(taps[0])
        u, sums = band_blend(small.conditional, small.unconditional, other, other_u, *args)
    else:
        f = filter_at(w, config, small.conditional)
        assert large is not None  # without it, `combine` leaves the small velocity as it is
        both = small.conditional, small.unconditional, large.conditional, large.unconditional
        u, sums = band_filter(*both, scales, share.keep, share.low, f.left, f.right, f.gain)
    return Velocity(Prediction(u), None if energy == "none" else sums, energy, w)


def blend(
    v_small: Tensor | None,
    v_large: Tensor | None,
    w: float,
    config: BlendConfig = BlendConfig(),  # noqa: B008 (frozen)
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
    small, large = (
        None if v is None else Prediction.of(_at_most_float32(v), 1.0) for v in (v_small, v_large)
    )
    given = next((v for v in (v_small, v_large) if v is not None), None)
    use_triton = given is not None and choose_ops(kernels, given.device).name == "triton"
    u = combine(small, large, w, config, energy, use_triton=use_triton).tensor()
    return u.clone() if u is v_small or u is v_large else u


def _at_most_float32(v: Tensor) -> Tensor:
    """The velocity as the kernels read it: they know no float64."""
    return v.float() if v.dtype == torch.float64 else v
