"""Forward attention without a mask, softmax taken block by block (FlashAttention-2's order of work,
arXiv 2307.08691).

    out = softmax(q k^T / sqrt(head_dim) + bias) v          bias: one number a key, or none

A program holds a block of queries and walks the keys: running maximum, running sum, running output.
The bias serves Wan's zero padding: its equal keys are kept once with the logarithm of their count
(`collapse_padding`).

Flops: 4 Lq Lk head_dim a head (at 32,760 x 32,760 x 128, 40 heads: 22 TFLOP); bytes: q, k, v and
out once, 1.3 GB there: the matrix units are the roof. Takes `qk_norm_rope`'s output and the V third
of the fused projection where they lie: only the last dimension must be contiguous.
`attention_fp8.py` launches the same kernel on bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nexus_rt.kernels.triton_op import DTYPES, Variant, kernel_op, launch, tl, triton

HEAD_DIMS = (16, 32, 64, 128)
FP8_HEAD_DIMS = (64, 128)
LOADS = ("auto", "pointers", "descriptors", "specialised")
P_SCALE = 256.0  # shares, at most 1, as e4m3: a power of two, so taking it out again is exact

if triton is not None:
    _P_SCALE = tl.constexpr(P_SCALE)

    @triton.jit
    def _attention_kernel(
        q_ptr,  # [B, Lq, heads, D]
        k_ptr,  # [B, Lk, heads, D]
        v_ptr,  # [B, Lk, heads, D]; FP8: [B, heads, D, >= Lk], as the matrix units read bytes
        bias_ptr,  # [B, Lk] float32, or unused
        q_scale_ptr,  # FP8: [B, heads, blocks of ROWS]
        k_scale_ptr,  # FP8: [B, heads, blocks of COLUMNS], so v_scale
        v_scale_ptr,
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
        batches,
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
        FP8: tl.constexpr,
        # tiles come by the tensor memory accelerator; samples lie end to end, heads too
        DESCRIPTORS: tl.constexpr,
        SPECIALISED: tl.constexpr,  # one warp group loads, the others compute
    ):
        batch = tl.program_id(1) // heads
        head = tl.program_id(1) % heads
        batch64, head64 = batch.to(tl.int64), head.to(tl.int64)
        first = tl.program_id(0) * ROWS
        row = first + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        d = tl.arange(0, D)
        if DESCRIPTORS:
            q_tiles = tl.make_tensor_descriptor(
                q_ptr, [batches * queries, heads * D], [q_token, 1], [ROWS, D]
            )
            k_tiles = tl.make_tensor_descriptor(
                k_ptr, [batches * keys, heads * D], [k_token, 1], [COLUMNS, D]
            )
            if FP8:
                v_tiles = tl.make_tensor_descriptor(
                    v_ptr, [batches * heads * D, v_token], [v_token, 1], [D, COLUMNS]
                )
            else:
                v_tiles = tl.make_tensor_descriptor(
                    v_ptr, [batches * keys, heads * D], [v_token, 1], [COLUMNS, D]
                )
            q = q_tiles.load([batch * queries + first, head * D])
        else:
            q_at = (
                q_ptr
                + batch64 * q_batch
                + head64 * q_head
                + row.to(tl.int64)[:, None] * q_token
                + d[None, :]
            )
            k_at = (
                k_ptr
                + batch64 * k_batch
                + head64 * k_head
                + column.to(tl.int64)[None, :] * k_token
                + d[:, None]
            )
            v_base = v_ptr + batch64 * v_batch + head64 * v_head
            if FP8:
                v_at = v_base + column[:, None] + d.to(tl.int64)[None, :] * v_token
            else:
                v_at = v_base + column.to(tl.int64)[:, None] * v_token + d[None, :]
            q = tl.load(q_at, mask=row[:, None] < queries, other=0.0)
        if FP8:
            blocks = tl.cdiv(keys, COLUMNS)
            k_scale_at = k_scale_ptr + tl.program_id(1).to(tl.int64) * blocks
            v_scale_at = v_scale_ptr + tl.program_id(1).to(tl.int64) * blocks
            scale *= tl.load(
                q_scale_ptr + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            )
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, D], tl.float32)
        for start in tl.range(0, keys, COLUMNS, warp_specialize=SPECIALISED):
            left = keys - start
            if DESCRIPTORS:
                k = k_tiles.load([batch * keys + start, head * D]).T
            elif WHOLE_KEYS:
                k = tl.load(k_at)
            else:
                k = tl.load(k_at, mask=column[None, :] < left, other=0.0)
            if FP8:
                score = tl.dot(q, k) * (scale * tl.load(k_scale_at + start // COLUMNS))
            else:
                score = tl.dot(q, k, input_precision=PRECISION) * scale
            if HAS_BIAS:
                bias = tl.load(
                    bias_ptr + batch64 * keys + start + column, mask=column < left, other=0.0
                )
                score += (bias * 1.4426950408889634)[None, :]
            if not WHOLE_KEYS:
                score = tl.where((column < left)[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            if HAS_BIAS:  # a block whose keys all count for nothing must not make -inf - -inf
                base = tl.where(higher == float("-inf"), 0.0, higher)
            else:
                base = higher
            share = tl.exp2(score - base[:, None])
            fade = tl.exp2(peak - base)
            total = total * fade + tl.sum(share, 1)
            out = out * fade[:, None]
            if FP8:
                if DESCRIPTORS:
                    v = v_tiles.load([(batch * heads + head) * D, start]).T
                else:
                    v = tl.load(v_at, mask=column[:, None] < left, other=0.0)
                # summed apart from `out`: the matrix units add bytes' products in less than float32
                product = tl.dot((share * _P_SCALE).to(v.dtype), v, max_num_imprecise_acc=COLUMNS)
                out += product * (tl.load(v_scale_at + start // COLUMNS) * (1.0 / _P_SCALE))
            else:
                if DESCRIPTORS:
                    v = v_tiles.load([batch * keys + start, head * D])
                elif WHOLE_KEYS:
                    v = tl.load(v_at)
                else:
                    v = tl.load(v_at, mask=column[:, None] < left, other=0.0)
                out = tl.dot(share.to(v.dtype), v, out, input_precision=PRECISION)
            peak = higher
            if not DESCRIPTORS:
                k_at += COLUMNS * k_token
                v_at += COLUMNS if FP8 else COLUMNS * v_token
        out = out / total[:, None]
        place = ((batch64 * queries + row.to(tl.int64)[:, None]) * heads + head) * D + d[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=row[:, None] < queries)

else:
    _attention_kernel = None


def end_to_end(t: Tensor) -> bool:
    """Whether a [B, L, heads, D] tensor's samples and heads follow each other: what a
    two-dimensional tile can walk."""
    return t.stride(2) == t.shape[3] and (
        t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)
    )


def resolve_loads(
    loads: str, q: Tensor, k: Tensor, v: Tensor, biased: bool, fp8: bool = False
) -> str:
    """What "auto" stands for: the most that the chip, the layout and the compiler take.

    Hopper and data-centre Blackwell load by their tensor memory accelerator in a warp group of its
    own; a bias is loaded by ordinary instructions, which that split does not take (Triton 3.7), nor
    fp8 on Blackwell without spilling.
    """
    if loads not in LOADS:
        raise ValueError(f"attention: loads is {loads!r}; expected one of {', '.join(LOADS)}.")
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0
    # bytes are written end to end
    tiled = q.element_size() == 2 and (fp8 or all(end_to_end(t) for t in (q, k, v)))
    if loads == "auto":
        if major < 9 or not tiled:
            return "pointers"
        return (
            "specialised"
            if not biased and (major == 9 or (major == 10 and not fp8))
            else "descriptors"
        )
    if loads != "pointers" and not tiled:
        raise ValueError(
            f"attention: loads={loads!r} needs 16-bit tensors whose samples and heads lie end to"
            " end; use 'auto'."
        )
    if loads == "specialised" and biased:
        raise ValueError("attention: loads='specialised' takes no bias; use 'auto'.")
    return loads


def launch_config(
    head_dim: int,
    element_size: int,
    capability: tuple[int, int],
    loads: str = "pointers",
    fp8: bool = False,
) -> dict[str, int]:
    """128 queries a program, and as many stages of keys and values as shared memory holds without
    spilling registers.

    Specialised on Hopper, four warps load and twice four compute 64 queries each. Consumer chips
    have 99 KiB.
    """
    if element_size > 2:  # four warps spill up to 36 KB at head_dim 128
        return {"ROWS": 64, "COLUMNS": 32, "num_warps": 8, "num_stages": 2}
    if loads == "specialised" and capability[0] == 9:
        return {
            "ROWS": 128,
            "COLUMNS": 128,
            "num_warps": 4,
            "num_stages": 2 if head_dim == 128 and not fp8 else 3,
        }
    wide = capability in ((9, 0), (10, 0)) or fp8
    return {
        "ROWS": 128,
        "COLUMNS": 64,
        "num_warps": 8,
        "num_stages": 3 if loads != "pointers" and wide else 2,
    }


def flags(
    keys: int, head_dim: int, biased: bool, loads: str, fp8: bool, config: dict[str, int]
) -> dict:
    """The kernel's other compile-time constants. By pointers at head_dim 128, whole blocks would
    spill on sm_80."""
    whole = keys % config["COLUMNS"] == 0 and not biased and (loads != "pointers" or head_dim < 128)
    return {
        "D": head_dim,
        "HAS_BIAS": biased,
        "WHOLE_KEYS": whole,
        "PRECISION": "ieee",
        "FP8": fp8,
        "DESCRIPTORS": loads != "pointers",
        "SPECIALISED": loads == "specialised",
    }


def kernel_variants(name: str, fp8: bool, launches: tuple) -> list[Variant]:
    """Ahead-of-time variants of the kernel: launches are (arches, capability, loads, biased)."""
    out = []
    kind = "*fp8e4nv" if fp8 else "*bf16"
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), kind) | {"out_ptr": "*bf16"}
    pointers |= dict.fromkeys(("bias_ptr", "q_scale_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
    strides = tuple(f"{t}_{n}" for t in "qkv" for n in ("batch", "token", "head"))
    integers = dict.fromkeys((*strides, "batches", "heads", "queries", "keys"), "i32")
    for head_dim in (128, 64) if fp8 else (128, 64, 32):
        for arches, capability, loads, biased in launches:
            config = launch_config(head_dim, 1 if fp8 else 2, capability, loads, fp8)
            warps, stages = config.pop("num_warps"), config.pop("num_stages")
            for keys in (1,) if biased else (1, config["COLUMNS"]):
                constants = {**config, **flags(keys, head_dim, biased, loads, fp8, config)}
                if keys > 1 and not constants["WHOLE_KEYS"]:
                    continue
                mode = "cross" if biased else "self, whole blocks" if keys > 1 else "self"
                label, signature = (
                    f"{name} {mode}, {loads} {head_dim}",
                    {**pointers, **integers, "scale": "fp32"},
                )
                out.append(
                    Variant(
                        label,
                        _attention_kernel,
                        signature,
                        constants,
                        warps,
                        stages,
                        arches,
                        strides,
                    )
                )
    return out


def variants() -> list[Variant]:
    """What Wan's transformers and the mini pair launch in bfloat16: self-attention, and
    cross-attention with a bias."""
    return kernel_variants(
        "attention",
        False,
        (
            ((80,), (8, 0), "pointers", False),
            ((80,), (8, 0), "pointers", True),
            ((90,), (9, 0), "specialised", False),
            ((90,), (9, 0), "descriptors", True),
            ((90,), (9, 0), "pointers", False),
            ((100,), (10, 0), "specialised", False),
            ((100,), (10, 0), "descriptors", True),
            ((120,), (12, 0), "descriptors", False),
            ((120,), (12, 0), "descriptors", True),
        ),
    )


def attention_ref(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in plain PyTorch, float32; shapes as in `attention`."""
    score = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / math.sqrt(q.shape[-1])
    if bias is not None:
        score = score + bias[:, None, None, :]
    return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v.float()).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
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
    """One launch on checked tensors; `scales` of q, k and v where they are fp8."""
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if loads != "pointers" and q.is_cuda:
        triton.set_allocator(allocate)
    v_strides = (v.stride(0), v.stride(2), v.stride(1)) if scales else v.stride()[:3]
    launch(
        _attention_kernel,
        (-(-queries // config["ROWS"]), batch * heads),
        q,
        q,
        k,
        v,
        out if bias is None else bias,
        *((out,) * 3 if scales is None else scales),
        out,
        *q.stride()[:3],
        *k.stride()[:3],
        *v_strides,
        batch,
        heads,
        queries,
        keys,
        math.log2(math.e) / math.sqrt(head_dim),
        **flags(keys, head_dim, bias is not None, loads, scales is not None, config),
        **config,
    )


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability, Hopper's where there is no GPU to ask."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@kernel_op("attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, loads: str = "auto"
) -> Tensor:
    _check(q, k, v, bias)
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
            accelerator), "specialised" (by a warp group of its own), or "auto".

    Returns:
        [B, Lq, heads, head_dim], contiguous, in q's dtype.

    Raises:
        ValueError: a shape, dtype, device, stride or loads that the kernel does not take; says
            which.
    """
    return _attention(q, k, v, bias, loads)
