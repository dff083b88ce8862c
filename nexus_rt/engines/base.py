"""The protocol every backend speaks: a generator that turns latents, a timestep and a prepared prompt into a velocity."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Engine(Protocol):
    """A generator as the denoising loop sees it. Any object with these two methods will do."""

    def prepare(self, context: Tensor) -> Any:
        """Whatever of a prompt can be computed once: text embeddings [N, L, D] to an opaque context of batch N."""
        ...

    def velocity(self, latents: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """Predict velocities.

        Args:
            latents: [B, C, T, H, W] float32.
            timestep: scalar float tensor, 0..1000.
            context: of `prepare`, batch N, a multiple of B: the latents are repeated N/B times, so that a guided step
                (conditional samples, then their unconditional twins) is one call.

        Returns:
            [N, C, T, H, W], any floating dtype.
        """
        ...
