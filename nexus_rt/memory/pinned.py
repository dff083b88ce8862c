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


def _place(free: list[int], size: int) -> int:
    """The first arena with room for so many bytes, which are taken; a new one where there is
    none."""
    for i, left in enumerate(free):
        if size <= left:
            free[i] -= size
            return i
    free.append(ARENA - size)
    return len(free) - 1


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Bytes of host memory that tensors of these sizes take, in the order they are pinned."""
    single = 0
    free: list[int] = []
    for size in map(aligned, sizes):
        if size > ARENA:
            single += power_of_two(size)
        elif size:
            _place(free, size)
    return single + len(free) * ARENA


class Arena:
    """Hands out pieces of pinned memory.

    allocate: makes that many bytes, uint8; pinned ones unless a test says otherwise.
    """

    def __init__(self, allocate: Callable[[int], Tensor] | None = None) -> None:
        self.allocate = allocate or (
            lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=True)
        )
        self.arenas: list[Tensor] = []
        self.free: list[int] = []

    def like(self, tensor: Tensor) -> Tensor:
        """An empty tensor of the same shape and dtype."""
        length = tensor.numel() * tensor.element_size()
        size = aligned(length)
        if not size:
            return torch.empty_like(tensor, device="cpu")
        if size > ARENA:
            piece = self.allocate(power_of_two(size))
        else:
            i = _place(self.free, size)
            if i == len(self.arenas):
                self.arenas.append(self.allocate(ARENA))
            piece = self.arenas[i][ARENA - self.free[i] - size :]
        return piece[:length].view(tensor.dtype).view(tensor.shape)


def waiting() -> Callable[[Tensor], Tensor]:
    """What brings a host tensor to memory that a copy engine reads without the processor, and
    leaves it where it is there already."""
    arena = Arena()
    return lambda tensor: tensor if tensor.is_pinned() else arena.like(tensor).copy_(tensor)
