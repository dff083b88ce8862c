"""RMSNorm over all heads + RoPE: against float64, with Wan's own tables."""

import pytest
import torch

from nexus_rt.kernels.formulas import apply_rope
from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from nexus_rt.ops.block_ops import rope_table
from tests.needs import needs

needs("triton")
CASES = [  # grid, heads, head_dim, dtype
    ((1, 2, 3), 12, 128, torch.float32),
    ((2, 1, 2), 40, 128, torch.float16),
    ((2, 3, 1), 3, 22, torch.float32),
    ((1, 1, 5), 4, 64, torch.float16),
    ((1, 1, 1), 1, 2, torch.float32),
]


def inputs(grid, heads, head_dim, dtype, batch=2):
    g = torch.Generator().manual_seed(heads)
    length, dim = grid[0] * grid[1] * grid[2], heads * head_dim
    cos, sin = rope_table(head_dim, grid, torch.device("cpu"))
    tables = cos[:, 0, ::2].clone(), sin[:, 0, 1::2].clone()
    tables = tuple(t.contiguous() for t in tables)
    qkv = (torch.randn(batch, length, 3 * dim, generator=g) * 2).to(dtype)
    weights = [torch.randn(dim, generator=g).to(dtype) for _ in range(2)]
    return qkv, *weights, *tables, heads, 1e-6


def oracle(qkv, weight_q, weight_k, cos, sin, heads, eps):
    """As complex numbers: a pair times e^(i angle), in float64."""
    out = []
    for x, weight in zip(qkv.double().chunk(3, -1)[:2], (weight_q, weight_k), strict=True):
        n = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
        z = torch.view_as_complex(n.unflatten(-1, (heads, -1, 2)).contiguous())
        out.append(
            torch.view_as_real(z * torch.complex(cos.double(), sin.double())[:, None]).flatten(-2)
        )
    return out


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_formula(case):
    args = inputs(*case)
    got, eager, wanted = qk_norm_rope(*args), qk_norm_rope_ref(*args), oracle(*args)
    for g, e, w in zip(got, eager, wanted, strict=True):
        assert g.shape == w.shape and g.dtype == args[0].dtype and torch.isfinite(g).all()
        assert (g.double() - w).abs().max() <= 2 * (e.double() - w).abs().max() + 1e-5


def test_it_is_what_the_transformer_does():
    qkv, weight_q, weight_k, *_ = args = inputs((2, 2, 2), 3, 32, torch.float32)
    table = rope_table(32, (2, 2, 2), torch.device("cpu"))
    for got, x, weight in zip(
        qk_norm_rope(*args), qkv.chunk(3, -1), (weight_q, weight_k), strict=False
    ):
        normed = torch.nn.functional.rms_norm(x, (96,), weight, 1e-6).unflatten(-1, (3, -1))
        assert torch.allclose(got, apply_rope(normed, *table), atol=1e-5)


def test_queries_and_keys_take_their_own_weights_and_v_is_not_read():
    qkv, weight_q, weight_k, cos, sin, heads, eps = inputs((1, 2, 2), 2, 16, torch.float32)
    qkv[..., 64:] = float("nan")
    q, k = qk_norm_rope(qkv, weight_q, weight_k, cos, sin, heads, eps)
    swapped = qk_norm_rope(qkv, weight_k, weight_q, cos, sin, heads, eps)
    assert torch.isfinite(q).all() and torch.isfinite(k).all()
    assert (q != swapped[0]).any() and (k != swapped[1]).any()


def test_what_the_kernel_does_not_take_is_refused():
    qkv, weight_q, weight_k, cos, sin, heads, eps = inputs((1, 2, 2), 2, 16, torch.float32)
    for args, words in (
        ((qkv[0], weight_q, weight_k, cos, sin, heads), r"expected \[B, L, 3 D\]"),
        ((qkv[..., :95], weight_q, weight_k, cos, sin, heads), r"not 3 x 2 heads"),
        ((qkv, weight_q, weight_k, cos, sin, 5), r"not 3 x 5 heads"),
        (
            (qkv, weight_q[:8], weight_k, cos, sin, heads),
            r"weight_q has shape \(8,\); expected \(32,\)",
        ),
        ((qkv, weight_q, weight_k, cos.double(), sin, heads), r"cos is torch.float64"),
        (
            (qkv, weight_q, weight_k, cos, sin[:3], heads),
            r"sin has shape \(3, 8\); expected \(4, 8\)",
        ),
        (
            (qkv.transpose(0, 1).contiguous().transpose(0, 1), weight_q, weight_k, cos, sin, heads),
            r"qkv has strides",
        ),
        ((torch.zeros(1, 4, 3 * 20000), weight_q, weight_k, cos, sin, heads), r"up to 16384"),
    ):
        with pytest.raises(ValueError, match=words):
            qk_norm_rope(*args, eps)


def test_the_op_keeps_torchs_rules(monkeypatch):
    monkeypatch.undo()
    torch.library.opcheck(
        torch.ops.nexus_rt.qk_norm_rope.default, inputs((1, 2, 2), 2, 16, torch.float32)
    )
