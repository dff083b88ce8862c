"""Rows of activations in 8-bit floats: the kernel against its formula, alone and inside the norm,
and a transformer whose products take what the kernels write."""

import math
from dataclasses import replace

import pytest
import torch

from nexus_rt.kernels.modulate import modulate_rows, modulate_rows_ref
from nexus_rt.kernels.quantise_rows import quantise_rows, quantise_rows_ref
from nexus_rt.loading.packing import pack_model
from nexus_rt.models.wan import WanTransformer
from nexus_rt.models.wan_config import WanConfig
from nexus_rt.ops.block_ops import choose_ops
from tests.interpreter import round_right
from tests.needs import needs
from tests.test_modulate import inputs, oracle

needs("triton")


@pytest.fixture(autouse=True)
def rounded_right(monkeypatch):
    round_right(monkeypatch)


def rounded(y):
    """Rows in float64 as e4m3 and back, with the scale of their largest."""
    scale = (y.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-12 / 448)
    return (y / scale).float().to(torch.float8_e4m3fn).double() * scale, scale


def gelu64(x):
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(3, 1536), (2, 2, 5120), (2, 13824), (2, 5, 63), (1, 1), (4, 16)]
)
def test_it_is_the_formula(shape, dtype, gelu):
    g = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=g) * 3).to(dtype)
    values, scales = quantise_rows(x, gelu)
    rows = math.prod(shape[:-1])
    assert values.shape == (rows, shape[-1]) and values.dtype == torch.float8_e4m3fn
    assert scales.shape == (rows, 1) and scales.dtype == torch.float32
    y = x.flatten(0, -2).double()
    wanted, scale = rounded(gelu64(y) if gelu else y)
    assert torch.allclose(scales.double(), scale, rtol=1e-5)
    off = values.double() * scales.double() - wanted
    # float32 may fall to the other side of a boundary between two 8-bit numbers
    step = wanted.abs().clamp_min(float(scale.max()) / 64) / 8
    assert (off.abs() > 1e-3 * step).double().mean() < 0.01 and (off.abs() <= 1.01 * step).all()
    for got, ref in zip((values.float() * scales, scales), quantise_rows_ref(x, gelu), strict=True):
        ref = ref.float() * scales if ref.dtype != torch.float32 else ref
        assert (got - ref).norm() <= 0.01 * ref.norm()


def test_rows_of_zeros_and_of_nan():
    x = torch.zeros(3, 64)
    x[1, 5], x[2] = float("nan"), 1e-30
    values, scales = quantise_rows(x)
    assert torch.count_nonzero(values[0].float()) == 0 and scales[0] > 0
    assert values[1].float().isnan()[5]  # a row that is not finite stays so
    assert values[2].float().isfinite().all()


@pytest.mark.parametrize("mode", ["norm", "residual", "gated"])
@pytest.mark.parametrize("shape", [(1, 3, 1536), (2, 2, 5120), (2, 5, 63)])
def test_the_norm_writes_rows(shape, mode):
    x, y, scale, shift, gate = inputs(shape, torch.float16)
    extra = {"norm": {}, "residual": {"y": y}, "gated": {"y": y, "gate": gate}}[mode]
    total, (values, scales) = modulate_rows(x, scale, shift, 1e-6, **extra)
    want_total, want = oracle(x, scale, shift, 1e-6, **extra)
    assert torch.allclose(total.double(), want_total, rtol=1e-3)
    wanted, by = rounded(want.flatten(0, 1))
    assert torch.allclose(scales.double(), by, rtol=1e-3)
    # the stream is rounded to float16 before it is normed, and may be by one step more
    assert (values.double() * scales - wanted).norm() < 0.02 * wanted.norm()
    ref_total, (ref_values, ref_scales) = modulate_rows_ref(x, scale, shift, 1e-6, **extra)
    assert (ref_values.double() * ref_scales - wanted).norm() < 0.02 * wanted.norm()
    assert torch.equal(ref_total, total) or (ref_total - total).abs().max() < 0.01


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.int32), "expected ..... D. in float32"),
        (torch.zeros(2, 16385), "up to 16384"),
        (torch.zeros(8, 2).T, "contiguous"),
        (torch.zeros(8), "expected ..... D. in float32"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(x, words):
    with pytest.raises(ValueError, match=words):
        quantise_rows(x)


def test_the_ops_keep_torchs_rules():
    x, y, scale, shift, gate = inputs((2, 3, 64), torch.float32)
    for gelu in (False, True):
        torch.library.opcheck(torch.ops.nexus_rt.quantise_rows.default, (x, gelu))
    torch.library.opcheck(
        torch.ops.nexus_rt.modulate.default, (x, scale, shift, 1e-6, y, gate, True)
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = WanConfig(
        num_attention_heads=2,
        attention_head_dim=32,
        ffn_dim=128,
        num_layers=3,
        text_dim=32,
        freq_dim=32,
    )
    return WanTransformer(config).eval().requires_grad_(False)


def run(model):
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 1, 6, 8, generator=g), torch.randn(2, 5, 32, generator=g)
    with torch.no_grad():
        return model(x, torch.tensor(500.0), model.prepare_context(text))


def test_a_transformer_takes_the_rows_that_kernels_write(model, monkeypatch):
    """Every activation is quantised where it is made: two norms, the GELU, and before the output
    projections; none a second time."""
    wanted = run(model)
    pack_model(model, "fp8-dynamic-all")
    plain = run(model)
    from nexus_rt.models import quantized_products, wan

    ops = choose_ops("triton", torch.device("cpu"))
    count = {"norm": 0, "rows": 0, "gelu": 0}

    def norm(*args):
        count["norm"] += 1
        return ops.modulate_rows(*args)

    def rows(x, gelu=False):
        count["gelu" if gelu else "rows"] += 1
        return ops.quantise_rows(x, gelu)

    watched = replace(ops, modulate_rows=norm, quantise_rows=rows)
    monkeypatch.setattr(wan, "choose_ops", lambda *a: watched)
    monkeypatch.setattr(
        quantized_products, "scaled_rows", lambda *a: pytest.fail("quantised in PyTorch")
    )
    fused = run(model.use_kernels("triton"))
    # before Q K V, the cross-attention's Q and the feed-forward; before both output projections,
    # and keys and values of the text, once
    assert count == {"norm": 9, "rows": 9, "gelu": 3}
    assert (fused - plain).norm() < 0.02 * wanted.norm()
    assert 0 < (fused - wanted).norm() < 0.1 * wanted.norm()


def test_edges_and_dense_layers_are_normed_as_before(model):
    pack_model(model, "fp8-dynamic")
    plain = run(model)
    assert (run(model.use_kernels("triton")) - plain).norm() < 0.02 * plain.norm()
