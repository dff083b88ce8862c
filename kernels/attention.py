"""Forward attention without a mask, softmax taken block by block (FlashAttention-2's order of work,
arXiv 2307.08691).

    out = softmax(q k^T / sqrt(head_dim) + bias) v          bias: one number a key, or none

A program holds a block of queries and walks the keys: running maximum, running sum, running output.
The bias serves Wan's zero padding: its equal keys are kept once with the logarithm of their count
(`collapse_padding`).

Flops: 4 Lq Lk head_dim a head (at 32,760 x 32,760 x 128, 40 heads: 22 TFLOP); bytes: q, k, v and
out once, 1.3 GB there: the matrix units are the roof, and beside them every instruction a score
costs (`bench/sass.py` counts them). So 1 / sqrt(head_dim) is folded into the exponent, and no score
is masked: descriptors fill the tile past the last key with zeros, whose share is taken out of the
sum at the end,

    sum - padding 2^(0 - maximum),      and out of `out` there is nothing to take: those v are 0.

With padding the maximum is at least the padding's own score, 0, so that this power is at most 1.
Without padding the maximum may be far below 0: the exponent is clamped, as 0 keys times an infinite
power would be NaN.

A row is flagged in two cases. Its own scores are all so negative that the difference cancels (its
sum is below `ILL` of the padding's share). Or its maximum is beyond `FAR`: a GPU multiplies and
subtracts with one rounding, so an exponent is off by up to half a unit in the maximum's last place,
which is 1 there, and overflows from 2^28. A second launch computes the blocks of flagged rows
again, masked and with two roundings; without a flag it ends where it begins. Tiles by pointers and
whole blocks have no second launch: their scores, in powers of two, hold up to 2^27.

Takes `qk_norm_rope`'s output and the V third of the fused projection where they lie: only the last
dimension must be contiguous. `attention_fp8.py` launches the same kernel on bytes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from nexus_rt.kernels.attention_launch import (
    HEAD_DIMS,
    again_config,
    capability_of,
    flags,
    launch_config,
    resolve_loads,
)
from nexus_rt.kernels.attention_launch import LOADS as LOADS
from nexus_rt.kernels.triton_op import DTYPES, Variant, kernel_op, launch, tl, triton

SHIFT = (
    8.0  # shares, at most 1, are 2^8 as large in e4m3; so is their sum, and the quotient the same
)
ILL = 1 / 16  # of the padding's share: 24 bits less these leave more than bfloat16 has
TINY = 2.0**-126  # float32's smallest normal number
FAR = 2.0**24  # a maximum, in powers of two, whose last place is 2

if triton is not None:
    _SHIFT = tl.constexpr(SHIFT)
    _ILL = tl.constexpr(ILL)
    _FAR = tl.constexpr(FAR)
    _TINY = tl.constexpr(TINY)
    _LOG2E = tl.constexpr(math.log2(math.e))

    @triton.jit
    def _attention_kernel(
        q_ptr,  # [B, Lq, heads, D]
        k_ptr,  # [B, Lk, heads, D]
        v_ptr,  # [B, Lk, heads, D]; FP8: [B, heads, D, >= Lk], as the matrix units read bytes
        bias_ptr,  # [B, Lk] float32, or unused
        q_scale_ptr,  # FP8: [B, heads, blocks of ROWS]
        k_scale_ptr,  # FP8: [B, heads, blocks of COLUMNS]
        v_scale_ptr,  # FP8: [B, heads]
        flag_ptr,  # [B, heads, Lq] int8: rows to compute again; or unused
        out_ptr,  # [B, Lq, heads, D], contiguous
        q_batch,
        q_token,
        q_head,
        k_batch,
        k_token,
        k_head,
        v_batch,
        v_token,
        v_head,
        heads,
        queries,  # Lq
        keys,  # Lk
        scale,  # 1 / sqrt(D) * log2(e): the softmax is taken in powers of two
        D: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        MASKED: tl.constexpr,  # scores past the last key are left out one by one
        PRECISION: tl.constexpr,
        FP8: tl.constexpr,
        DESCRIPTORS: tl.constexpr,  # tiles come by the tensor memory accelerator; heads end to end
        SPECIALISED: tl.constexpr,  # one warp group loads, the others compute
        AHEAD: tl.constexpr,  # the next block's scores are begun before this one's softmax
        AGAIN: tl.constexpr,  # only programs with a flagged row
    ):
        batch = (tl.program_id(1) // heads).to(tl.int64)
        head = tl.program_id(1) % heads
        pair = tl.program_id(1).to(tl.int64)  # of sample and head
        first = tl.program_id(0) * ROWS
        row = first + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        d = tl.arange(0, D)
        if AGAIN:
            flags = tl.load(flag_ptr + pair * queries + row, mask=row < queries, other=0)
            if tl.max(flags.to(tl.int32), 0) == 0:
                return
        if DESCRIPTORS:
            q_tiles = tl.make_tensor_descriptor(
                q_ptr + batch * q_batch, [queries, heads * D], [q_token, 1], [ROWS, D]
            )
            k_tiles = tl.make_tensor_descriptor(
                k_ptr + batch * k_batch, [keys, heads * D], [k_token, 1], [COLUMNS, D]
            )
            if FP8:
                v_tiles = tl.make_tensor_descriptor(
                    v_ptr + batch * v_batch, [heads * D, v_token], [v_token, 1], [D, COLUMNS]
                )
            else:
                v_tiles = tl.make_tensor_descriptor(
                    v_ptr + batch * v_batch, [keys, heads * D], [v_token, 1], [COLUMNS, D]
                )
            q = q_tiles.load([first, head * D])
        else:
            head64 = head.to(tl.int64)
            q_at = (
                q_ptr
                + batch * q_batch
                + head64 * q_head
                + row.to(tl.int64)[:, None] * q_token
                + d[None, :]
            )
            k_at = (
                k_ptr
                + batch * k_batch
                + head64 * k_head
                + column.to(tl.int64)[None, :] * k_token
                + d[:, None]
            )
            v_base = v_ptr + batch * v_batch + head64 * v_head
            if FP8:
                v_at = v_base + column[:, None] + d.to(tl.int64)[None, :] * v_token
            else:
                v_at = v_base + column.to(tl.int64)[:, None] * v_token + d[None, :]
            q = tl.load(q_at, mask=row[:, None] < queries, other=0.0)
        by = scale
        if FP8:
            k_scale_at = k_scale_ptr + pair * tl.cdiv(keys, COLUMNS)
            scale *= tl.load(q_scale_ptr + pair * tl.num_programs(0) + tl.program_id(0))
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, D], tl.float32)
        if AHEAD:
            following = tl.dot(q, k_tiles.load([0, head * D]).T, input_precision=PRECISION)
        for start in tl.range(0, keys, COLUMNS, warp_specialize=SPECIALISED):
            left = keys - start
            if AHEAD:
                score = following
                k = k_tiles.load([start + COLUMNS, head * D]).T  # zeros, past the last
                following = tl.dot(q, k, input_precision=PRECISION)
            else:
                if DESCRIPTORS:
                    k = k_tiles.load([start, head * D]).T
                elif MASKED:
                    k = tl.load(k_at, mask=column[None, :] < left, other=0.0)
                else:
                    k = tl.load(k_at)
                score = tl.dot(q, k, input_precision=PRECISION)
            if FP8:
                # not 0, as a product of small scales may be: masked scores are minus infinity
                by = tl.maximum(scale * tl.load(k_scale_at + start // COLUMNS), _TINY)
            if HAS_BIAS:  # minus infinity past the last key
                bias = tl.load(
                    bias_ptr + batch * keys + start + column,
                    mask=column < left,
                    other=float("-inf"),
                )
                score = score * by + (bias * _LOG2E)[None, :]
                higher = tl.maximum(peak, tl.max(score, 1))
                # a block whose keys all count for nothing must not make -inf - -inf
                base = tl.where(higher == float("-inf"), 0.0, higher)
                exponent = score - (base - _SHIFT if FP8 else base)[:, None]
            elif AGAIN:  # the mask between product and difference keeps them two roundings
                score = tl.where((column < left)[None, :], score * by, float("-inf"))
                higher = tl.maximum(peak, tl.max(score, 1))
                base = higher
                exponent = score - (base - _SHIFT if FP8 else base)[:, None]
            else:
                if MASKED:
                    score = tl.where((column < left)[None, :], score, float("-inf"))
                higher = tl.maximum(peak, tl.max(score, 1) * by)
                base = higher
                exponent = score * by - (base - _SHIFT if FP8 else base)[:, None]
            share = tl.exp2(exponent)
            fade = tl.exp2(peak - base)
            total = total * fade + tl.sum(share, 1)
            if FP8:
                if DESCRIPTORS:
                    v = v_tiles.load([head * D, start]).T
                else:
                    v = tl.load(v_at, mask=column[:, None] < left, other=0.0)
                # summed apart from `out`: the matrix units add bytes' products in less than float32
                product = tl.dot(share.to(v.dtype), v, max_num_imprecise_acc=COLUMNS)
                out = out * fade[:, None] + product
            else:
                out = out * fade[:, None]
                if DESCRIPTORS:
                    v = v_tiles.load([start, head * D])
                elif MASKED:
                    v = tl.load(v_at, mask=column[:, None] < left, other=0.0)
                else:
                    v = tl.load(v_at)
                out = tl.dot(share.to(v.dtype), v, out, input_precision=PRECISION)
            peak = higher
            if not DESCRIPTORS:
                k_at += COLUMNS * k_token
                v_at += COLUMNS if FP8 else COLUMNS * v_token
        if DESCRIPTORS and not HAS_BIAS and not MASKED:
            padding = tl.cdiv(keys, COLUMNS) * COLUMNS - keys
            least = -tl.maximum(peak, 0.0)  # bounds the power: 0 keys times infinity would be NaN
            taken = padding * tl.exp2(least + _SHIFT if FP8 else least)
            total -= taken
            flag = ((total < taken * _ILL) | (peak > _FAR)).to(tl.int8)
            tl.store(flag_ptr + pair * queries + row, flag, mask=row < queries)
        out = out / total[:, None]
        if FP8:
            out *= tl.load(v_scale_ptr + pair)
        place = ((batch * queries + row.to(tl.int64)[:, None]) * heads + head) * D + d[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=row[:, None] < queries)

else:
    _attention_kernel = None


def kernel_variants(name: str, fp8: bool, launches: tuple) -> list[Variant]:
    """Ahead-of-time variants of the kernel: launches are (arches, capability, loads, biased)."""
    out: dict[tuple, Variant] = {}
    kind = "*fp8e4nv" if fp8 else "*bf16"
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), kind) | {"out_ptr": "*bf16"}
    pointers |= dict.fromkeys(("bias_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
    strides = tuple(f"{t}_{n}" for t in "qkv" for n in ("batch", "token", "head"))
    integers = dict.fromkeys((*strides, "heads", "queries", "keys"), "i32")
    signature = {**pointers, "flag_ptr": "*i8", **integers, "scale": "fp32"}

    def add(mode: str, loads: str, arches: tuple, config: dict, constants: dict) -> None:
        config = dict(config)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        label = f"{name} {mode}, {loads} {constants['D']}"
        made = Variant(
            label, _attention_kernel, signature, {**config, **constants}, warps, stages, arches
        )
        out[label, arches] = replace(made, aligned=strides)

    for head_dim in (128, 64) if fp8 else (128, 64, 32):
        for arches, capability, loads, biased in launches:
            config = launch_config(head_dim, 1 if fp8 else 2, capability, loads, fp8)
            own = lambda keys, c=config, d=head_dim, b=biased, how=loads: flags(
                keys, d, b, how, fp8, c
            )
            mode = "cross" if biased else "self"
            add(mode, loads, arches, config, own(1))
            if loads == "pointers" and not own(config["COLUMNS"])["MASKED"]:
                add(f"{mode}, whole blocks", loads, arches, config, own(config["COLUMNS"]))
            if loads != "pointers" and not biased:
                once_more = flags(1, head_dim, False, "descriptors", fp8, config, again=True)
                add(f"{mode} again", "descriptors", arches, again_config(config), once_more)
    return list(out.values())


def variants() -> list[Variant]:
    """What Wan's transformers and the mini pair launch in bfloat16: self-attention, and
    cross-attention with a bias; and what the GPU suite times beside them."""
    return kernel_variants(
        "attention",
        False,
        (
            ((80,), (8, 0), "pointers", False),
            ((80,), (8, 0), "pointers", True),
            ((90,), (9, 0), "specialised", False),
            ((90,), (9, 0), "descriptors", False),
            ((90,), (9, 0), "ahead", False),
            ((90,), (9, 0), "pointers", True),
            ((90,), (9, 0), "pointers", False),
            ((100,), (10, 0), "specialised", False),
            ((100,), (10, 0), "pointers", True),
            ((120,), (12, 0), "descriptors", False),
            ((120,), (12, 0), "pointers", True),
        ),
    )


def attention_ref(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch, float32; shapes as in `attention`."""
    score = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / math.sqrt(q.shape[-1])
    if bias is not None:
        score = score + bias[:, None, None, :]
    return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v.float()).to(q.dtype)


