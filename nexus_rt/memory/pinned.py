"""Pinned host memory in arenas: tensors packed into few allocations.

PyTorch rounds every pinned allocation up to a power of two (its caching host allocator; 2.11 takes
45.6 GB for a 14B model's 28.1). Arenas are powers of two themselves, and a model's tensors lie in
them one after another, so that little is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

ARENA = 2**30  # bytes; a tensor above it has an allocation of its own
ALIGNED = 512


def power_of_two(count: int) -> int:
    """The power of two that holds so many bytes."""
    return 1 << max(0, count - 1).bit_length()


def aligned(count: int, to: int = ALIGNED) -> int:
    """The next multiple."""
    return -(-count // to) * to


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Bytes of host memory that tensors of these sizes take, in the order they are pinned."""
    total, free = 0, 0
    for size in map(aligned, sizes):
        if size > ARENA:
            total += power_of_two(size)
            continue
        if size > free:
            total, free = total + ARENA, ARENA
        free -= size
    return total


class Arena:
    """Hands out pieces of pinned memory.

    allocate: makes that many bytes, uint8; pinned ones unless a test says otherwise.
    """

    def __init__(self, allocate: Callable[[int], Tensor] | None = None) -> None:
        self.allocate = allocate or (
            lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True)
        )
        self.current: Tensor | None = None
        self.used = 0

    def like(self, tensor: Tensor) -> Tensor:
        """An empty tensor of the same shape and dtype."""
        length = tensor.numel() * tensor.element_size()
        size = aligned(length)
        if size > ARENA:
            piece = self.allocate(power_of_two(size))
        else:
            if self.current is None or self.used + size > ARENA:
                self.current, self.used = self.allocate(ARENA), 0
            piece = self.current[self.used :]
            self.used += size
        return piece[:length].view(tensor.dtype).view(tensor.shape)


def waiting() -> Callable[[Tensor], Tensor]:
    """What brings a host tensor to memory that a copy engine reads without the processor, and
    leaves it where it is there already."""
    arena = Arena()
    return lambda tensor: tensor if tensor.is_pinned() else arena.like(tensor).copy_(tensor)
