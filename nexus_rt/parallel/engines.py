"""Engines whose work is shared: a guided step's two halves, and a step's two generators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nexus_rt.method.engine import Wrapper
from nexus_rt.parallel.layout import Mesh


@dataclass
class SplitPrompt:
    """Text embeddings [N, L, D], and what each use of them was prepared to: "whole", or "half" of
    them."""

    embeddings: Tensor
    prepared: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.embeddings.shape[0]


class GuidanceParallel(Wrapper):
    """An engine of which each of two processes computes half of a guided step: the conditional
    samples, or their unconditional twins. Other steps are computed by both."""

    def __init__(self, engine: Any, mesh: Mesh) -> None:
        super().__init__(engine)
        self.mesh = mesh

    def prepare(self, context: Tensor) -> SplitPrompt:
        """Prepared when it is known whether the step is guided."""
        return SplitPrompt(context)

    def velocity(self, latents: Tensor, timestep: Tensor, context: SplitPrompt) -> Tensor:
        """[N, ...], the same in both processes; N = 2 B where it is guided."""
        if context.batch != 2 * latents.shape[0]:
            return self.engine.velocity(latents, timestep, self._prepared(context, "whole"))
        own = self.engine.velocity(latents, timestep, self._prepared(context, "half"))
        return torch.cat(self.mesh.gathered(own, "cfg"))

    def _prepared(self, context: SplitPrompt, use: str) -> Any:
        if use not in context.prepared:
            rows = context.embeddings
            if use == "half":
                rows = rows.chunk(2)[self.mesh.places["cfg"]].contiguous()
            context.prepared[use] = self.engine.prepare(rows)
        return context.prepared[use]


class SharedGenerator(Wrapper):
    """A generator that one of two halves of the processes has; the others get what it computes.

    `velocity` computes where it is had, and is a place for the result elsewhere; `share` fills it.
    Between the two, the others compute what they have.
    """

    def __init__(self, engine: Any, owner: int, mesh: Mesh, channels: int) -> None:
        super().__init__(engine)
        self.owner, self.mesh, self.channels = owner, mesh, channels
        self.here = mesh.places["pair"] == owner

    def prepare(self, context: Tensor) -> Any:
        """The context, or how many samples it has."""
        return self.engine.prepare(context) if self.here else context.shape[0]

    def velocity(self, latents: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """[N, ...] float32: computed, or yet to come."""
        if self.here:
            return self.engine.velocity(latents, timestep, context).float().contiguous()
        return latents.new_empty(context, self.channels, *latents.shape[2:])

    def share(self, velocity: Tensor) -> Tensor:
        """The velocity of the process that has the generator."""
        return self.mesh.broadcast(velocity, self.owner, "pair")


class RemoteEngine:
    """A generator that another process has: nothing of it is here."""

    nbytes, host_bytes, resident = 0, 0, True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def load(self, **options: Any) -> None:
        """Nothing to bring."""

    def unload(self) -> None:
        """Nothing to free."""