def check_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    """Raise a `ValueError` unless the kernel takes these tensors."""
    if (
        q.ndim != 4
        or k.ndim != 4
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[2:] != k.shape[2:]
    ):
        raise ValueError(
            f"attention: q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)};"
            " expected [B, Lq, heads, D] and twice [B, Lk, heads, D]."
        )
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"attention: head_dim is {q.shape[-1]}; the kernel takes"
            f" {', '.join(map(str, HEAD_DIMS))}."
        )
    if 0 in k.shape[:2]:
        raise ValueError("attention: there are no keys; the softmax of nothing is not defined.")
    if (
        max(q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]) >= 2**31
        or q.shape[0] * q.shape[2] > 65535
    ):
        raise ValueError(
            f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} are beyond the grid: up to 2^31"
            " tokens in all and 65535 samples x heads; run samples in smaller batches."
        )
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype != q.dtype or t.dtype not in DTYPES or t.device != q.device:
            raise ValueError(
                f"attention: {name} is {t.dtype} on {t.device}; expected one of q's {q.dtype}, a"
                f" float, on {q.device}."
            )
        aligned = (
            all(s % (16 // t.element_size()) == 0 for s in t.stride()[:-1])
            and t.storage_offset() % (16 // t.element_size()) == 0
        )
        if t.stride(-1) != 1 or not aligned:
            raise ValueError(
                f"attention: {name} has strides {t.stride()}; the last dimension must be contiguous"
                " and rows start at 16 bytes."
            )
    if bias is not None and (
        tuple(bias.shape) != tuple(k.shape[:2])
        or bias.dtype != torch.float32
        or not bias.is_contiguous()
    ):
        raise ValueError(
            f"attention: bias is {bias.dtype} {tuple(bias.shape)}; expected contiguous float32"
            f" {tuple(k.shape[:2])}."
        )


def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel makes, as Triton asks for it."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def launch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
    loads: str,
    config: dict[str, int],
) -> None:
    """One launch on checked tensors, and one for the rows it flags; `scales` of q, k and v where
    they are fp8."""
    batch, queries, heads, head_dim = q.shape
    keys, biased, fp8 = k.shape[1], bias is not None, scales is not None
    if loads != "pointers" and q.is_cuda:
        triton.set_allocator(allocate)
    v_strides = (v.stride(0), v.stride(2), v.stride(1)) if fp8 else v.stride()[:3]
    padded = loads != "pointers" and not biased
    flagged = q.new_empty(batch * heads * queries if padded else 0, dtype=torch.int8)

    def once(config: dict[str, int], constants: dict) -> None:
        launch(
            _attention_kernel,
            (-(-queries // config["ROWS"]), batch * heads),
            q,
            q,
            k,
            v,
            out if bias is None else bias,
            *((out,) * 3 if scales is None else scales),
            flagged,
            out,
            *q.stride()[:3],
            *k.stride()[:3],
            *v_strides,
            heads,
            queries,
            keys,
            math.log2(math.e) / math.sqrt(head_dim),
            **constants,
            **config,
        )

    once(config, flags(keys, head_dim, biased, loads, fp8, config))
    if padded and keys % config["COLUMNS"]:
        again = flags(keys, head_dim, False, "descriptors", fp8, config, again=True)
        once(again_config(config), again)


@kernel_op("attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, loads: str = "auto"
) -> Tensor:
    check_attention(q, k, v, bias)
    loads = resolve_loads(loads, q, k, v, bias is not None)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        config = launch_config(q.shape[3], q.element_size(), capability_of(q.device), loads)
        launch_attention(q, k, v, bias, None, out, loads, config)
    return out


@_attention.register_fake
def _(q, k, v, bias=None, loads="auto"):
    return q.new_empty(q.shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, loads: str = "auto"
) -> Tensor:
    """Softmax attention of every head.

    Args:
        q: [B, Lq, heads, head_dim]; head_dim 16, 32, 64 or 128; float32, float16 or bfloat16.
        k, v: [B, Lk, heads, head_dim]. Any strides, so long as the last dimension is contiguous and
            rows start at multiples of 16 bytes: a third of a fused projection is read where it
            lies.
        bias: added to every score of a key, [B, Lk] float32, contiguous; -inf leaves a key out. At
            least one key of each sample must count.
        loads: how tiles come: "pointers", "descriptors" (Hopper and later: the tensor memory
            accelerator), "specialised" (by a warp group of its own), "ahead" (descriptors, the next
            block's scores begun before this one's softmax), or "auto".

    Returns:
        [B, Lq, heads, head_dim], contiguous, in q's dtype.

    Raises:
        ValueError: a shape, dtype, device, stride or loads that the kernel does not take; says
            which.
    """
    return _attention(q, k, v, bias, loads)
