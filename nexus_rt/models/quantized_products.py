"""Matrix products of 8-bit activations, a scale a token, with 8-bit weights, a scale a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
OLDEST = (8, 9)  # compute capability whose matrix units multiply 8-bit floats
MULTIPLE = 16  # both sides of an fp8 matrix on a GPU


@dataclass(frozen=True)
class Rows8:
    """Activations in 8 bits: values [M, K], the scale of each row [M, 1] float32, and the shape
    [..., K] that they stand for."""

    values: Tensor
    scales: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor, dtype: torch.dtype) -> Rows8:
        """Activations [..., K], quantised in PyTorch."""
        values, scales = scaled_rows(x, dtype)
        return cls(values, scales, x.shape)


# activations, weights [N, K], their scales [N] or [1], bias [N] -> [..., N] in the bias's dtype
Product = Callable[[Rows8, Tensor, Tensor, Tensor], Tensor]


def product_of(raw: Tensor) -> Product | None:
    """What multiplies 8-bit activations by these weights [N, K] on their device; None where nothing
    does."""
    if raw.dtype == torch.int8:
        return _int8_product
    if raw.dtype != torch.float8_e4m3fn:
        return None
    if raw.is_cuda:
        new = torch.cuda.get_device_capability(raw.device) >= OLDEST
        return _fp8_product if new and not any(side % MULTIPLE for side in raw.shape) else None
    return _fp8_product if raw.device.type == "cpu" and _cpu_multiplies() else None


@lru_cache(maxsize=1)
def _cpu_multiplies() -> bool:
    """Whether this PyTorch multiplies 8-bit floats with a scale a row on a CPU."""
    x, one = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        return bool((torch._scaled_mm(x, x.t(), one, one.t(), out_dtype=torch.float32) == 16).all())
    except (RuntimeError, NotImplementedError):
        return False


def multiplies(raw: Tensor) -> bool:
    """Whether the device of these weights multiplies by them in 8 bits."""
    return product_of(raw) is not None


def scaled_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Activations [..., K] as 8-bit rows [M, K] and the scale of each [M, 1]."""
    rows = x.flatten(0, -2).float()
    scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-12) / LIMITS[dtype]
    rows = rows / scale
    return (rows.round_() if dtype == torch.int8 else rows).to(dtype), scale


def _int8_product(x: Rows8, raw: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x @ raw.T in int8, a scale a token and a row."""
    small, count = x.values, len(x.values)
    if small.is_cuda and count <= 16:  # below cuBLASLt's smallest
        small = F.pad(small, (0, 0, 0, 17 - count))
    product = torch._int_mm(small, raw.t())[:count]
    out = product.float().mul_(x.scales).mul_(scale)
    return out.to(bias.dtype).add_(bias).unflatten(0, x.shape[:-1])


def _fp8_product(x: Rows8, raw: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x @ raw.T in fp8 on the matrix units, a scale a token and a row; the bias rides along."""
    across = scale.expand(len(bias)).reshape(1, -1).contiguous()
    # on a GPU row-wise scales come out in bfloat16 alone
    kind = torch.bfloat16 if raw.is_cuda else bias.dtype
    own = bias if bias.dtype == kind == torch.bfloat16 else None
    out = torch._scaled_mm(
        x.values, raw.t(), x.scales, across, bias=own, out_dtype=kind, use_fast_accum=True
    )
    out = out if own is not None else out.to(bias.dtype).add_(bias)
    return out.unflatten(0, x.shape[:-1])
