"""Rows of activations as 8-bit floats, a scale a row: what an fp8 matrix product takes; tanh-GELU
first, where it stands before the product.

    y = x, or y = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
    scale = max|y| / 448;   out = e4m3(y / scale)

Bytes a row of D must move: 2 D read, D written. In PyTorch it is several passes in float32, of 2 D
to 8 D bytes each. Flops: about 10 D with the GELU: nothing beside the bytes, so the roof is the
copy bandwidth. `modulate.py` writes the same as it norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

PEAK = 448.0  # of e4m3
LEAST = 1e-12  # a row of zeros has a scale too

if triton is not None:
    _PEAK = tl.constexpr(PEAK)
    _LEAST = tl.constexpr(LEAST)

    @triton.jit
    def as_bytes(y, kind):
        """A row's e4m3 values and its scale."""
        scale = tl.maximum(tl.max(tl.abs(y), 0), _LEAST) / _PEAK
        return (y / scale).to(kind), scale

    @triton.jit
    def _quantise_rows_kernel(
        x_ptr,  # [N, D]
        out_ptr,  # [N, D] e4m3
        scale_ptr,  # [N] float32
        D: tl.constexpr,
        BLOCK: tl.constexpr,
        GELU: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < D
        y = tl.load(x_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
        out, scale = as_bytes(y, out_ptr.dtype.element_ty)
        tl.store(scale_ptr + row, scale)
        tl.store(out_ptr + row * D + column, out, mask=inside)

else:
    _quantise_rows_kernel = None


def launch_config(dim: int) -> dict[str, int]:
    """A row a program."""
    block, warps = row_config(dim)
    return {"BLOCK": block, "num_warps": warps}


def variants() -> list[Variant]:
    """What Wan's transformers launch: before their output projections, and after the GELU."""
    out = []
    for dim, gelu in ((1536, False), (5120, False), (8960, True), (13824, True)):
        config = launch_config(dim)
        constants = {"D": dim, "BLOCK": config["BLOCK"], "GELU": gelu}
        signature = {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
        label = f"quantise_rows {'GELU ' if gelu else ''}{dim}"
        out.append(
            Variant(
                label,
                _quantise_rows_kernel,
                signature,
                constants,
                config["num_warps"],
                arches=(90, 100, 120),
            )
        )
    return out


def quantise_rows_ref(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, float32; shapes as in `quantise_rows`."""
    y = x.flatten(0, -2).float()
    if gelu:
        y = torch.nn.functional.gelu(y, approximate="tanh")
    scale = y.abs().amax(1, keepdim=True).clamp_min(LEAST) / PEAK
    return (y / scale).to(torch.float8_e4m3fn), scale


@kernel_op("quantise_rows")
def _quantise_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    dim = x.shape[-1]
    if x.ndim < 2 or x.dtype not in DTYPES:
        raise ValueError(
            f"quantise_rows: x is {x.dtype} {tuple(x.shape)}; expected [..., D] in float32, float16"
            " or bfloat16."
        )
    rows = x.numel() // max(1, dim)
    check_rows("quantise_rows", rows, dim)
    check_tensor("quantise_rows", "x", x, x.shape, x.dtype, x.device)
    out = x.new_empty(rows, dim, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows and dim:
        launch(
            _quantise_rows_kernel, (rows,), x, x, out, scale, D=dim, GELU=gelu, **launch_config(dim)
        )
    return out, scale


@_quantise_rows.register_fake
def _(x, gelu=False):
    rows = x.numel() // max(1, x.shape[-1])
    return (
        x.new_empty(rows, x.shape[-1], dtype=torch.float8_e4m3fn),
        x.new_empty(rows, 1, dtype=torch.float32),
    )


def quantise_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Activations as 8-bit rows.

    Args:
        x: [..., D], contiguous; float32, float16 or bfloat16.
        gelu: tanh-GELU first.

    Returns:
        e4m3 [N, D] and the scale of each row [N, 1] float32, N the product of the other
        dimensions.

    Raises:
        ValueError: a shape, dtype or stride that the kernel does not take; says which.
    """
    return _quantise_rows(x, gelu)
