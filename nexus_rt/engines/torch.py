"""The PyTorch backend: a Wan transformer, eager with our kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError
from nexus_rt.loading.lora import Lora
from nexus_rt.loading.swap import LoadedFrom, set_loras
from nexus_rt.memory.offload import Moved
from nexus_rt.memory.pinned import pinned_bytes
from nexus_rt.memory.streaming import BlockStream, streamed_bytes
from nexus_rt.method.engine import warmup_noise
from nexus_rt.models.wan import WanContext, WanTransformer


class TorchEngine:
    """A Wan transformer behind the engine protocol.

    device: where it runs, if not where the model is: `load` brings it there.
    """

    def __init__(self, model: WanTransformer, device: torch.device | None = None) -> None:
        self.model, self.device = model, device or model.device
        self.weights = Moved(model, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return self.weights.nbytes

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory that the weights take once they have left the device; 0 on a
        CPU, where they stay."""
        if self.device.type == "cpu":
            return 0
        return pinned_bytes(t.numel() * t.element_size() for t in self.model.parameters())

    @property
    def resident(self) -> bool:
        """Whether the weights are where the engine runs."""
        return self.weights.resident

    @property
    def streamed_bytes(self) -> int:
        """Bytes on the device while its blocks are streamed."""
        return streamed_bytes(self.model)

    def reserve(self) -> None:
        """Allocate the weights' places on the device, for a `load` in another thread."""
        if self.model.stream is None:
            self.weights.reserve()

    def load(self, streamed: bool = False) -> None:
        """Bring the weights to the engine's device; nothing where they are there.

        streamed: its blocks stay in host memory and come as they run, two at a time.
        """
        if self.model.stream is not None:
            return
        if streamed:
            BlockStream(self.model, self.device)
        else:
            self.weights.load()

    def unload(self) -> None:
        """Leave the weights in pinned host memory, so that another engine has the device's; they
        are copied once."""
        if self.model.stream is not None:
            self.model.stream.close()
        self.weights.unload()

    def warmup(self, latent: tuple[int, int, int], batch: int = 2, tokens: int = 24) -> None:
        """One step on noise at a latent size (T, H, W), so that the first real one is as fast as
        the rest."""
        c = self.model.config
        sizes = latent, c.in_channels, c.text_dim, batch, tokens
        latents, embeddings = warmup_noise(*sizes, self.device)
        self.velocity(latents, torch.tensor(500.0, device=self.device), self.prepare(embeddings))

    def set_loras(self, loras: Sequence[Lora]) -> None:
        """Make these the LoRAs of the model, and no others.

        Raises:
            ModelError: one that does not fit, or a checkpoint that is gone; nothing has changed
                then.
        """
        if self.model.stream is not None:
            self.unload()  # streamed blocks are changed where they wait
        if self.loaded is None:
            raise InputError(
                "LoRAs are changed by reading a checkpoint again, and this model was made of none;"
                " load it with load_transformer.",
                code="unsupported",
                param="loras",
            )
        set_loras(self.model, self.loaded, loras)
        if self.resident:
            self.weights.forget()

    @property
    def loaded(self) -> LoadedFrom | None:
        """What the model was made of."""
        return getattr(self.model, "loaded_from", None)

    def published_numerics(self, on: bool) -> None:
        """Residual stream, time projection and velocity in float32, as the published code computes
        them; or not."""
        self.model.float32_stream = on

    @torch.no_grad()
    def prepare(self, context: Tensor) -> WanContext:
        self.load()
        return self.model.prepare_context(context)

    @torch.no_grad()
    def velocity(self, latents: Tensor, timestep: Tensor, context: WanContext) -> Tensor:
        self.load()
        repeats = context.batch // latents.shape[0]
        if repeats > 1:
            latents = latents.repeat(repeats, *[1] * (latents.ndim - 1))
        return self.model(latents, timestep, context)

    def not_finite(self) -> list[str]:
        """Names of the parameters that hold NaN or infinity: where to look when a velocity is not
        finite."""
        finite = lambda p: torch.isfinite(p.float() if p.dtype.itemsize == 1 else p).all()
        return [n for n, p in self.model.named_parameters() if not finite(p)]
