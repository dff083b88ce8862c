"""RMSNorm of Q and K over all heads together, then 3-D RoPE, in one pass over a fused projection.

    n = x / sqrt(mean(x^2) + eps) * weight              (mean over all heads: Wan's norm)
    (a, b) -> (a cos - b sin, a sin + b cos)            (every adjacent pair of a head, by token)

Reads the Q and K thirds of [B, L, 3 D] once and writes each as [B, L, heads, head_dim], which
attention reads through strides; V stays where it is. Bytes a token must move: 2 D in, 2 D out, and
head_dim float32 of the tables. Flops: about 12 D, nothing beside the bytes. So the roof is the copy
bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_rt.kernels import formulas
from nexus_rt.kernels.triton_op import (
    DTYPES,
    Variant,
    check_rows,
    check_tensor,
    kernel_op,
    launch,
    row_config,
    tl,
    triton,
)

if triton is not None:

    @triton.jit
    def _qk_norm_rope_kernel(
        qkv_ptr,  # [B * L, 3 D]
        weight_q_ptr,  # [D]
        weight_k_ptr,  # [D]
        cos_ptr,  # [L, head_dim / 2] float32
        sin_ptr,  # [L, head_dim / 2] float32
        q_ptr,  # [B * L, D]
        k_ptr,  # [B * L, D]
        length,  # L
        eps,
        D: tl.constexpr,
        HALF: tl.constexpr,  # head_dim / 2
        PAIRS: tl.constexpr,  # power of two, at least D / 2
    ):
        row = tl.program_id(0).to(tl.int64)
        third = tl.program_id(1)  # 0: Q, 1: K
        token = row % length
        pair = tl.arange(0, PAIRS)
        column = tl.arange(0, 2 * PAIRS)
        inside = column < D
        if third == 0:
            weight_ptr = weight_q_ptr
            out_ptr = q_ptr
        else:
            weight_ptr = weight_k_ptr
            out_ptr = k_ptr
        x = tl.load(qkv_ptr + row * 3 * D + third * D + column, mask=inside, other=0.0).to(
            tl.float32
        )
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        n = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)) * weight
        a, b = tl.split(n.reshape(PAIRS, 2))  # adjacent pairs lie in one thread: no exchange
        angle = token * HALF + pair % HALF
        known = pair < D // 2
        cos = tl.load(cos_ptr + angle, mask=known, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=known, other=0.0)
        rotated = tl.join(a * cos - b * sin, a * sin + b * cos).reshape(2 * PAIRS)
        tl.store(out_ptr + row * D + column, rotated.to(out_ptr.dtype.element_ty), mask=inside)

else:
    _qk_norm_rope_kernel = None


def launch_config(dim: int) -> dict[str, int]:
    """A row of Q or of K a program."""
    block, warps = row_config(dim)
    return {"PAIRS": block // 2, "num_warps": warps}


def variants() -> list[Variant]:
    """What Wan's transformers launch: widths 1536 and 5120, heads of 128, bfloat16."""
    pointers = {n: "*bf16" for n in ("qkv_ptr", "weight_q_ptr", "weight_k_ptr", "q_ptr", "k_ptr")}
    signature = {**pointers, "cos_ptr": "*fp32", "sin_ptr": "*fp32", "length": "i32", "eps": "fp32"}
    out = []
    for dim in (1536, 5120):
        config = launch_config(dim)
        constants = {"D": dim, "HALF": 64, "PAIRS": config["PAIRS"]}
        out.append(
            Variant(
                f"qk_norm_rope {dim}",
                _qk_norm_rope_kernel,
                signature,
                constants,
                config["num_warps"],
            )
        )
    return out


def qk_norm_rope_ref(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, float32; shapes as in `qk_norm_rope`."""
    tables = (
        torch.stack((cos, cos), -1).flatten(-2)[:, None],
        torch.stack((-sin, sin), -1).flatten(-2)[:, None],
    )
    q, k = formulas.qk_norm_rope(
        qkv.float(), weight_q.float(), weight_k.float(), *tables, heads, eps
    )
    return q.to(qkv.dtype), k.to(qkv.dtype)


def _check(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> None:
    if qkv.ndim != 3 or qkv.dtype not in DTYPES:
        raise ValueError(
            f"qk_norm_rope: qkv is {qkv.dtype} {tuple(qkv.shape)}; expected [B, L, 3 D] in float32,"
            " float16 or bfloat16."
        )
    dim, rest = divmod(qkv.shape[-1], 3)
    if rest or heads < 1 or dim % (2 * heads):
        raise ValueError(
            f"qk_norm_rope: the last dimension {qkv.shape[-1]} is not 3 x {heads} heads of an even"
            " size."
        )
    check_rows("qk_norm_rope", qkv.shape[0] * qkv.shape[1], dim)
    table = (qkv.shape[1], dim // heads // 2)
    for name, t, shape in (
        ("qkv", qkv, qkv.shape),
        ("weight_q", weight_q, (dim,)),
        ("weight_k", weight_k, (dim,)),
        ("cos", cos, table),
        ("sin", sin, table),
    ):
        if t.dtype not in DTYPES:
            raise ValueError(
                f"qk_norm_rope: {name} is {t.dtype}; expected float32, float16 or bfloat16."
            )
        check_tensor(
            "qk_norm_rope",
            name,
            t,
            shape,
            torch.float32 if name in ("cos", "sin") else t.dtype,
            qkv.device,
        )


@kernel_op("qk_norm_rope")
def _qk_norm_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    _check(qkv, weight_q, weight_k, cos, sin, heads)
    batch, length, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k = (
        torch.empty(batch, length, heads, dim // heads, dtype=qkv.dtype, device=qkv.device)
        for _ in range(2)
    )
    if qkv.numel():
        launch(
            _qk_norm_rope_kernel,
            (batch * length, 2),
            qkv,
            qkv,
            weight_q,
            weight_k,
            cos,
            sin,
            q,
            k,
            length,
            eps,
            D=dim,
            HALF=dim // heads // 2,
            **launch_config(dim),
        )
    return q, k


@_qk_norm_rope.register_fake
def _(qkv, weight_q, weight_k, cos, sin, heads, eps):
    shape = (qkv.shape[0], qkv.shape[1], heads, qkv.shape[2] // 3 // heads)
    return qkv.new_empty(shape), qkv.new_empty(shape)


def qk_norm_rope(
    qkv: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Norm and rotate the queries and keys of a fused projection.

    Args:
        qkv: [B, L, 3 D], contiguous; float32, float16 or bfloat16.
        weight_q, weight_k: the norms' weights [D].
        cos, sin: of each token's angles [L, head_dim / 2], float32, contiguous.
        heads: D = heads * head_dim.

    Returns:
        q, k: [B, L, heads, head_dim] in qkv's dtype; attention reads them transposed,
            `q.transpose(1, 2)`.

    Raises:
        ValueError: a shape, dtype, device or stride that the kernel does not take; says which.
    """
    return _qk_norm_rope(qkv, weight_q, weight_k, cos, sin, heads, eps)
