"""The fused blend against float64 oracles written from the formulas: guidance, both kinds of split,
gate and sums."""

import numpy as np
import pytest
import torch

from nexus_rt.kernels.band_blend import band_blend, band_blend_ref
from nexus_rt.kernels.band_filter import band_filter, band_filter_ref
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.filters import split_filter
from nexus_rt.method.guidance import Prediction
from nexus_rt.method.upfb import blend, combine
from tests.more import more
from tests.needs import needs
from tests.refusals import refuses
from tests.test_upfb import gaussian_lf, oracle, radial_lf

needs("triton")
# the interpreter computes bfloat16 wrongly; the GPU suite checks it
DTYPES = [torch.float32, torch.float16]
SHAPES = [
    (1, 2, 1, 60, 104),
    (2, 3, 2, 17, 23),
    (3, 5, 1, 8, 8),
    (1, 1, 1, 5, 2),
    (1, 1, 2, 1, 1),
    *more((1, 2, 1, 9, 300)),
]
SUBSETS = [
    "both guided",
    "both",
    "small guided",
    "large guided",
    "small alone",
    "small alone, guided",
]


def predictions(shape, dtype, subset):
    """(small, its twin, large, its twin), None where the subset has none, and the guidance
    scales."""
    g = torch.Generator().manual_seed(sum(shape))
    four = [
        (torch.randn(shape, generator=g) * s + m).to(dtype)
        for s, m in ((1.3, 0.1), (0.9, 0), (0.8, -0.2), (1.1, 0.3))
    ]
    guided_small = subset in ("both guided", "small guided", "small alone, guided")
    guided_large = subset in ("both guided", "large guided")
    alone = "alone" in subset
    return (
        four[0],
        four[1] if guided_small else None,
        None if alone else four[2],
        four[3] if guided_large else None,
    ), (
        5.0,
        3.0,
    )


def guided64(four, scales):
    out = []
    for c, u, scale in ((*four[:2], scales[0]), (*four[2:], scales[1])):
        out.append(
            None
            if c is None
            else c.double()
            if u is None
            else u.double() + scale * (c.double() - u.double())
        )
    return out


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN: an element that is not written shows."""
    like, empty = torch.full_like, torch.full
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: like(t, float("nan"), **k))
    monkeypatch.setattr(torch, "empty", lambda *shape, **k: empty(shape, float("nan"), **k))


def close(got, wanted, eager):
    """No worse than twice what eager float32 loses, and float32's own rounding."""
    allowed = 2 * (eager.double() - wanted).abs().max() + 2e-6 * wanted.abs().max()
    assert torch.isfinite(got).all() and (got.double() - wanted).abs().max() <= allowed


