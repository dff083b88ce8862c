"""Forward attention without a mask, softmax taken block by block (FlashAttention-2's order of work, arXiv 2307.08691).

    out = softmax(q k^T / sqrt(head_dim) + bias) v          bias: one number a key, or none

A program holds a block of queries and walks the keys: running maximum, running sum, running output. The bias serves
Wan's zero padding: its equal keys are kept once with the logarithm of their count (`collapse_padding`).

Flops: 4 Lq Lk head_dim a head (at 32,760 x 32,760 x 128, 40 heads: 22 TFLOP); bytes: q, k, v and out once, 1.3 GB there:
the matrix units are the roof. Takes `qk_norm_rope`'s output and the V third of the fused projection where they lie:
only the last dimension must be contiguous.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nexus_rt.kernels.op import DTYPES, Variant, kernel_op, launchable, tl, triton

HEAD_DIMS = (16, 32, 64, 128)

if triton is not None:

    @triton.jit
    def _attention_kernel(
        q_ptr,  # [B, Lq, heads, D]
        k_ptr,  # [B, Lk, heads, D]
        v_ptr,  # [B, Lk, heads, D]
        bias_ptr,  # [B, Lk] float32, or unused
        out_ptr,  # [B, Lq, heads, D], contiguous
        q_batch, q_token, q_head,
        k_batch, k_token, k_head,
        v_batch, v_token, v_head,
        heads,
        queries,  # Lq
        keys,  # Lk
        scale,  # 1 / sqrt(D) * log2(e): the softmax is taken in powers of two
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        WHOLE_KEYS: tl.constexpr,  # Lk is a multiple of COLUMNS
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        batch = (tl.program_id(1) // heads).to(tl.int64)
        head = (tl.program_id(1) % heads).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        d = tl.arange(0, D)
        q_at = q_ptr + batch * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_token + d[None, :]
        k_at = k_ptr + batch * k_batch + head * k_head + column.to(tl.int64)[None, :] * k_token + d[:, None]
        v_at = v_ptr + batch * v_batch + head * v_head + column.to(tl.int64)[:, None] * v_token + d[None, :]
        q = tl.load(q_at, mask=row[:, None] < queries, other=0.0)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, D], tl.float32)
        for start in range(0, keys, COLUMNS):
            if WHOLE_KEYS:
                k = tl.load(k_at)
                v = tl.load(v_at)
            else:
                left = keys - start
                k = tl.load(k_at, mask=column[None, :] < left, other=0.0)
                v = tl.load(v_at, mask=column[:, None] < left, other=0.0)
            score = tl.dot(q, k, input_precision=PRECISION) * scale
            if HAS_BIAS:
                bias = tl.load(bias_ptr + batch * keys + start + column, mask=start + column < keys, other=0.0)
                score += (bias * 1.4426950408889634)[None, :]
            if not WHOLE_KEYS:
                score = tl.where((start + column < keys)[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            if HAS_BIAS:  # a block whose keys all count for nothing must not make -inf - -inf
                base = tl.where(higher == float("-inf"), 0.0, higher)
            else:
                base = higher
            share = tl.exp2(score - base[:, None])
            fade = tl.exp2(peak - base)
            total = total * fade + tl.sum(share, 1)
            out = out * fade[:, None]
            out = tl.dot(share.to(v.dtype), v, out, input_precision=PRECISION)
            peak = higher
            k_at += COLUMNS * k_token
            v_at += COLUMNS * v_token
        out = out / total[:, None]
        place = ((batch * queries + row.to(tl.int64)[:, None]) * heads + head) * D + d[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=row[:, None] < queries)

else:
    _attention_kernel = None


def launch_config(head_dim: int, element_size: int, capability: tuple[int, int]) -> dict[str, int]:
    """128 queries a program; as many stages of keys and values as shared memory holds (99 KiB on the small chips)."""
    small = element_size > 2 or capability in ((8, 6), (8, 9), (12, 0))
    columns = 32 if element_size > 2 else 64
    return {"ROWS": 64 if element_size > 2 else 128, "COLUMNS": columns, "num_warps": 8 if head_dim == 128 else 4,
            "num_stages": 2 if small else 3}  # fmt: skip


def variants() -> list[Variant]:
    """What Wan's transformers and the mini pair launch in bfloat16: self-attention, and cross-attention with a bias."""
    out = []
    for head_dim in (128, 64, 32):
        for arches, capability in (((80, 90, 100), (9, 0)), ((120,), (12, 0))):
            config = launch_config(head_dim, 2, capability)
            for mode, bias, whole in (("self", False, False), ("self, whole blocks", False, True), ("cross", True, False)):
                signature = {n: "*bf16" for n in ("q_ptr", "k_ptr", "v_ptr", "out_ptr")} | {
                    "bias_ptr": "*fp32",
                    "scale": "fp32",
                }
                strides = [f"{t}_{n}" for t in "qkv" for n in ("batch", "token", "head")]
                signature |= dict.fromkeys(strides, "i32") | dict.fromkeys(("heads", "queries", "keys"), "i32")
                constants = {"D": head_dim, "ROWS": config["ROWS"], "COLUMNS": config["COLUMNS"], "HAS_BIAS": bias,
                             "WHOLE_KEYS": whole, "PRECISION": "ieee"}  # fmt: skip
                label = f"attention {mode} {head_dim}"
                warps, stages = config["num_warps"], config["num_stages"]
                out.append(Variant(label, _attention_kernel, signature, constants, warps, stages, arches, tuple(strides)))
    return out


