"""The protocol every backend speaks: a generator that turns latents, a timestep and a prepared prompt into a velocity."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Engine(Protocol):
    """A generator as the denoising loop sees it: any object with these two methods will do.

    The backends of this package also have what moves engines between memories (`nexus_rt.engines.residency`): `nbytes`
    of the weights, `resident`, `load()`, `unload()` and `warmup(latent)`.
    """

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