def sums_are(sums, velocities):
    assert sums.shape[:2] == (3, len(velocities[0])) and torch.isfinite(sums).all()
    for row, v in zip(sums.double().sum(-1), velocities, strict=True):
        wanted = torch.zeros(len(row)).double() if v is None else v.square().flatten(1).sum(1)
        assert torch.allclose(row, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("subset", SUBSETS)
def test_the_stencil_is_the_formula(shape, dtype, subset):
    four, scales = predictions(shape, dtype, subset)
    numbers = (0.4, 0.42, 0.18, 0.21)
    got, sums = band_blend(*four, scales, *numbers)
    v_small, v_large = guided64(four, scales)
    side = np.array([0.21, 1 - 2 * 0.21, 0.21])
    padded = np.pad(v_small.numpy(), [(0, 0)] * 3 + [(1, 1), (1, 1)])
    # the kernel tap by tap
    filtered = sum(
        side[i] * side[j] * padded[..., i : i + shape[-2], j : j + shape[-1]]
        for i in range(3)
        for j in range(3)
    )
    wanted = 0.42 * v_small + 0.18 * torch.from_numpy(filtered)
    wanted = wanted if v_large is None else wanted + 0.4 * v_large
    assert got.shape == shape and got.dtype == torch.float32
    close(got, wanted, band_blend_ref(*four, scales, *numbers)[0])
    sums_are(sums, (v_small, v_large, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, *more(torch.float16)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "subset, split, lowpass",
    [
        ("both guided", "fft", "gaussian"),
        ("both", "dct", "gaussian"),
        ("small guided", "fft", "butterworth"),
        ("large guided", "dct", "ideal"),
        ("both guided", "dct", "butterworth"),
    ],
)
def test_the_filter_is_the_formula(shape, dtype, subset, split, lowpass):
    four, scales = predictions(shape, dtype, subset)
    f = split_filter(*shape[-2:], split, lowpass, 2, 0.43, torch.device("cpu"))
    got, sums = band_filter(*four, scales, 0.42, 0.18, f.left, f.right, f.gain)
    v_small, v_large = guided64(four, scales)
    x = v_small - v_large
    wanted = (
        v_large + 0.42 * x + 0.18 * torch.from_numpy(radial_lf(x.numpy(), 0.43, split, lowpass, 2))
    )
    close(got, wanted, band_filter_ref(*four, scales, 0.42, 0.18, f.left, f.right, f.gain)[0])
    sums_are(sums, (v_small, v_large, wanted))


@pytest.mark.parametrize("energy", ["reference", "progressive", "none"])
@pytest.mark.parametrize(
    "split, lowpass", [("gaussian", "gaussian"), ("fft", "gaussian"), ("dct", "butterworth")]
)
@pytest.mark.parametrize("w", [0.0, 0.93, *more(0.1, 1.0)])
def test_the_whole_blend_is_the_published_formula(split, lowpass, energy, w):
    g = torch.Generator().manual_seed(3)
    small, large = (torch.randn(2, 3, 2, 17, 23, generator=g) for _ in range(2))
    config = BlendConfig(split=split, lowpass=lowpass)
    got = blend(small, large, w, config, energy, kernels="triton")
    wanted = oracle(small, large, w, config, energy)
    assert np.abs(got.double().numpy() - wanted).max() <= 4e-6 * np.abs(wanted).max() + 1e-6


def test_a_lone_small_generator_is_filtered_at_w_1():
    v = torch.randn(2, 2, 2, 9, 11, generator=torch.Generator().manual_seed(0))
    low = torch.from_numpy(gaussian_lf(v.double().numpy(), 1.0))
    wanted = 0.7 * v.double() + 0.3 * low
    wanted *= v.double().square().flatten(1).mean(1).sqrt().view(2, 1, 1, 1, 1) / (
        wanted.square().flatten(1).mean(1).sqrt().view(2, 1, 1, 1, 1) + 1e-6
    )
    assert (blend(v, None, 1.0, energy="progressive", kernels="triton") - wanted).abs().max() < 1e-5


def test_samples_do_not_see_each_other():
    four, scales = predictions((3, 5, 1, 8, 8), torch.float32, "both guided")
    f = split_filter(8, 8, "dct", "butterworth", 2, 0.4, torch.device("cpu"))
    for call in (
        lambda *p: band_blend(*p, scales, 0.4, 0.4, 0.2, 0.2),
        lambda *p: band_filter(*p, scales, 0.4, 0.2, f.left, f.right, f.gain),
    ):
        whole, sums = call(*four)
        for i in range(3):
            one, own = call(*(t[i : i + 1].clone() for t in four))
            assert torch.equal(one[0], whole[i]) and torch.equal(own[:, 0], sums[:, i])


def test_no_samples_make_no_velocity():
    none = torch.zeros(0, 2, 1, 8, 8)
    out, sums = band_blend(none, None, None, None, (1, 1), 0, 1, 0, 0.2)
    assert out.shape == none.shape and sums.shape[:2] == (3, 0)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: (s.transpose(-1, -2), None, None, None), "small has strides"),
        (
            lambda s: (s, s[..., :4].contiguous(), None, None),
            r"small_u has shape \(2, 2, 1, 8, 4\); expected \(2, 2, 1, 8, 8\)",
        ),
        (
            lambda s: (s, s.half(), None, None),
            "small_u is torch.float16 on cpu; expected torch.float32",
        ),
        (lambda s: (s.double(), None, None, None), "small is torch.float64"),
        (lambda s: (s[0, 0, 0], None, None, None), r"expected \[B, ..., H, W\]"),
        (lambda s: (s, None, None, s), "nothing to guide"),
        (lambda s: (s, None, torch.zeros(257)[1:].view(s.shape), None), "off a 16-byte boundary"),
        (lambda s: (torch.zeros(1, 1, 5000), None, None, None), "up to 4096"),
        (lambda s: (torch.zeros(1, 40000, 1), None, None, None), "beyond the grid"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        band_blend(*change(torch.zeros(2, 2, 1, 8, 8)), (1.0, 1.0), 0.5, 0.35, 0.15, 0.2)


def test_matrices_of_another_plane_are_refused():
    s, eye = torch.zeros(1, 1, 1, 8, 6), torch.eye(8)
    with pytest.raises(ValueError, match=r"right has shape \(8, 8\); expected \(6, 6\)"):
        band_filter(s, None, s, None, (1, 1), 0.5, 0.5, eye, eye)
    with pytest.raises(ValueError, match="gain has shape"):
        band_filter(s, None, s, None, (1, 1), 0.5, 0.5, eye, torch.eye(6), torch.zeros(6, 8))


def test_a_plane_so_large_that_the_published_kernel_grows_is_refused():
    with refuses("unsupported", "kernels"):
        combine(
            Prediction(torch.zeros(1, 1, 2048, 2048)),
            None,
            1.0,
            energy="progressive",
            use_triton=True,
        )


@pytest.mark.parametrize("subset", ["both guided", "small alone"])
def test_the_ops_keep_torchs_rules(subset, monkeypatch):
    monkeypatch.undo()
    four, scales = predictions((2, 2, 1, 8, 8), torch.float32, subset)
    torch.library.opcheck(
        torch.ops.nexus_rt.band_blend.default, (*four, *scales, 0.4, 0.4, 0.2, 0.2)
    )
    if four[2] is not None:
        f = split_filter(8, 8, "dct", "butterworth", 2, 0.4, torch.device("cpu"))
        for gain in (None, f.gain):
            torch.library.opcheck(
                torch.ops.nexus_rt.band_filter.default,
                (*four, *scales, 0.4, 0.2, f.left, f.right, gain),
            )
