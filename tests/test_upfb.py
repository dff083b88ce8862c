"""The blend against float64 oracles written from the formulas (DESIGN section 1), not from the
code."""

import math

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt.core.errors import InputError
from nexus_rt.kernels.formulas import guide
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.filters import split_filter
from nexus_rt.method.guidance import Prediction
from nexus_rt.method.upfb import (
    blend,
    combine,
    gate,
    low_frequencies,
    published_blend,
    rms,
    target_rms,
)

PLANES = [(60, 104), (90, 160), (17, 23), (8, 8), (5, 2)]
WEIGHTS = [0.0, 0.1, 0.5, 0.93, 1.0]


def velocities(shape=(2, 4, 3, 17, 23), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * 1.3 + 0.1, torch.randn(shape, generator=g) * 0.8 - 0.2


def gaussian_lf(v: np.ndarray, w: float) -> np.ndarray:
    """The published low band: zero-padded, normalised k x k Gaussian of each plane, tap by tap."""
    height, width = v.shape[-2:]
    k = max(3, 2 * math.floor(math.sqrt(height * width) / 1024) + 1)
    sigma, r = 0.35 + (0.7 - 0.35) * w, k // 2
    kernel = np.array(
        [
            [math.exp(-(i * i + j * j) / (2 * sigma**2)) for j in range(-r, r + 1)]
            for i in range(-r, r + 1)
        ]
    )
    kernel /= kernel.sum()
    padded = np.pad(v, [(0, 0)] * (v.ndim - 2) + [(r, r), (r, r)])
    out = np.zeros_like(v)
    for i in range(k):
        for j in range(k):
            out += kernel[i, j] * padded[..., i : i + height, j : j + width]
    return out


def lowpass(rho: np.ndarray, cutoff: float, family: str, order: int) -> np.ndarray:
    if family == "gaussian":
        return 2.0 ** (-((rho / cutoff) ** 2) / 2)
    if family == "butterworth":
        return 1 / np.sqrt(1 + (rho / cutoff) ** (2 * order))
    return (rho <= cutoff).astype(np.float64)


def radial_lf(v: np.ndarray, cutoff: float, split: str, family: str, order: int) -> np.ndarray:
    """The low band of `fft` and `dct` by their transforms."""
    height, width = v.shape[-2:]
    if split == "fft":
        fy, fx = 2 * np.abs(np.fft.fftfreq(height)), 2 * np.abs(np.fft.fftfreq(width))
        gain = lowpass(np.hypot(fy[:, None], fx[None]), cutoff, family, order)
        return np.fft.ifft2(np.fft.fft2(v) * gain).real
    fy, fx = np.arange(height) / height, np.arange(width) / width
    gain = lowpass(np.hypot(fy[:, None], fx[None]), cutoff, family, order)
    return scipy.fft.idctn(
        scipy.fft.dctn(v, type=2, norm="ortho", axes=(-2, -1)) * gain,
        type=2,
        norm="ortho",
        axes=(-2, -1),
    )


def np_rms(v: np.ndarray) -> np.ndarray:
    return np.sqrt((v**2).mean(axis=(1, 2, 3, 4), keepdims=True))


def oracle(small, large, w, config: BlendConfig, energy: str) -> np.ndarray:
    s, b = small.double().numpy(), large.double().numpy()
    if config.split == "gaussian":  # the four-band form, before any expansion
        lf_s, lf_l = gaussian_lf(s, w), gaussian_lf(b, w)
        u = (w * lf_s + (1 - w) * lf_l) + ((1 - w) * (b - lf_l) + config.gamma_hf * w * (s - lf_s))
    else:
        d = s - b
        low = radial_lf(d, config.cutoff(w), config.split, config.lowpass, config.order)
        u = b + w * (low + config.gamma_hf * (d - low))
    eps = 1e-6
    if energy == "reference":
        target = (np_rms(s) + np_rms(b * (np_rms(s) / (np_rms(b) + eps)))) / 2
    elif energy == "progressive":
        target = w * np_rms(s) + (1 - w) * np_rms(b)
    else:
        return u
    return u * (target / (np_rms(u) + eps))


@pytest.mark.parametrize("energy", ["reference", "progressive", "none"])
@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("split", ["gaussian", "fft", "dct"])
def test_blend_matches_the_formula(split, w, energy):
    small, large = velocities()
    config = BlendConfig(split=split, lowpass="butterworth")
    got = blend(small, large, w, config, energy).double().numpy()
    expected = oracle(small, large, w, config, energy)
    assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max() + 1e-6


@pytest.mark.parametrize(
    "family, order", [("gaussian", 2), ("butterworth", 1), ("butterworth", 4), ("ideal", 2)]
)
@pytest.mark.parametrize("split", ["fft", "dct"])
@pytest.mark.parametrize("plane", PLANES)
def test_two_sided_matrices_are_the_transforms(plane, split, family, order):
    v = torch.randn(1, 2, 2, *plane, generator=torch.Generator().manual_seed(5))
    for w in (0.0, 0.37, 1.0):
        config = BlendConfig(split=split, lowpass=family, order=order)
        got = low_frequencies(v, w, config).double().numpy()
        expected = radial_lf(v.double().numpy(), config.cutoff(w), split, family, order)
        assert np.abs(got - expected).max() <= 1e-5  # four float32 products of unit-variance planes


@pytest.mark.parametrize("split", ["fft", "dct"])
@pytest.mark.parametrize("plane", PLANES)
def test_the_transforms_are_orthonormal_and_one_for_every_cutoff(plane, split):
    here = torch.device("cpu")
    narrow, wide = (
        split_filter(*plane, split, "butterworth", 2, cutoff, here) for cutoff in (0.2, 0.9)
    )
    for side, matrix in zip(plane, (narrow.left, narrow.right), strict=True):
        assert (matrix.double() @ matrix.double().T - torch.eye(side)).abs().max() < 1e-6
    assert (
        narrow.left is wide.left
        and narrow.right is wide.right
        and not torch.equal(narrow.gain, wide.gain)
    )
    # separable: two products, not four
    assert split_filter(*plane, split, "gaussian", 2, 0.5, here).gain is None


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("w", WEIGHTS)
def test_gaussian_low_band(plane, w):
    v = torch.randn(1, 2, 1, *plane)
    expected = gaussian_lf(v.double().numpy(), w)
    assert np.abs(low_frequencies(v, w, BlendConfig()).double().numpy() - expected).max() <= 2e-6


@settings(max_examples=40, deadline=None)
@given(
    w=st.floats(0, 1),
    split=st.sampled_from(["gaussian", "fft", "dct"]),
    scale=st.floats(0.05, 20),
    seed=st.integers(0, 1000),
    energy=st.sampled_from(["reference", "progressive"]),
)
def test_energy_sets_the_rms_of_every_sample(w, split, scale, seed, energy):
    small, large = velocities((2, 2, 2, 6, 10), seed)
    large = large * scale
    u = blend(small, large, w, BlendConfig(split=split), energy)
    expected = target_rms(small, large, w, energy)
    assert torch.allclose(rms(u), expected, rtol=1e-4)
    if energy == "reference":  # the published rule pulls every step to the small generator's RMS
        assert torch.allclose(expected, rms(small), rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    w=st.floats(0, 1),
    split=st.sampled_from(["fft", "dct"]),
    family=st.sampled_from(["gaussian", "butterworth", "ideal"]),
)
def test_shares_add_up_to_one(w, split, family):
    """Where both generators agree the blend changes nothing: what the small gives up, the large
    takes."""
    v, _ = velocities((1, 2, 2, 6, 10))
    assert torch.allclose(
        blend(v, v, w, BlendConfig(split=split, lowpass=family), "none"), v, atol=1e-5
    )


@settings(max_examples=20, deadline=None)
@given(split=st.sampled_from(["gaussian", "fft", "dct"]), a=st.floats(0, 1), b=st.floats(0, 1))
def test_samples_do_not_see_each_other(split, a, b):
    small, large = velocities((3, 2, 2, 6, 10))
    whole = blend(small, large, a, BlendConfig(split=split), "progressive")
    for i in range(3):
        one = blend(small[i : i + 1], large[i : i + 1], a, BlendConfig(split=split), "progressive")
        assert torch.allclose(one, whole[i : i + 1], atol=2e-6)


@pytest.mark.parametrize("split", ["gaussian", "fft", "dct"])
def test_a_step_of_one_generator_needs_nothing_of_the_other(split):
    small, large = velocities()
    config = BlendConfig(split=split)
    assert torch.equal(blend(None, large, 0.0, config, "progressive"), large)
    alone = blend(small, None, 1.0, config, "progressive")
    assert torch.allclose(rms(alone), rms(small), rtol=1e-5)
    if split == "gaussian":  # at w = 1 the large generator has no share at all
        assert torch.allclose(alone, blend(small, large, 1.0, config, "progressive"), atol=1e-6)
    else:
        assert torch.equal(alone, small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_float32(dtype):
    small, large = (v.to(dtype) for v in velocities())
    got = blend(small, large, 0.4)
    assert got.dtype == torch.float32
    assert torch.equal(got, blend(small.float(), large.float(), 0.4))


def test_inputs_are_left_alone():
    small, large = velocities()
    kept = small.clone(), large.clone()
    for w in (0.0, 0.5, 1.0):
        for split in ("gaussian", "fft"):
            blend(small, large, w, BlendConfig(split=split), "none").zero_()
    assert torch.equal(small, kept[0]) and torch.equal(large, kept[1])


def test_gate_at_its_ends_and_in_the_middle():
    assert gate(999) == 1.0 and gate(0) == pytest.approx(0.0, abs=1e-12)
    tau = 500 / 999
    assert gate(500) == pytest.approx((1 + math.cos(math.pi * (1 - tau) ** 0.3)) / 2, abs=1e-12)
    assert gate(2000) == 1.0 and gate(-5) == pytest.approx(0.0, abs=1e-12)


def test_guidance_is_diffusers_meaning():
    c, u = velocities()
    # the paper's s = 5 is g = 6
    assert torch.allclose(guide(c, u, 6.0), c + 5.0 * (c - u), atol=1e-5)
    assert torch.equal(guide(c, None, 6.0), c)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s, b: blend(s, b, 1.5), "between 0 and 1"),
        (lambda s, b: blend(s, None, 0.5), "needs the velocity that is missing"),
        (lambda s, b: blend(None, b, 0.0, BlendConfig(), "reference"), "needs both"),
        (lambda s, b: blend(s, b[:, :1], 0.5), "expected equal"),
        (lambda s, b: blend(s, b, 0.5, BlendConfig(), "progresive"), "did you mean 'progressive'"),
        (lambda s, b: BlendConfig(split="gausian"), "did you mean 'gaussian'"),
        (lambda s, b: BlendConfig(lowpass="buterworth"), "did you mean 'butterworth'"),
        (lambda s, b: BlendConfig(gamma_hf=1.2), "gamma_hf"),
        (lambda s, b: BlendConfig(rho_min=0.9, rho_max=0.1), "rho_min"),
        (lambda s, b: BlendConfig(order=0), "order"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(InputError, match=words):
        call(*velocities())


@pytest.mark.parametrize("energy", ["reference", "progressive", "none"])
@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("lowpass", ["gaussian", "butterworth", "ideal"])
@pytest.mark.parametrize("split", ["gaussian", "fft", "dct"])
def test_the_one_filter_form_is_the_published_form(split, lowpass, w, energy):
    """Four filtered tensors or one: the same blend."""
    small, large = velocities()
    config = BlendConfig(split=split, lowpass=lowpass)
    written = published_blend(small, large, w, config, energy)
    computed = combine(Prediction(small), Prediction(large), w, config, energy).tensor()
    # a lone large velocity is left as it is, where the formula divides by its RMS + 1e-6
    lone = 1e-6 / float(np_rms(large.numpy()).min()) if w == 0 and energy == "progressive" else 0.0
    assert (computed - written).norm() <= (1e-6 + lone) * written.norm()
