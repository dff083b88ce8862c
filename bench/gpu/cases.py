"""Every kernel at every size, compared with its formula: the cases of the suite's correctness."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from nexus_rt.bench.gpu import oracles

FAR = 64.0  # one component of every query, and of every key with the other sign
Cases = dict[str, Callable[[], dict[str, Any]]]


def _heads(s: Any, timed: bool) -> tuple:
    if s.dry:
        return ((2, 32),) if timed else ()
    return ((40, 128), (12, 128)) if timed else ((4, 64), (4, 32))


def planes(s: Any, timed: bool) -> tuple:
    if s.dry:
        return ((6, 10),) if timed else ()
    return ((60, 104), (90, 160)) if timed else ((17, 23),)


def _modulate(s: Any, timed: bool) -> Cases:
    return {
        f"{what}{heads * head_dim}": partial(_modulate_case, s, heads * head_dim, what)
        for heads, head_dim in _heads(s, timed)
        for what in ("", "stream ")
    }


def _modulate_case(s: Any, dim: int, what: str) -> dict:
    import torch

    from nexus_rt.kernels.modulate import modulate, modulate_ref

    length = 7 if s.dry else 1311
    x, y = s.random(2, length, dim), s.random(2, length, dim)
    scale, shift, gate = (s.random(2, dim, dtype=torch.float32) for _ in range(3))
    total, out = modulate(x, scale, shift, 1e-6, y, gate)
    stream = (x.double() + y.double() * gate.double()[:, None]).to(x.dtype).double()
    eager = modulate_ref(x, scale, shift, 1e-6, y, gate)
    if what:
        return oracles.compare(total, stream, eager[0])
    return oracles.compare(out, oracles.layer_norm(stream, scale, shift), eager[1])


def _qk_norm_rope(s: Any, timed: bool) -> Cases:
    return {
        f"{which} {heads * head_dim}": partial(_qk_norm_rope_case, s, heads, head_dim, which)
        for heads, head_dim in _heads(s, timed)
        for which in "qk"
    }


def _qk_norm_rope_case(s: Any, heads: int, head_dim: int, which: str) -> dict:
    import torch

    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

    dim, length, i = heads * head_dim, 7 if s.dry else 1311, "qk".index(which)
    qkv, weights = s.random(2, length, 3 * dim), [s.random(dim) for _ in range(2)]
    angle = s.random(length, head_dim // 2, dtype=torch.float32)
    args = (qkv, *weights, angle.cos(), angle.sin(), heads, 1e-6)
    wanted = oracles.norm_rope(qkv.double().chunk(3, -1)[i], weights[i], angle, heads)
    return oracles.compare(qk_norm_rope(*args)[i], wanted, qk_norm_rope_ref(*args)[i])


def _rows(s: Any, timed: bool) -> Cases:
    # Triton's interpreter rounds to fp8 wrongly
    widths = (
        () if s.dry else ((5120, ""), (13824, "GELU ")) if timed else ((1536, ""), (8960, "GELU "))
    )
    return {f"{what}{dim}": partial(_rows_case, s, dim, bool(what)) for dim, what in widths}


def _rows_case(s: Any, dim: int, gelu: bool) -> dict:
    from nexus_rt.kernels.quantise_rows import quantise_rows, quantise_rows_ref

    x = s.random(2, 1311, dim)
    y = x.flatten(0, 1).double()
    if gelu:
        y = oracles.gelu(y)
    return oracles.compare_rows(quantise_rows(x, gelu), quantise_rows_ref(x, gelu), y)


def _modulate_rows(s: Any, timed: bool) -> Cases:
    return {
        f"{heads * head_dim}": partial(_modulate_rows_case, s, heads * head_dim)
        for heads, head_dim in _heads(s, timed)
        if not s.dry
    }


def _modulate_rows_case(s: Any, dim: int) -> dict:
    import torch

    from nexus_rt.kernels.modulate import modulate_rows, modulate_rows_ref

    x, y = s.random(2, 1311, dim), s.random(2, 1311, dim)
    scale, shift, gate = (s.random(2, dim, dtype=torch.float32) for _ in range(3))
    args = (x, scale, shift, 1e-6, y, gate)
    stream = (x.double() + y.double() * gate.double()[:, None]).to(x.dtype).double()
    wanted = oracles.layer_norm(stream, scale, shift).flatten(0, 1)
    return oracles.compare_rows(modulate_rows(*args)[1], modulate_rows_ref(*args)[1], wanted)


def key_counts(s: Any) -> tuple:
    """(keys, whether they have a bias): a last block in part, whole blocks, a prompt's."""
    return ((7 if s.dry else 1311, False), (64 if s.dry else 1280, False), (77, True))


