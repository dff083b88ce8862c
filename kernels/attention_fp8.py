"""Attention on 8-bit floats: Q, K and V as e4m3 with a scale a block, shares as e4m3, sums in
float32.

    K' = K - mean over tokens
    x8 = x / s,  s = max|x| / 448
    score = s_q s_k q8 k8^T / sqrt(d);   out = s_v (sum of (256 share)8 v8) / (sum of 256 share)

The mean takes one number from all of a query's scores, which the softmax does not see. A scale of Q
and K is of a block of tokens of a head: 128 queries; as many keys as a tile. V has one a head, so
that tiles' products add up as they are: e4m3 is a float, and loses nothing to a scale that is too
large for some of its values.

Smoothing K is SageAttention's (arXiv 2410.02367): its channels have outliers that are alike in
every token. V is written transposed, as the matrix units read bytes. A tile's products are summed
in the matrix units, whose sums of bytes have some 14 bits (arXiv 2412.19437, section 3.3), tiles in
float32.

Flops as `attention`, at twice the rate; bytes: q, k, v read once and written as bytes, 1.5 times
`attention`'s, which is 2% of its time at 32,760 tokens. An approximation: about 4% of the output's
RMS on Gaussian inputs, so never chosen unless it is asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nexus_rt.kernels.attention import (
    attention_ref,
    check_attention,
    kernel_variants,
    launch_attention,
)
from nexus_rt.kernels.attention_launch import (
    FP8_HEAD_DIMS,
    capability_of,
    launch_config,
    resolve_loads,
)
from nexus_rt.kernels.triton_op import Variant, kernel_op, launch, tl, triton

PEAK = 448.0  # of e4m3
LEAST = 1e-35  # a block of zeros has a scale too; the smallest whose 448th is a normal number
OLDEST = (8, 9)

if triton is not None:
    _PEAK = tl.constexpr(PEAK)
    _LEAST = tl.constexpr(LEAST)

    @triton.jit
    def _quantise_kernel(
        x_ptr,  # [B, L, heads, D]
        mean_ptr,  # [B, heads, D] float32, or unused
        out_ptr,  # [B, L, heads, D] e4m3; TRANSPOSED: [B, heads, D, PADDED]
        scale_ptr,  # [B, heads, blocks]; GIVEN: [B, heads], and read
        x_batch,
        x_token,
        x_head,
        heads,
        length,  # L
        padded,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        SMOOTH: tl.constexpr,
        TRANSPOSED: tl.constexpr,
        GIVEN: tl.constexpr,
    ):
        batch = (tl.program_id(1) // heads).to(tl.int64)
        head = (tl.program_id(1) % heads).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, D)
        inside = row[:, None] < length
        at = (
            x_ptr
            + batch * x_batch
            + head * x_head
            + row.to(tl.int64)[:, None] * x_token
            + d[None, :]
        )
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if SMOOTH:
            x = tl.where(
                inside, x - tl.load(mean_ptr + (batch * heads + head) * D + d)[None, :], 0.0
            )
        pair = tl.program_id(1).to(tl.int64)
        if GIVEN:
            scale = tl.load(scale_ptr + pair)
        else:
            scale = tl.maximum(tl.max(tl.abs(x)), _LEAST) / _PEAK
            tl.store(scale_ptr + pair * tl.num_programs(0) + tl.program_id(0), scale)
        small = (x / scale).to(out_ptr.dtype.element_ty)
        if TRANSPOSED:  # the padding is written too: zeros
            place = ((batch * heads + head) * D + d[:, None]) * padded + row[None, :]
            tl.store(out_ptr + place, tl.trans(small), mask=row[None, :] < padded)
        else:
            place = ((batch * length + row.to(tl.int64)[:, None]) * heads + head) * D + d[None, :]
            tl.store(out_ptr + place, small, mask=inside)

else:
    _quantise_kernel = None


def variants() -> list[Variant]:
    """What a transformer in bfloat16 launches where fp8 is allowed: the three tensors, then
    attention on bytes."""
    out = []
    for head_dim in FP8_HEAD_DIMS:
        strides = ("x_batch", "x_token", "x_head")
        signature = {
            "x_ptr": "*bf16",
            "mean_ptr": "*fp32",
            "out_ptr": "*fp8e4nv",
            "scale_ptr": "*fp32",
        }
        signature |= dict.fromkeys((*strides, "heads", "length", "padded"), "i32")
        for label, rows, smooth, transposed, arches in (
            ("q", 128, False, False, (90, 100, 120)),
            ("k", 128, True, False, (90,)),
            ("v", 128, False, True, (90,)),
            ("k", 64, True, False, (100, 120)),
            ("v", 64, False, True, (100, 120)),
        ):
            constants = {
                "D": head_dim,
                "ROWS": rows,
                "SMOOTH": smooth,
                "TRANSPOSED": transposed,
                "GIVEN": transposed,
            }
            name = f"quantise {label} {head_dim}"
            out.append(
                Variant(
                    name, _quantise_kernel, signature, constants, 4, 3, arches, (*strides, "padded")
                )
            )
    return out + kernel_variants(
        "attention_fp8",
        True,
        (
            ((90,), (9, 0), "specialised", False),
            ((90,), (9, 0), "descriptors", False),
            ((90,), (9, 0), "ahead", False),
            ((90,), (9, 0), "pointers", True),
            ((100,), (10, 0), "descriptors", False),
            ((100,), (10, 0), "pointers", True),
            ((120,), (12, 0), "descriptors", False),
            ((120,), (12, 0), "pointers", True),
        ),
    )


def quantise_ref(x: Tensor, rows: int) -> Tensor:
    """x [B, L, heads, D] as e4m3 with a scale for every `rows` tokens of a head, and back:
    float32."""
    out = torch.empty_like(x, dtype=torch.float32)
    for start in range(0, x.shape[1], rows):
        part = x[:, start : start + rows].float()
        scale = part.abs().amax((1, 3), keepdim=True).clamp_min(LEAST) / PEAK
        out[:, start : start + rows] = (part / scale).to(torch.float8_e4m3fn).float() * scale
    return out


def attention_fp8_ref(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, columns: int = 64
) -> Tensor:
    """The same quantisation in plain PyTorch, with exact shares; shapes as in `attention_fp8`."""
    smooth = k.float() - k.float().mean(1, keepdim=True)
    return attention_ref(
        quantise_ref(q, 128), quantise_ref(smooth, columns), quantise_ref(v, v.shape[1]), bias
    ).to(q.dtype)


def quantise(
    x: Tensor, rows: int, mean: Tensor | None, transposed: bool, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x` in 8 bits, every `rows` tokens of a head with one scale.

    Args:
        x: [B, L, H, D].
        mean: [B, H, D], taken from each token first.
        transposed: the bytes as [B, H, D, L], L padded with zeros to a multiple of `rows`.
        scale: [B, H], one for all of a head; default: each block's own.

    Returns:
        The bytes, and the scales [B, H, blocks] float32.
    """
    batch, length, heads, head_dim = x.shape
    blocks = -(-length // rows)
    shape = (batch, heads, head_dim, blocks * rows) if transposed else x.shape
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    given = scale is not None
    if scale is None:
        scale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    launch(
        _quantise_kernel,
        (blocks, batch * heads),
        x,
        x,
        scale if mean is None else mean,
        out,
        scale,
        *x.stride()[:3],
        heads,
        length,
        blocks * rows,
        D=head_dim,
        ROWS=rows,
        SMOOTH=mean is not None,
        TRANSPOSED=transposed,
        GIVEN=given,
        num_warps=4,
    )
    return out, scale


@kernel_op("attention_fp8")
def _attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, loads: str = "auto"
) -> Tensor:
    check_attention(q, k, v, bias)
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] not in FP8_HEAD_DIMS:
        expected = f"float16 or bfloat16, head_dim {', '.join(map(str, FP8_HEAD_DIMS))}"
        raise ValueError(
            f"attention_fp8: q is {q.dtype} with head_dim {q.shape[-1]}; expected {expected}."
        )
    if q.is_cuda and capability_of(q.device) < OLDEST:
        raise ValueError(
            f"attention_fp8: compute capability {capability_of(q.device)} has no 8-bit matrix"
            " product; needs 8.9."
        )
    loads = resolve_loads(loads, q, k, v, bias is not None, fp8=True)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        config = launch_config(q.shape[3], 1, capability_of(q.device), loads, fp8=True)
        q8, q_scale = quantise(q, config["ROWS"], None, False)
        # any finite number may be taken from all keys: a mean whose sum overflows is not needed
        mean = k.mean(1, dtype=torch.float32).nan_to_num(0.0, 0.0, 0.0)
        k8, k_scale = quantise(k, config["COLUMNS"], mean, False)
        largest = torch.linalg.vector_norm(v, math.inf, (1, 3), dtype=torch.float32)
        v8, v_scale = quantise(v, config["COLUMNS"], None, True, largest.clamp_min(LEAST) / PEAK)
        launch_attention(q8, k8, v8, bias, (q_scale, k_scale, v_scale), out, loads, config)
    return out


@_attention_fp8.register_fake
def _(q, k, v, bias=None, loads="auto"):
    return q.new_empty(q.shape)


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, loads: str = "auto"
) -> Tensor:
    """Softmax attention of every head on 8-bit floats; arguments and result as
    `nexus_rt.kernels.attention.attention`.

    Raises:
        ValueError: as there, and: float32 inputs, a head_dim other than 64 or 128, a GPU older than
            compute capability 8.9.
    """
    return _attention_fp8(q, k, v, bias, loads)
