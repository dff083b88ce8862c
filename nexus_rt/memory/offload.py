"""Weights that leave a device and come back: one copy in pinned host memory, made when they first
leave."""

from __future__ import annotations

import gc
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nexus_rt.core.process import LOADING
from nexus_rt.memory.pinned import Arena


def release(device: torch.device) -> None:
    """Return the memory of a dropped model to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Moved:
    """The parameters and buffers of a module, on `device` or in host memory. On a CPU they stay
    where they are."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self.host: dict[str, Tensor] = {}
        self.arena: Arena | None = None  # of the host copies, made with the first
        self.places: list[Tensor] = []  # on the device, for weights that are about to come

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.module.named_parameters(), *self.module.named_buffers()]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self._tensors())

    @property
    def resident(self) -> bool:
        """Whether the weights are on the device."""
        # of the first alone: a 14B has a thousand, and this is asked at every step
        first = next(chain(self.module.parameters(), self.module.buffers()), None)
        return first is None or first.device.type == self.device.type

    def reserve(self) -> None:
        """Allocate their places on the device, so that a `load` in another thread only copies:
        allocating there could break what this thread records as a CUDA graph."""
        if not self.resident and not self.places:
            self.places = [
                torch.empty_like(t.detach(), device=self.device) for _, t in self._tensors()
            ]

    def load(self) -> None:
        """Bring them to the device, on the current stream; nothing where they are there."""
        if self.resident:
            return
        self.reserve()
        there = list(zip(self._tensors(), self.places, strict=True))
        self.places = []
        for (_, t), place in there:
            place.copy_(t.detach(), non_blocking=True)
        for (_, t), place in reversed(there):  # the first, which says that all are there, last
            t.data = place
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def forget(self) -> None:
        """Take the host's copies for out of date: the weights on the device have changed."""
        if self.device.type != "cpu":
            self.host, self.arena = {}, None

    def unload(self) -> None:
        """Give the device's memory back; what was copied before is not copied again."""
        self.places = []
        if self.device.type == "cpu" or not self.resident:
            return
        torch.cuda.current_stream(self.device).synchronize()
        self.arena = self.arena or Arena()
        for name, t in self._tensors():
            if t.device.type == "cpu":  # streamed from where it is
                continue
            if name not in self.host:
                self.host[name] = self.arena.like(t).copy_(t)
            t.data = self.host[name]
        torch.cuda.empty_cache()


class Lazy:
    """A model that is read when it is first needed; a subclass has `device` and says how in
    `_read`."""

    device: torch.device
    model: Any = None
    weights: Moved | None = None

    def _read(self) -> nn.Module:
        """The model, on the device."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the weights, if they are not in memory, and bring them to the device.

        Raises:
            ModelError: as reading says.
        """
        if self.weights is None:
            with LOADING:
                if self.weights is None:
                    model = self.model = self._read()
                    self.weights = Moved(model, self.device)
        self.weights.load()

    def unload(self) -> None:
        """Leave the weights in host memory; on a CPU, where that is no gain, drop them."""
        if self.weights is not None and self.device.type != "cpu":
            self.weights.unload()
        else:
            self.drop()

    def drop(self) -> None:
        """Free the weights; the next use reads them again."""
        self.model = self.weights = None
        release(self.device)
