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

from nexus_rt.models.wan import WanTransformer


def streamed_bytes(model: WanTransformer) -> int:
    """Bytes on the device while streaming: all but the blocks, and two of them."""
    size = lambda module: sum(p.numel() * p.element_size() for p in module.parameters())
    blocks = [size(b) for b in model.blocks]
    return size(model) - sum(blocks) + 2 * max(blocks)


class BlockStream:
    """Streams the blocks of a model to a device from where they are now, which should be host
    memory.

    The rest of the model is moved there for good. `dtype` converts what arrives, so that a model
    stored in bfloat16 can compute in float32 with two blocks of that; None keeps each parameter's
    own.
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
        self.host = [[self._waiting(p) for p in block.parameters()] for block in model.blocks]
        self.slots = [
            [torch.empty(t.shape, dtype=dtype or t.dtype, device=device) for t in self.host[0]]
            for _ in range(2)
        ]
        self.holds = [-1, -1]  # which block each slot has, or is getting
        self.side = torch.cuda.Stream(device) if self.cuda else None
        self.ready = [torch.cuda.Event() for _ in range(2)] if self.cuda else []
        model.stream = self

    def _waiting(self, p: Tensor) -> Tensor:
        """A parameter in host memory that a copy engine reads without the processor."""
        return p.data.cpu().pin_memory() if self.cuda and not p.data.is_pinned() else p.data

    def bring(self, index: int) -> None:
        """Make block `index` ready to be queued, and start on the one after it; call it for each
        block in turn."""
        slot = self.holds.index(index) if index in self.holds else self._fetch(index, 0)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.ready[slot])
        for p, there in zip(self.model.blocks[index].parameters(), self.slots[slot], strict=True):
            p.data = there
        following = (index + 1) % len(self.host)
        if following not in self.holds:
            self._fetch(following, 1 - slot)

    def _fetch(self, index: int, slot: int) -> int:
        """Start copying a block to a slot; returns the slot."""
        self.holds[slot] = index
        with contextlib.ExitStack() as stack:
            if self.side is not None:
                # what still runs from this slot
                self.side.wait_stream(torch.cuda.current_stream(self.device))
                stack.enter_context(torch.cuda.stream(self.side))
            for there, waiting in zip(self.slots[slot], self.host[index], strict=True):
                there.copy_(waiting, non_blocking=True)
            if self.cuda:
                self.ready[slot].record(self.side)
        return slot

    def close(self) -> None:
        """Leave the blocks where they wait, and free the slots."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        for block, waiting in zip(self.model.blocks, self.host, strict=True):
            for p, t in zip(block.parameters(), waiting, strict=True):
                p.data = t
        self.slots, self.model.stream = [], None
