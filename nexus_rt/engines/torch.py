"""The eager PyTorch backend."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_rt.models.wan import WanContext, WanTransformer


class TorchEngine:
    """A Wan transformer behind the engine protocol."""

    def __init__(self, model: WanTransformer) -> None:
        self.model = model

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @torch.no_grad()
    def prepare(self, context: Tensor) -> WanContext:
        return self.model.prepare_context(context)

    @torch.no_grad()
    def velocity(self, latents: Tensor, timestep: Tensor, context: WanContext) -> Tensor:
        repeats = context.batch // latents.shape[0]
        if repeats > 1:
            latents = latents.repeat(repeats, *[1] * (latents.ndim - 1))
        return self.model(latents, timestep, context)

    def not_finite(self) -> list[str]:
        """Names of the parameters that hold NaN or infinity: where to look when a velocity is not finite."""
        return [n for n, p in self.model.named_parameters() if not torch.isfinite(p).all()]
