"""A transformer larger than the memory it runs in: its blocks wait in host memory, two at a time
come to the device.

While a block runs, the next is copied beside it on a stream of its own, so a step takes the longer
of computing and copying: 14B in bfloat16 is 28 GB a forward, about half a second at 55 GB/s (PCIe
5).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from nexus_rt.memory.pinned import aligned, waiting
from nexus_rt.models.wan import WanTransformer

VECTOR = 16  # bytes at which a tensor begins in a slot: the widest that kernels load at once


def streamed_bytes(model: WanTransformer) -> int:
    """Bytes on the device while streaming: all but the blocks, and two of the largest."""
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    blocks = [_slot_bytes([(p, p.dtype) for p in b.parameters()]) for b in model.blocks]
    return size(model) - sum(size(b) for b in model.blocks) + 2 * max(blocks)


def _slot_bytes(tensors: list[tuple[Tensor, torch.dtype]]) -> int:
    """Bytes of tensors, each in its dtype there, one after another."""
    return sum(aligned(t.numel() * d.itemsize, VECTOR) for t, d in tensors)


def _views(buffer: Tensor, tensors: list[tuple[Tensor, torch.dtype]]) -> list[Tensor]:
    """Places for tensors in a buffer, one after another."""
    views, at = [], 0
    for t, dtype in tensors:
        length = t.numel() * dtype.itemsize
        views.append(buffer[at : at + length].view(dtype).view(t.shape))
        at += aligned(length, VECTOR)
    return views


class BlockStream:
    """Streams the blocks of a model to a device from where they are now, which should be host
    memory.

    The rest of the model is moved there for good. `dtype` converts what arrives, so that a model
    stored in bfloat16 can compute in float32 with two blocks of that; None keeps each parameter's
    own. Blocks may be of different sizes, as those of mixed quantisations are.
    """

    def __init__(
        self, model: WanTransformer, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self.model, self.device = model, device
        self.cuda = device.type == "cuda"
        in_blocks = {id(p) for p in model.blocks.parameters()}
        for p in model.parameters():
            if id(p) not in in_blocks:
                p.data = p.data.to(device, dtype or p.dtype)
        wait = waiting() if self.cuda else lambda t: t
        self.host: list[list[Tensor]] = []
        for block in model.blocks:
            for p in block.parameters():
                p.data = wait(p.data.cpu() if self.cuda else p.data)  # one copy at any time
            self.host.append([p.data for p in block.parameters()])
        there = [[(t, dtype or t.dtype) for t in block] for block in self.host]
        size = max(map(_slot_bytes, there))
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.places = [[_views(buffer, block) for block in there] for buffer in self.buffers]
        self.slots: list[list[Tensor]] = [[], []]  # the tensors of the block that each has
        self.holds = [-1, -1]  # which block each slot has, or is getting
        self.side = torch.cuda.Stream(device) if self.cuda else None
        self.ready = [torch.cuda.Event() for _ in range(2)] if self.cuda else []
        model.stream = self

    def bring(self, index: int) -> None:
        """Make block `index` ready to be queued, and start on the one after it; call it for each
        block in turn."""
        slot = self.holds.index(index) if index in self.holds else self.fetch(index, 0)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.ready[slot])
        views = self.slots[slot]
        for p, there in zip(self.model.blocks[index].parameters(), views, strict=True):
            p.data = there
        following = (index + 1) % len(self.host)
        if following not in self.holds:
            self.fetch(following, 1 - slot)

    def fetch(self, index: int, slot: int) -> int:
        """Start copying a block to a slot; returns the slot. Called once a copy."""
        self.holds[slot], self.slots[slot] = index, self.places[slot][index]
        with contextlib.ExitStack() as stack:
            if self.side is not None:
                # what still runs from this slot
                self.side.wait_stream(torch.cuda.current_stream(self.device))
                stack.enter_context(torch.cuda.stream(self.side))
            for there, kept in zip(self.slots[slot], self.host[index], strict=True):
                there.copy_(kept, non_blocking=True)
            if self.cuda:
                self.ready[slot].record(self.side)
        return slot

    def close(self) -> None:
        """Leave the blocks where they wait, and free the slots."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        for block, kept in zip(self.model.blocks, self.host, strict=True):
            for p, t in zip(block.parameters(), kept, strict=True):
                p.data = t
        self.slots, self.places, self.buffers, self.model.stream = [], [], [], None
