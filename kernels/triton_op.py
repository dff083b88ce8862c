"""What every kernel file shares: triton where it is installed, and how a launcher becomes a torch
op.

Compiled kernels are registered with `triton_op`, so that torch.compile, export and AOTInductor see
the Triton kernel inside and can carry it along. Triton's interpreter (`TRITON_INTERPRET=1`, for
tests without a GPU) is opaque to them and is registered as a plain custom op.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch

from nexus_rt.core import devices

try:
    import triton
    import triton.language as tl
except ImportError:  # the references need no triton
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_ROW = 16384  # elements that one program keeps in registers


@dataclass(frozen=True)
class Variant:
    """One compilation of a kernel that the runtime launches, for ahead-of-time compilation.

    signature: argument name -> Triton type ("*bf16", "i32", "fp32"); constants: constexpr name ->
        value.
    arches: where it is launched (None: everywhere). aligned: integers that are multiples of 16
        where it is launched.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    arches: tuple[int, ...] | None = None
    aligned: tuple[str, ...] = ()


def kernel_op(name: str):
    """Decorator: register a launcher as the torch op `nexus_rt::name`."""
    if triton is None or INTERPRETED:
        return torch.library.custom_op(f"nexus_rt::{name}", mutates_args=())
    return torch.library.triton_op(f"nexus_rt::{name}", mutates_args=())


def launch(
    kernel: Any, grid: tuple[int, ...], like: torch.Tensor, *args: Any, **options: Any
) -> None:
    """Launch a kernel on the device of `like`; visible to tracing where it is compiled.

    Triton launches on the current device, wherever the tensors lie: a kernel of tensors on cuda:1
    would read them through cuda:0, or fail (flash-attention's launchers guard against it in the
    same way).

    Raises:
        RuntimeError: triton is not installed.
    """
    if kernel is None:
        raise RuntimeError(
            "triton is not installed; install it, or use the PyTorch path (kernels='torch')."
        )
    with on_device(like):
        (kernel if INTERPRETED else torch.library.wrap_triton(kernel))[grid](*args, **options)


def on_device(like: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which a tensor's GPU is the current one."""
    return devices.on_device(like.device)


def row_config(dim: int) -> tuple[int, int]:
    """(block, num_warps) for a row of `dim` a program: 16 elements a thread keep loads 16 bytes
    wide."""
    block = 1 << (dim - 1).bit_length()
    return block, max(1, min(16, block // 512))


def check_tensor(
    op: str, name: str, t: torch.Tensor, shape: Any, dtype: torch.dtype, device: torch.device
) -> None:
    """What every launcher asks of an argument that its kernel walks as it lies in memory.

    Raises:
        ValueError: another shape, dtype or device, a stride, or a view that starts off a 16-byte
            boundary.
    """
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected {tuple(shape)}.")
    if t.dtype != dtype or t.device != device:
        raise ValueError(f"{op}: {name} is {t.dtype} on {t.device}; expected {dtype} on {device}.")
    if not t.is_contiguous():
        raise ValueError(
            f"{op}: {name} has strides {t.stride()}; expected a contiguous tensor (call"
            " .contiguous())."
        )
    # not data_ptr: there is none while a graph is traced
    if t.storage_offset() * t.element_size() % 16:
        raise ValueError(
            f"{op}: {name} starts {t.storage_offset()} elements into its memory, off a 16-byte"
            " boundary (clone it)."
        )


def check_rows(op: str, rows: int, dim: int) -> None:
    """A row a program: the grid's first side ends at 2^31 (elements are indexed in 64 bits), and a
    row is kept in registers.

    Raises:
        ValueError: more rows than that, or longer ones.
    """
    if dim > MAX_ROW:
        raise ValueError(f"{op}: D is {dim}; a row is kept in registers, up to {MAX_ROW}.")
    if rows >= 2**31:
        raise ValueError(
            f"{op}: {rows} tokens in all are beyond the grid of 2^31; run samples in smaller"
            " batches."
        )