def _attention(s: Any, timed: bool) -> Cases:
    from nexus_rt.kernels.attention_launch import LOADS, TIMED

    out: Cases = {}
    for heads, head_dim in _heads(s, timed):
        for keys, biased in key_counts(s):
            label, shape = attention_label(heads, head_dim, keys, biased), (heads, head_dim, keys)
            for loads in LOADS[:2] if s.dry else LOADS[:3] if biased else TIMED:
                call = partial(_attention_case, s, *shape, biased, loads)
                out[f"{label}, {loads}"] = call
            if not biased:
                for loads in LOADS[:3] if s.dry else TIMED:
                    call = partial(_attention_case, s, *shape, False, loads, True)
                    out[f"far {label}, {loads}"] = call
    return out


def attention_label(heads: int, head_dim: int, keys: int, biased: bool) -> str:
    return f"{head_dim} x{heads} {keys} keys{' biased' if biased else ''}"


def qkv(
    s: Any, heads: int, head_dim: int, keys: int, biased: bool, far: bool = False, dtype: Any = None
) -> tuple[Any, Any, Any, Any]:
    """far: every score is far below 0: at most -300, whose exponential's inverse is infinite."""
    import torch

    q = s.random(2, 7 if s.dry else 1311, heads, head_dim, dtype=dtype)
    k, v = (s.random(2, keys, heads, head_dim, dtype=dtype) for _ in range(2))
    if far:
        q[..., 0], k[..., 0] = FAR, -FAR
    return q, k, v, s.random(2, keys, dtype=torch.float32) if biased else None


