"""Gated residual, LayerNorm, scale and shift in one pass: what stands between the layers of a Wan
block.

    x' = x + gate * y                                   (y and gate optional)
    out = (x' - mean) / sqrt(var + eps) * (1 + scale) + shift

mean and variance over the last dimension, in float32. Wan's affine norm before cross-attention is
the same formula with `scale = weight - 1, shift = bias`, and a residual without a gate is
`gate = 1`, so one kernel serves a whole block.

Bytes a row of D must move: read x (and y), write out (and x'): 2 D or 4 D elements; scale, shift
and gate are read once per sample from cache. Flops: about 8 D, nothing beside the bytes. So the
roof is the copy bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_rt.kernels import formulas
from nexus_rt.kernels.quantise_rows import quantise_rows_ref
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
    from nexus_rt.kernels.quantise_rows import as_bytes

    @triton.jit
    def _modulate_kernel(
        x_ptr,  # [N, D]
        y_ptr,  # [N, D] or unused
        gate_ptr,  # [B, D] or [1, D] float32, or unused
        scale_ptr,  # [B, D] or [1, D] float32
        shift_ptr,  # as scale
        sum_ptr,  # [N, D] x', or unused
        out_ptr,  # [N, D]; QUANTISED: e4m3
        row_scale_ptr,  # QUANTISED: [N] float32
        rows_a_gate,  # N // B, or N where one gate serves all
        rows_a_scale,  # the same of scale and shift
        eps,
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        HAS_GATE: tl.constexpr,
        QUANTISED: tl.constexpr,  # rows as 8-bit floats, for a product that takes them
    ):
        row = tl.program_id(0).to(tl.int64)
        gate_row = row // rows_a_gate
        scale_row = row // rows_a_scale
        column = tl.arange(0, BLOCK)
        inside = column < D
        x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            y = tl.load(y_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
            if HAS_GATE:
                y *= tl.load(gate_ptr + gate_row * D + column, mask=inside, other=0.0)
            # rounded as it is stored: the norm sees the residual stream that the next layer will
            # read
            x = (x + y).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * D + column, x, mask=inside)
            x = x.to(tl.float32)
        mean = tl.sum(x, 0) / D
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        scale = tl.load(scale_ptr + scale_row * D + column, mask=inside, other=0.0)
        shift = tl.load(shift_ptr + scale_row * D + column, mask=inside, other=0.0)
        out = centred * rstd * (1.0 + scale) + shift
        if QUANTISED:
            out, row_scale = as_bytes(tl.where(inside, out, 0.0), out_ptr.dtype.element_ty)
            tl.store(row_scale_ptr + row, row_scale)
        tl.store(out_ptr + row * D + column, out.to(out_ptr.dtype.element_ty), mask=inside)

else:
    _modulate_kernel = None


def launch_config(dim: int) -> dict[str, int]:
    """A row a program."""
    block, warps = row_config(dim)
    return {"BLOCK": block, "num_warps": warps}


def variants() -> list[Variant]:
    """What Wan's transformers launch: widths 1536 and 5120, bfloat16, each mode of a block."""
    out = []
    for dim in (1536, 5120):
        config = launch_config(dim)
        for mode, residual, gate, quantised in (
            ("norm", False, False, False),
            ("residual", True, False, False),
            ("gated", True, True, False),
            ("residual, fp8", True, False, True),
            ("gated, fp8", True, True, True),
        ):
            pointers = {n: "*bf16" for n in ("x_ptr", "y_ptr", "sum_ptr", "out_ptr")}
            pointers |= {n: "*fp32" for n in ("gate_ptr", "scale_ptr", "shift_ptr")}
            pointers |= {"row_scale_ptr": "*fp32"} | ({"out_ptr": "*fp8e4nv"} if quantised else {})
            constants = {
                "D": dim,
                "BLOCK": config["BLOCK"],
                "HAS_RESIDUAL": residual,
                "HAS_GATE": gate,
                "QUANTISED": quantised,
            }
            signature = {**pointers, "rows_a_gate": "i32", "rows_a_scale": "i32", "eps": "fp32"}
            out.append(
                Variant(
                    f"modulate {mode} {dim}",
                    _modulate_kernel,
                    signature,
                    constants,
                    config["num_warps"],
                    arches=(90, 100, 120) if quantised else None,
                )
            )
    return out


