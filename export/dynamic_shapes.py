"""Shapes with names in them: one table a graph, from which come its example, its dynamic dimensions
and its profiles.

A shape is a tuple of numbers and of symbols such as "batch" or "2*rows". Frames count latent
frames; rows and columns count pairs of latent cells, which is what a patch is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from nexus_rt.core.size import ClipSize

Shape = tuple[int | str, ...]

# what the rest range over: samples of a step, tokens of a context, of a prompt
LIMITS = {"batch": (1, 64), "tokens": (2, 4096), "words": (2, 512)}
EXAMPLE = {"batch": 2, "tokens": 24, "words": 9}


@dataclass(frozen=True)
class Traced:
    """A graph: its program, the inputs it was traced with and their shapes, by name and in order,
    and its outputs' names."""

    program: ExportedProgram
    inputs: dict[str, Tensor]
    shapes: dict[str, Shape]
    outputs: tuple[str, ...]

    def forget(self) -> None:
        """Free the weights, whoever still refers to them: exporters keep what they were given."""
        for tensor in self.program.state_dict.values():
            tensor.data = tensor.data.new_empty(0)


class Symbols:
    """What symbols stand for where a graph is built for sizes; those with one value are that
    number."""

    def __init__(self, buckets: list[ClipSize]) -> None:
        sizes = [size_of(b) for b in buckets]
        spans = {
            n: (min(s[n] for s in sizes), max(s[n] for s in sizes))
            for n in (sizes[0] if sizes else ())
        }
        self.ranges = {**LIMITS, **spans}
        self.dims = {
            n: Dim(n, min=low, max=high) for n, (low, high) in self.ranges.items() if low < high
        }
        # an example's dynamic dimension is not 1, which a tracer would take for a constant
        self.example = {
            **EXAMPLE,
            **{n: low if low == high else max(high, 2) for n, (low, high) in spans.items()},
        }

    def dynamic(self, shape: Shape) -> dict[int, Dim]:
        """A shape's dynamic dimensions, as `torch.export` takes them."""
        dims = {}
        for axis, dim in enumerate(shape):
            factor, name = split(dim)
            if name in self.dims:
                dims[axis] = self.dims[name] if factor == 1 else factor * self.dims[name]
        return dims

    def random(
        self, shape: Shape, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """An example input: noise."""
        g = torch.Generator().manual_seed(0)
        return torch.randn(concrete(shape, self.example), generator=g).to(device, dtype)


def size_of(bucket: ClipSize) -> dict[str, int]:
    """The symbols of a size."""
    frames, height, width = bucket.latent
    return {"frames": frames, "rows": height // 2, "columns": width // 2}


def split(dim: int | str) -> tuple[int, str | None]:
    """A dimension as a factor and a symbol (None for a number alone)."""
    if isinstance(dim, int):
        return dim, None
    factor, _, name = dim.rpartition("*")
    return int(factor or 1), name


def concrete(shape: Shape, values: dict[str, int]) -> list[int]:
    """A shape in numbers."""
    return [factor * (1 if name is None else values[name]) for factor, name in map(split, shape)]