def _attention_case(
    s: Any, heads: int, head_dim: int, keys: int, biased: bool, loads: str, far: bool = False
) -> dict:
    import torch

    from nexus_rt.kernels.attention import attention

    # descriptors take 16 bits, and the interpreter computes bfloat16 wrongly
    dtype = torch.float16 if s.dry and loads == "descriptors" else None
    q, k, v, bias = qkv(s, heads, head_dim, keys, biased, far, dtype)
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    per_head = [t.transpose(1, 2) for t in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    plain = sdpa(per_head[0], per_head[1], per_head[2], attn_mask=mask).transpose(1, 2)
    # a score's last place, which the sum of a product may be off by several of
    slack = 4 * FAR**2 / math.sqrt(head_dim) * 2.0**-24 if far else 1e-6
    wanted = oracles.attention(q, k, v, bias)
    return oracles.compare(attention(q, k, v, bias, loads), wanted, plain, slack)


def _attention_fp8(s: Any, timed: bool) -> Cases:
    from nexus_rt.kernels.attention_launch import FP8_HEAD_DIMS, LOADS, TIMED

    return {
        f"{'far ' if far else ''}{attention_label(heads, head_dim, keys, biased)}, {loads}": (
            partial(_attention_fp8_case, s, heads, head_dim, keys, biased, loads, far)
        )
        for heads, head_dim in _heads(s, timed)
        # Triton's interpreter rounds to fp8 wrongly
        if head_dim in FP8_HEAD_DIMS and not s.dry
        for keys, biased in key_counts(s)
        for far in ((False,) if biased else (False, True))
        for loads in (LOADS[:3] if biased else TIMED)
    }


def _attention_fp8_case(
    s: Any, heads: int, head_dim: int, keys: int, biased: bool, loads: str, far: bool = False
) -> dict:
    from nexus_rt.kernels.attention_fp8 import attention_fp8
    from nexus_rt.ops.attention import APPROXIMATE

    args = qkv(s, heads, head_dim, keys, biased, far)
    wanted = oracles.attention(*args)
    share = float((attention_fp8(*args, loads).double() - wanted).norm() / wanted.norm())
    return {"relative_error": share, "allowed": APPROXIMATE, "right": share <= APPROXIMATE}


def _linear_gelu(s: Any, timed: bool) -> Cases:
    widths = {
        c["num_attention_heads"] * c["attention_head_dim"]: c["ffn_dim"]
        for c in reversed(s.configs.values())
    }
    return {
        f"{dim}": partial(_linear_gelu_case, s, dim, inner)
        for dim, inner in widths.items()
        if timed
    }


def _linear_gelu_case(s: Any, dim: int, inner: int) -> dict:
    from nexus_rt.ops.block_ops import TORCH, linear_gelu_epilogue

    x, bias = s.random(2, 7 if s.dry else 500, dim), s.random(inner)
    weight = s.random(inner, dim) / dim**0.5
    y = x.double() @ weight.double().T + bias.double()
    wanted = oracles.gelu(y)
    eager = TORCH.linear_gelu(x, weight, bias)
    return oracles.compare(linear_gelu_epilogue(x, weight, bias), wanted, eager)


def _predictions(s: Any, height: int, width: int) -> tuple[tuple[Any, Any, Any, Any], Any, Any]:
    """Four predictions in the setting's dtype, guidance scales, and the guided velocities in
    float64."""
    small, small_u, large, large_u = (s.random(2, 4, 3, height, width) for _ in range(4))
    pairs, scales = ((small, small_u), (large, large_u)), (5.0, 3.0)
    guided = [
        u.double() + scale * (c.double() - u.double())
        for (c, u), scale in zip(pairs, scales, strict=True)
    ]
    return (small, small_u, large, large_u), scales, guided


def _band_blend(s: Any, timed: bool) -> Cases:
    return {
        f"{what}{h}x{w}": partial(_band_blend_case, s, h, w, what)
        for h, w in planes(s, timed)
        for what in ("", "sums ")
    }


def _band_blend_case(s: Any, height: int, width: int, what: str) -> dict:
    from nexus_rt.kernels.band_blend import band_blend, band_blend_ref

    four, scales, (v_small, v_large) = _predictions(s, height, width)
    got, sums = band_blend(*four, scales, 0.4, 0.42, 0.18, 0.2)
    wanted = 0.4 * v_large + 0.42 * v_small + 0.18 * oracles.stencil(v_small, 0.2)
    if not what:
        eager = band_blend_ref(*four, scales, 0.4, 0.42, 0.18, 0.2)[0]
        return oracles.compare(got, wanted, eager)
    squares = oracles.squares(v_small, v_large, wanted)
    eager = oracles.squares(v_small.float(), v_large.float(), got)
    return oracles.compare(sums.sum(-1) / squares, squares / squares, eager / squares)


def _band_filter(s: Any, timed: bool) -> Cases:
    return {
        f"{split} {lowpass} {h}x{w}": partial(_band_filter_case, s, h, w, split, lowpass)
        for h, w in planes(s, timed)
        for split, lowpass in (("fft", "gaussian"), ("dct", "butterworth"))
    }


def _band_filter_case(s: Any, height: int, width: int, split: str, lowpass: str) -> dict:
    from nexus_rt.kernels.band_filter import band_filter, band_filter_ref
    from nexus_rt.method.filters import split_filter

    four, scales, (v_small, v_large) = _predictions(s, height, width)
    x = v_small - v_large
    f = split_filter(height, width, split, lowpass, 2, 0.43, s.device)
    args = (*four, scales, 0.42, 0.18, f.left, f.right, f.gain)
    wanted = v_large + 0.42 * x + 0.18 * oracles.low_pass(x, split, lowpass, 0.43)
    return oracles.compare(band_filter(*args)[0], wanted, band_filter_ref(*args)[0])


def _solver_step(s: Any, timed: bool) -> Cases:
    return {f"{h}x{w}": partial(_solver_step_case, s, h, w) for h, w in planes(s, timed)}


def _solver_step_case(s: Any, height: int, width: int) -> dict:
    import torch

    from nexus_rt.kernels.solver_step import solver_step, solver_step_ref

    x, v, last, m1, m2 = (s.random(2, 4, 3, height, width, dtype=torch.float32) for _ in range(5))
    scalars = [0.9, 0.7, -0.2, 0.35, 0.11, 0.83, 0.4, -0.09]
    squares = oracles.squares(x, m1, v).double()
    sums = (squares[..., None] / 700).expand(3, 2, 700).float().contiguous()
    args = (x, v, None, 1.0, sums, "progressive", 0.6, scalars, [last, m1, m2], 3, 2)
    wanted = oracles.solver_step(x, v, squares, 0.6, scalars, last, m1, m2)
    return oracles.compare(solver_step(*args)[0], wanted, solver_step_ref(*args)[0])


def _beyond_int32(s: Any, timed: bool) -> Cases:
    """Tensors of more than 2^31 elements, checked at their end."""
    if s.dry or timed:
        return {}
    kinds = (_modulate_beyond, _qk_norm_rope_beyond, _band_blend_beyond)
    return {f.__name__.strip("_").removesuffix("_beyond"): partial(f, s) for f in kinds}


END = slice(-64, None)


def _modulate_beyond(s: Any) -> dict:
    import torch

    from nexus_rt.kernels.modulate import modulate, modulate_ref

    zeros = torch.zeros(1, 5120, device=s.device)
    x = s.random(1, 430_000, 5120)
    got = modulate(x, zeros, zeros, 1e-6)[1][:, END]
    last = x[:, END].clone()
    eager = modulate_ref(last, zeros, zeros, 1e-6)[1]
    return oracles.compare(got, oracles.layer_norm(last.double(), zeros, zeros), eager)


def _qk_norm_rope_beyond(s: Any) -> dict:
    import torch

    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

    qkv, weight = s.random(1, 145_000, 3 * 5120), s.random(5120)
    angle = s.random(145_000, 64, dtype=torch.float32)
    got = qk_norm_rope(qkv, weight, weight, angle.cos(), angle.sin(), 40, 1e-6)[1][:, END]
    last, turn = qkv[:, END].clone(), angle[END].clone()
    eager = qk_norm_rope_ref(last, weight, weight, turn.cos(), turn.sin(), 40, 1e-6)[1]
    wanted = oracles.norm_rope(last.double().chunk(3, -1)[1], weight, turn, 40)
    return oracles.compare(got, wanted, eager)


def _band_blend_beyond(s: Any) -> dict:
    from nexus_rt.kernels.band_blend import band_blend, band_blend_ref

    small = s.random(1, 16, 9400, 90, 160)
    rest: Any = (None, None, None, (1.0, 1.0), 0.0, 0.7, 0.3, 0.2)
    got = band_blend(small, *rest)[0][:, -1, END]
    last = small[:, -1, END].clone()[:, None]
    wanted = 0.7 * last.double() + 0.3 * oracles.stencil(last.double(), 0.2)
    return oracles.compare(got[:, None], wanted, band_blend_ref(last, *rest)[0])


CHECKS: dict[str, Callable[[Any, bool], Cases]] = {
    "modulate": _modulate,
    "qk_norm_rope": _qk_norm_rope,
    "linear_gelu": _linear_gelu,
    "attention": _attention,
    "band_blend": _band_blend,
    "solver_step": _solver_step,
    "band_filter": _band_filter,
    "modulate_rows": _modulate_rows,
    "quantise_rows": _rows,
    "attention_fp8": _attention_fp8,
    "beyond_int32": _beyond_int32,
}


def cases(s: Any) -> Cases:
    """Every case: "kernel label" -> its comparison."""
    return {
        f"{name} {label}": call
        for name, check in CHECKS.items()
        for timed in (True, False)
        for label, call in check(s, timed).items()
    }
