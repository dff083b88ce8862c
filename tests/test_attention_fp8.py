"""Attention on 8-bit floats: the quantisation bit by bit, and the result against float64 within
what fp8 costs.

Triton's interpreter rounds float32 to fp8 without the carry into the exponent (0.4999 becomes
0.25), so that one conversion is done by PyTorch here; everything else is the kernel's.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from nexus_rt.kernels.attention_fp8 import (
    attention_fp8,
    attention_fp8_ref,
    quantise,
    quantise_ref,
)
from tests.interpreter import round_right
from tests.more import more
from tests.needs import needs
from tests.test_attention_kernel import extreme, inputs, oracle

needs("triton")
# What rounding Q, K', V and the shares to four significant bits may cost, as a share of the
# output's RMS. The scores of these inputs (q and k of variance 4) are three times as wide as a
# normed transformer's, so their errors are too.
ALLOWED = 0.12


@pytest.fixture(autouse=True)
def rounded_right(monkeypatch):
    round_right(monkeypatch)


def relative(got, wanted):
    return float((got.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", [(1, 200, 2, 64), (2, 64, 1, 128), (1, 1, 3, 64)])
@pytest.mark.parametrize("rows", [64, 128])
def test_blocks_are_scaled_and_rounded_as_the_formula(shape, rows):
    x = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
        * torch.logspace(-2, 1, shape[3]).half()
    )
    wanted = quantise_ref(x, rows)
    x8, scale = quantise(x, rows, None, False)
    spread = scale.repeat_interleave(rows, -1)[..., : shape[1]].permute(0, 2, 1)[..., None]
    assert torch.allclose(x8.float() * spread, wanted, rtol=1e-6)
    assert x8.float().abs().max() == 448
    t8, scale = quantise(x, rows, None, True)
    assert t8.shape == (shape[0], shape[2], shape[3], -(-shape[1] // rows) * rows)
    back = t8.float() * scale.repeat_interleave(rows, -1)[:, :, None]
    assert torch.allclose(back[..., : shape[1]].permute(0, 3, 1, 2), wanted, rtol=1e-6)
    # padding that is read is zero
    assert torch.count_nonzero(t8.view(torch.uint8)[..., shape[1] :]) == 0


@pytest.mark.parametrize("loads", ["auto", "pointers", "descriptors", "specialised"])
@pytest.mark.parametrize(
    "case", [(1, 130, 200, 2, 128), (2, 63, 77, 1, 64), (1, 128, 256, 1, 64)], ids=str
)
def test_it_is_attention_within_what_eight_bits_cost(case, loads):
    q, k, v = inputs(*case, torch.float16)
    wanted = oracle(q, k, v)
    got = attention_fp8(q, k, v, loads=loads)
    assert got.shape == q.shape and got.dtype == q.dtype and torch.isfinite(got).all()
    assert relative(got, wanted) < ALLOWED
    # the shares are rounded too: no more than the other operands' error again
    columns = 128 if loads == "specialised" else 64
    assert relative(got, wanted) < 1.5 * relative(
        attention_fp8_ref(q, k, v, columns=columns), wanted
    )


def test_what_all_keys_share_costs_nothing():
    """Outlier channels that are alike in every key would take the scale of the rest: K is
    smoothed."""
    q, k, v = inputs(1, 64, 128, 1, 64, torch.float16)
    k, q = k / 2, q / 2
    offset = torch.zeros(64).half()
    offset[3], offset[40] = 200.0, -150.0
    wanted = oracle(q, k, v)
    plain, shifted = (relative(attention_fp8(q, t, v), wanted) for t in (k, k + offset))
    assert shifted < plain + 0.03  # k + offset in float16 has lost bits of its own
    rough = relative(oracle(q, quantise_ref(k + offset, 64), v), wanted)
    assert rough > 3 * shifted


def test_biased_keys():
    q, k, v = inputs(2, 20, 100, 1, 64, torch.float16)
    bias = torch.randn(2, 100, generator=torch.Generator().manual_seed(1))
    bias[0, 70:] = -math.inf
    assert relative(attention_fp8(q, k, v, bias), oracle(q, k, v, bias)) < ALLOWED
    assert (
        relative(attention_fp8(q, k, v, bias, loads="descriptors"), oracle(q, k, v, bias)) < ALLOWED
    )


def test_the_thirds_of_a_fused_projection_are_read_where_they_lie():
    fused = torch.randn(2, 50, 3 * 128, generator=torch.Generator().manual_seed(2)).half()
    q, k, v = (t.unflatten(-1, (2, 64)) for t in fused.chunk(3, -1))
    assert np.array_equal(
        attention_fp8(q, k, v), attention_fp8(*(t.contiguous() for t in (q, k, v)))
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda q: q.float(), "torch.float32 with head_dim 64; expected float16 or bfloat16"),
        (lambda q: q[..., :32].contiguous(), "head_dim 64, 128"),
        (lambda q: q.transpose(2, 3).contiguous().transpose(2, 3), "q has strides"),
    ],
)
def test_what_it_does_not_take_is_refused(change, words):
    q = change(torch.zeros(1, 8, 2, 64).half())
    with pytest.raises(ValueError, match=words):
        attention_fp8(q, q, q)


def test_the_op_keeps_torchs_rules():
    q, k, v = inputs(1, 9, 11, 1, 64, torch.float16)
    torch.library.opcheck(torch.ops.nexus_rt.attention_fp8.default, (q, k, v))


@pytest.mark.parametrize("loads", ["descriptors", "specialised", "ahead"])
@pytest.mark.parametrize("low", [0.0, -50.0])
def test_what_lies_past_the_last_key_has_no_share(loads, low):
    """Nor where scores are all far below the zero that padding has; K's mean, which is smoothed
    away, is not what makes them so."""
    q, k, v = inputs(1, 130, 140, 1, 64, torch.float16)
    k[:, :, :, 0] = torch.tensor([1.0, 1.0]).repeat(70)[:, None]
    k[:, 0, :, 0] = -500.0  # the mean is far below the others: their smoothed values are one sign
    q[..., 0] = low
    wanted = oracle(q, k, v)
    assert relative(attention_fp8(q, k, v, loads=loads), wanted) < 0.15


def test_values_of_one_head_are_scaled_by_their_own_largest():
    q, k, v = inputs(2, 40, 90, 2, 64, torch.float16)
    v = (
        v
        * torch.tensor([1.0, 100.0]).half()[:, None]
        * torch.tensor([1.0, 0.01]).half().view(2, 1, 1, 1)
    )
    wanted, got = oracle(q, k, v), attention_fp8(q, k, v)
    for sample in range(2):
        for head in range(2):
            assert relative(got[sample, :, head], wanted[sample, :, head]) < ALLOWED


@pytest.mark.parametrize(
    "loads", ["auto", "descriptors", *more("pointers", "specialised", "ahead")]
)
@given(case=extreme((64, 128), (torch.float16,)))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_finite_inputs_of_any_size_give_the_quantised_formula(loads, case):
    q, k, v = case
    got = attention_fp8(q, k, v, loads=loads)
    columns = 64 if loads in ("auto", "pointers") else 128
    wanted = attention_fp8_ref(q, k, v, columns=columns)
    assert torch.isfinite(got).all() and got.abs().max() <= 1.1 * v.abs().max()
    # beyond, the rounding of float32 decides between keys that score alike in blocks of two scales
    if q.double().abs().max() * k.double().abs().max() * math.sqrt(q.shape[-1]) < 2**12:
        assert relative(got, wanted.double()) < ALLOWED


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_bfloat16_of_any_size_is_finite(size):
    """Quantisation alone: sums of such keys overflow, and blocks are far below float32's one."""
    q = torch.full((1, 64, 1, 64), 1 / size).bfloat16()
    k = torch.full((1, 128, 1, 64), size).bfloat16()
    k[:, ::2] *= -1
    v = torch.full((1, 128, 1, 64), 3e38).bfloat16()
    for x in (q, k, v):
        x8, scale = quantise(x.float(), 64, None, False)
        assert torch.isfinite(x8.float()).all() and x8.float().abs().max() == 448
        assert torch.isfinite(scale).all() and (scale > 0).all()