def attention_ref(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch, float32; shapes as in `attention`."""
    score = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / math.sqrt(q.shape[-1])
    if bias is not None:
        score = score + bias[:, None, None, :]
    return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v.float()).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected [B, Lq, heads, D] "
            "and twice [B, Lk, heads, D]."
        )
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"attention: head_dim is {q.shape[-1]}; the kernel takes {', '.join(map(str, HEAD_DIMS))}.")
    if 0 in k.shape[:2]:
        raise ValueError("attention: there are no keys; the softmax of nothing is not defined.")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype != q.dtype or t.dtype not in DTYPES or t.device != q.device:
            raise ValueError(
                f"attention: {name} is {t.dtype} on {t.device}; expected one of q's {q.dtype}, a float, on {q.device}."
            )
        aligned = (
            all(s % (16 // t.element_size()) == 0 for s in t.stride()[:-1])
            and t.storage_offset() % (16 // t.element_size()) == 0
        )
        if t.stride(-1) != 1 or not aligned:
            raise ValueError(
                f"attention: {name} has strides {t.stride()}; the last dimension must be contiguous and rows start at 16 bytes."
            )
    if bias is not None and (
        tuple(bias.shape) != tuple(k.shape[:2]) or bias.dtype != torch.float32 or not bias.is_contiguous()
    ):
        raise ValueError(
            f"attention: bias is {bias.dtype} {tuple(bias.shape)}; expected contiguous float32 {tuple(k.shape[:2])}."
        )


@kernel_op("attention")
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(q, k, v, bias)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    out = torch.empty(batch, queries, heads, head_dim, dtype=q.dtype, device=q.device)
    if out.numel():
        capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
        config = launch_config(head_dim, q.element_size(), capability)
        grid = (-(-queries // config["ROWS"]), batch * heads)
        launchable(_attention_kernel)[grid](
            q, k, v, q if bias is None else bias, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            heads, queries, keys, math.log2(math.e) / math.sqrt(head_dim), D=head_dim, HAS_BIAS=bias is not None,
            WHOLE_KEYS=keys % config["COLUMNS"] == 0, PRECISION="ieee", **config,
        )  # fmt: skip
    return out


@_attention.register_fake
def _(q, k, v, bias=None):
    return q.new_empty(q.shape)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of every head.

    Args:
        q: [B, Lq, heads, head_dim]; head_dim 16, 32, 64 or 128; float32, float16 or bfloat16.
        k, v: [B, Lk, heads, head_dim]. Any strides, so long as the last dimension is contiguous and rows start at
            multiples of 16 bytes: a third of a fused projection is read where it lies.
        bias: added to every score of a key, [B, Lk] float32, contiguous; -inf leaves a key out. At least one key of
            each sample must count.

    Returns:
        [B, Lq, heads, head_dim], contiguous, in q's dtype.

    Raises:
        ValueError: a shape, dtype, device or stride that the kernel does not take; says which.
    """
    return _attention(q, k, v, bias)
