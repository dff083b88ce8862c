"""The memory-bound operations of a Wan block, in PyTorch or as Triton kernels, behind one table of
functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_rt.core.devices import hold
from nexus_rt.core.errors import InputError, choose
from nexus_rt.core.log import chose
from nexus_rt.kernels import formulas

KERNELS = ("auto", "torch", "triton")
OLDEST = (8, 0)  # compute capability the kernels are compiled and checked for


def rope_table(
    head_dim: int, grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`rope_tables` of a grid of (frames, rows, columns) tokens, angles in float64: cos, sin [L, 1,
    head_dim] float32."""
    return hold(_rope_table(head_dim, grid, device))


def rope_pairs(
    head_dim: int, grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The same angles once per pair, as the Triton kernel reads them: cos, sin [L, head_dim / 2]
    float32."""
    return hold(_rope_pairs(head_dim, grid, device))


# Cached behind plain functions: PyTorch 2.11's compiler takes a cached function in an `Ops` for a
# method of it.
@lru_cache(maxsize=16)
def _rope_table(
    head_dim: int, grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    angles = formulas.rope_angles(head_dim, grid, torch.device("cpu"), torch.float64)
    cos, sin = formulas.rope_tables(angles)
    return cos.float().to(device), sin.float().to(device)


@lru_cache(maxsize=16)
def _rope_pairs(
    head_dim: int, grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    cos, sin = _rope_table(head_dim, grid, device)
    return cos[:, 0, ::2].contiguous(), sin[:, 0, 1::2].contiguous()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """tanh-GELU of a linear layer: [..., D] to [..., E]."""
    return tanh_gelu(F.linear(x, weight, bias))


def tanh_gelu(y: Tensor) -> Tensor:
    """GELU by its tanh form; `y` is not used again.

    0.5 y (1 + tanh z) is y sigmoid(2 z): in place and by the vectorised sigmoid, it takes less than
    half as long as PyTorch's own on a CPU.
    """
    if (
        y.device.type != "cpu"
        or y.dtype != torch.float32
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    ):
        return F.gelu(y, approximate="tanh")
    twice = 2 * math.sqrt(2 / math.pi)
    return (y * y).mul_(0.044715 * twice).add_(twice).mul_(y).sigmoid_().mul_(y)


def linear_gelu_epilogue(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same where cuBLASLt has it ride along in the product's epilogue: E elements a row less to
    read and write.

    That epilogue is the tanh form in half precision; on a CPU the same call would be the exact
    (erf) one.
    """
    if not x.is_cuda or x.dtype == torch.float32:
        return linear_gelu(x, weight, bias)
    return torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True).unflatten(
        0, x.shape[:-1]
    )


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation.

    modulate, qk_norm_rope: as in `nexus_rt.kernels`. rope: the tables that qk_norm_rope reads, for
        a grid.
    linear_gelu: a linear layer and its tanh-GELU.
    modulate_rows, quantise_rows: the norm, and any activations, as the 8-bit rows that fp8 products
        take; None where the products quantise for themselves.
    """

    name: str
    modulate: Callable
    qk_norm_rope: Callable
    rope: Callable
    linear_gelu: Callable
    modulate_rows: Callable | None = None
    quantise_rows: Callable | None = None


TORCH = Ops("torch", formulas.modulate, formulas.qk_norm_rope, rope_table, linear_gelu)


def choose_ops(kernels: str, device: torch.device) -> Ops:
    """The operations for a device: "torch", "triton", or "auto" (triton where a GPU can run it).

    Raises:
        InputError: an unknown name, or triton asked for where it cannot run.
    """
    choose("kernels", kernels, KERNELS)
    if kernels == "torch":
        return TORCH
    # Triton's interpreter is never chosen by itself
    why = (
        f"the device is {device}"
        if kernels == "auto" and device.type != "cuda"
        else cannot_run_triton(device)
    )
    if kernels == "auto":
        chose("kernels", "torch" if why else "triton", why or "a GPU that can run them", once=True)
        if why:
            return TORCH
    if why:
        raise InputError(
            f"kernels='triton' cannot run here: {why}; use 'auto' or 'torch'.",
            code="unsupported",
            param="kernels",
        )
    from nexus_rt.kernels.modulate import modulate, modulate_rows
    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope
    from nexus_rt.kernels.quantise_rows import quantise_rows

    return Ops(
        "triton",
        modulate,
        qk_norm_rope,
        rope_pairs,
        linear_gelu_epilogue,
        modulate_rows,
        quantise_rows,
    )


def cannot_run_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None where they can."""
    if device.type == "cuda":
        have = torch.cuda.get_device_capability(device)
        if have < OLDEST:
            name, (major, minor) = torch.cuda.get_device_name(device), have
            return f"{name} has compute capability {major}.{minor}, below {OLDEST[0]}.{OLDEST[1]}"
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return None
    from nexus_rt.kernels.triton_op import INTERPRETED

    return (
        None
        if INTERPRETED and device.type == "cpu"
        else f"they need a CUDA device, and this is {device.type}"
    )