def modulate_ref(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, float32; shapes as in `modulate`."""
    return formulas.modulate(x, scale, shift, eps, y, gate)


def check_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, gate: Tensor | None
) -> None:
    """Raise a `ValueError` unless the kernel takes these tensors."""
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(
            f"modulate: x is {x.dtype} {tuple(x.shape)}; expected [B, L, D] in float32, float16 or"
            " bfloat16."
        )
    check_rows("modulate", x.shape[0] * x.shape[1], x.shape[2])
    if y is None and gate is not None:
        raise ValueError("modulate: a gate without y has nothing to gate.")
    if scale.shape != shift.shape:
        raise ValueError(
            f"modulate: scale and shift have shapes {tuple(scale.shape)} and {tuple(shift.shape)};"
            " expected one."
        )
    for name, t in (("scale", scale), ("shift", shift), ("gate", gate)):
        if t is None:
            continue
        if t.ndim != 2 or t.shape[0] not in (1, x.shape[0]) or t.shape[1] != x.shape[-1]:
            expected = f"[1, {x.shape[-1]}] or [{x.shape[0]}, {x.shape[-1]}]"
            raise ValueError(f"modulate: {name} has shape {tuple(t.shape)}; expected {expected}.")
        check_tensor("modulate", name, t, t.shape, torch.float32, x.device)
    for name, t in (("x", x), ("y", y)):
        if t is not None:
            check_tensor("modulate", name, t, x.shape, x.dtype, x.device)


@kernel_op("modulate")
def _modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
    quantised: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The new stream (empty without y), the norm, and its rows' scales (empty unless quantised)."""
    check_modulate(x, scale, shift, y, gate)
    rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    out = x.new_empty(rows, dim, dtype=torch.float8_e4m3fn) if quantised else torch.empty_like(x)
    row_scale = x.new_empty(rows if quantised else 0, 1, dtype=torch.float32)
    total = torch.empty_like(x) if y is not None else torch.empty(0, dtype=x.dtype, device=x.device)
    if rows and dim:
        shares = [rows if t is None or t.shape[0] == 1 else x.shape[1] for t in (gate, scale)]
        launch(
            _modulate_kernel,
            (rows,),
            x,
            x,
            x if y is None else y,
            scale if gate is None else gate,
            scale,
            shift,
            total,
            out,
            row_scale,
            *shares,
            eps,
            D=dim,
            HAS_RESIDUAL=y is not None,
            HAS_GATE=gate is not None,
            QUANTISED=quantised,
            **launch_config(dim),
        )
    return total, out, row_scale


@_modulate.register_fake
def _(x, scale, shift, eps, y, gate, quantised):
    rows = x.shape[0] * x.shape[1]
    norm = x.new_empty(rows, x.shape[2], dtype=torch.float8_e4m3fn) if quantised else None
    return (
        x.new_empty(0) if y is None else torch.empty_like(x),
        torch.empty_like(x) if norm is None else norm,
        x.new_empty(rows if quantised else 0, 1, dtype=torch.float32),
    )


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated residual, LayerNorm without weights, scale and shift.

    Args:
        x: the residual stream [B, L, D], contiguous; float32, float16 or bfloat16.
        scale, shift, gate: [B, D] or [1, D], float32, contiguous.
        y: a layer's output [B, L, D] to add to x first, times `gate` where there is one.

    Returns:
        (x', out): the new residual stream (x itself where there is no y) and the modulated norm,
        both in x's dtype.

    Raises:
        ValueError: a shape, dtype, device or stride that the kernel does not take; says which.
    """
    total, out, _ = _modulate(x, scale, shift, eps, y, gate, False)
    return (x if y is None else total), out


def modulate_rows(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`modulate`, the norm as 8-bit rows: (x', (e4m3 [B L, D], scales [B L, 1] float32)), as
    `quantise_rows` writes them; arguments and errors as there."""
    total, out, row_scale = _modulate(x, scale, shift, eps, y, gate, True)
    return (x if y is None else total), (out, row_scale)


def modulate_rows_ref(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    y: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The formula in plain PyTorch; shapes as in `modulate_rows`."""
    total = x if y is None else formulas.modulate(x, scale, shift, eps, y, gate)[0]
    return total, quantise_rows_ref(formulas.modulate(total.float(), scale, shift, eps)[1])
