"""Matrix products of 8-bit activations, a scale a token, with 8-bit weights, a scale a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}

Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # x, weights, their scales, bias


def product_of(raw: Tensor) -> Product | None:
    """What multiplies 8-bit activations by these weights on their device; None where nothing
    does."""
    if raw.dtype == torch.int8:
        return _int8_product
    if raw.is_cuda and torch.cuda.get_device_capability(raw.device) >= (8, 9):
        return _fp8_product
    return None


def multiplies(raw: Tensor) -> bool:
    """Whether the device of these weights multiplies by them in 8 bits."""
    return product_of(raw) is not None


def scaled_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Activations [..., K] as 8-bit rows [M, K] and the scale of each [M, 1]."""
    rows = x.flatten(0, -2).float()
    scale = rows.abs().amax(1, keepdim=True).clamp_min_(1e-12) / LIMITS[dtype]
    rows = rows / scale
    return (rows.round_() if dtype == torch.int8 else rows).to(dtype), scale


def _int8_product(x: Tensor, raw: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x @ raw.T in int8, a scale a token and a row."""
    small, own = scaled_rows(x, torch.int8)
    count = len(small)
    if small.is_cuda and count <= 16:  # below cuBLASLt's smallest
        small = F.pad(small, (0, 0, 0, 17 - count))
    product = torch._int_mm(small, raw.view(len(bias), -1).t())[:count]
    out = product.float().mul_(own).mul_(scale)
    return out.to(x.dtype).add_(bias).unflatten(0, x.shape[:-1])


def _fp8_product(x: Tensor, raw: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x @ raw.T in fp8 on tensor cores, a scale a token and a row."""
    small, own = scaled_rows(x, torch.float8_e4m3fn)
    across = scale.expand(len(bias)).reshape(1, -1).contiguous()
    product = torch._scaled_mm(
        small, raw.view(len(bias), -1).t(), own, across, out_dtype=torch.bfloat16
    )
    return product.to(x.dtype).add_(bias).unflatten(0, x.shape[:-1])
