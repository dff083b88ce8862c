"""Layers that are built on the meta device without random numbers: drawing them there imports
PyTorch's compiler, which takes longer than a small clip. On other devices they are PyTorch's
own. And what several networks' configurations share."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_rt.core.errors import ModelError


class Linear(nn.Linear):
    """`nn.Linear`, left empty on the meta device."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.weight.dtype

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, left empty on the meta device."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """`nn.Embedding`, left empty on the meta device."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, the quotient in float32 and rounded
    before the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (
            wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        ).to(self.weight.dtype)


# by transformers' names
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def check_positive(config: msgspec.Struct) -> None:
    """Raise a `ModelError` that names a number of a config which is not positive or is absurd."""
    for name in config.__struct_fields__:
        value = getattr(config, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not 0 < value < 2**31:
            raise ModelError(
                f"{name} is {value}; expected a positive number.", code="out_of_range", param=name
            )
