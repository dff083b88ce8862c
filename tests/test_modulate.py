"""Gated residual + LayerNorm + modulation: against float64, at Wan's widths and odd ones."""

import pytest
import torch

from nexus_rt.kernels.modulate import modulate, modulate_ref
from tests.needs import needs

needs("triton")
# the interpreter computes bfloat16 wrongly; the GPU suite checks it
DTYPES = [
    torch.float32,
    torch.float16,
]
SHAPES = [(1, 3, 1536), (2, 2, 5120), (2, 5, 63), (3, 1, 128), (1, 1, 1)]


def inputs(shape, dtype, per_sample=True, device="cpu"):
    g = torch.Generator().manual_seed(hash(shape) % 1000)
    b, _, d = shape
    x, y = (torch.randn(shape, generator=g).to(device, dtype) * 3 + 0.5 for _ in range(2))
    scale, shift, gate = (
        torch.randn(b if per_sample else 1, d, generator=g).to(device) for _ in range(3)
    )
    return x, y, scale, shift, gate


def oracle(x, scale, shift, eps, y=None, gate=None):
    """The formula in float64; x' is rounded to x's dtype, as the residual stream is."""
    total = x.double()
    if y is not None:
        total = total + y.double() * (1 if gate is None else gate.double()[:, None])
        total = total.to(x.dtype).double()
    mean = total.mean(-1, keepdim=True)
    var = ((total - mean) ** 2).mean(-1, keepdim=True)
    return (
        total,
        (total - mean) / (var + eps).sqrt() * (1 + scale.double()[:, None])
        + shift.double()[:, None],
    )


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN: an element that is not written shows."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, float("nan")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["norm", "residual", "gated"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_it_is_the_formula(shape, dtype, mode, per_sample):
    x, y, scale, shift, gate = inputs(shape, dtype, per_sample)
    extra = {"norm": {}, "residual": {"y": y}, "gated": {"y": y, "gate": gate}}[mode]
    total, out = modulate(x, scale, shift, 1e-6, **extra)
    want_total, want = oracle(x, scale, shift, 1e-6, **extra)
    assert total.dtype == out.dtype == dtype and out.shape == shape
    eager = modulate_ref(x, scale, shift, 1e-6, **extra)
    for got, ref, wanted in ((total, eager[0], want_total), (out, eager[1], want)):
        # Eager may round exactly; a product rounded before its sum may fall to the next number.
        allowed = 2 * (ref.double() - wanted).abs().max() + 1e-5
        allowed = allowed + torch.finfo(dtype).eps * wanted.abs()
        assert torch.isfinite(got).all() and ((got.double() - wanted).abs() <= allowed).all()


def test_a_gate_a_sample_beside_one_scale_for_all():
    """A block's affine norm: its weights serve all samples, the gate is each sample's own."""
    x, y, scale, shift, gate = inputs((3, 2, 64), torch.float32)
    _, out = modulate(x, scale[:1], shift[:1], 1e-6, y=y, gate=gate)
    assert (out.double() - oracle(x, scale[:1], shift[:1], 1e-6, y, gate)[1]).abs().max() <= 1e-5
    _, out = modulate(x, scale, shift, 1e-6, y=y, gate=gate[:1])
    assert (out.double() - oracle(x, scale, shift, 1e-6, y, gate[:1])[1]).abs().max() <= 1e-5


def test_the_affine_norm_is_the_same_kernel():
    x, *_ = inputs((2, 3, 96), torch.float32)
    norm = torch.nn.LayerNorm(96, 1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    with torch.no_grad():
        _, out = modulate(x, norm.weight[None] - 1, norm.bias[None].contiguous(), 1e-6)
        assert torch.allclose(out, norm(x), atol=1e-5)


def test_without_y_the_stream_is_x_itself():
    x, _, scale, shift, _ = inputs((1, 2, 64), torch.float32)
    assert modulate(x, scale, shift, 1e-6)[0] is x


def test_a_large_mean_does_not_drown_the_variance():
    """Two passes over registers: no cancellation, as a sum of squares would have."""
    x = torch.randn(1, 2, 512, generator=torch.Generator().manual_seed(0)) + 3000
    zero = torch.zeros(1, 512)
    got, want = modulate(x, zero, zero, 1e-6)[1], oracle(x, zero, zero, 1e-6)[1]
    assert (got.double() - want).abs().max() < 1e-3


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, s: (x[0], s, s), r"x is torch.float32 \(3, 64\); expected \[B, L, D\]"),
        (lambda x, s: (x.double(), s, s), r"float64"),
        (lambda x, s: (x.transpose(1, 2).contiguous().transpose(1, 2), s, s), r"x has strides"),
        (
            lambda x, s: (torch.zeros(385)[1:].view(x.shape), s, s),
            r"x starts 1 elements into its memory",
        ),
        (lambda x, s: (x, torch.zeros(129)[1:].view(s.shape), s), r"scale starts 1 elements"),
        (
            lambda x, s: (x, s[:, :32], s[:, :32]),
            r"scale has shape \(2, 32\); expected \[1, 64\] or \[2, 64\]",
        ),
        (lambda x, s: (x, s[:1], s), r"scale and shift have shapes \(1, 64\) and \(2, 64\)"),
        (lambda x, s: (x, s, s.half()), r"shift is torch.float16"),
        (lambda x, s: (x, s, s.T.contiguous().T), r"shift has strides"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, words):
    x, scale = torch.randn(2, 3, 64), torch.randn(2, 64)
    with pytest.raises(ValueError, match=words):
        modulate(*change(x, scale), 1e-6)
    with pytest.raises(ValueError, match="y has shape"):
        modulate(x, scale, scale, 1e-6, y=x[:1])
    with pytest.raises(ValueError, match="nothing to gate"):
        modulate(x, scale, scale, 1e-6, gate=scale)
    with pytest.raises(ValueError, match="up to 16384"):
        modulate(torch.zeros(1, 1, 20000), torch.zeros(1, 20000), torch.zeros(1, 20000), 1e-6)


@pytest.mark.parametrize("mode", ["norm", "gated"])
def test_the_op_keeps_torchs_rules(mode, monkeypatch):
    monkeypatch.undo()
    x, y, scale, shift, gate = inputs((2, 3, 32), torch.float32)
    extra = (y, gate) if mode == "gated" else (None, None)
    torch.library.opcheck(
        torch.ops.nexus_rt.modulate.default, (x, scale, shift, 1e-6, *extra, False)
    )


def test_more_rows_than_the_grid_are_refused():
    from nexus_rt.kernels.modulate import check_modulate

    x, scale = torch.empty(2, 2**30, 8, device="meta"), torch.empty(1, 8, device="meta")
    with pytest.raises(ValueError, match="2147483648 tokens in all are beyond the grid"):
        check_modulate(x, scale, scale, None, None)
