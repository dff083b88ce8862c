"""What the runtime calls on an engine: the protocol of the loop, and those of what an engine may do
besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeGuard, TypeVar, runtime_checkable

import torch
from torch import Tensor

from nexus_rt.core.limits import MAX_SEQUENCE_LENGTH as PROMPT_TOKENS
from nexus_rt.core.size import BuiltSizes


class Engine(Protocol):
    """A generator as the denoising loop sees it: any object with these two methods will do.

    The backends of this package are also `Resident` and `Sized`, and some of them the rest of this
    file.
    """

    def prepare(self, context: Tensor) -> Any:
        """Whatever of a prompt can be computed once: text embeddings [N, L, D] to an opaque context
        of batch N."""
        ...

    def velocity(self, latents: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """Predict velocities.

        Args:
            latents: [B, C, T, H, W] float32.
            timestep: scalar float tensor, 0..1000.
            context: of `prepare`, batch N, a multiple of B: the latents are repeated N/B times, so
                that a guided step (conditional samples, then their unconditional twins) is one
                call.

        Returns:
            [N, C, T, H, W], any floating dtype.
        """
        ...


class Resident(Protocol):
    """Weights that `nexus_rt.pipeline.residency` moves between host memory and a device."""

    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        ...

    @property
    def resident(self) -> bool:
        """Whether the weights are where the engine runs."""
        ...

    def load(self) -> None:
        """Bring the weights to the device; nothing where they are there."""
        ...

    def unload(self) -> None:
        """Give the device's memory back."""
        ...


@runtime_checkable
class Streamed(Protocol):
    """Weights that can stay in host memory and come to the device block by block, as they run."""

    @property
    def streamed_bytes(self) -> int:
        """Bytes on the device while they do."""
        ...

    def load(self, streamed: bool = False) -> None:
        """Bring the weights to the device, or only, where `streamed`, as they run."""
        ...


@runtime_checkable
class Sized(Protocol):
    """An engine that was built for some sizes."""

    @property
    def built_sizes(self) -> tuple[BuiltSizes, ...]:
        """What each of its parts was built for; () where there is no bound."""
        ...


@runtime_checkable
class Warmable(Protocol):
    """An engine whose first step at a size is slow."""

    def warmup(self, latent: tuple[int, int, int]) -> None:
        """One step on noise at a latent size (T, H, W), so that the first real one is as fast as
        the rest."""
        ...


def warmup_noise(
    latent: tuple[int, int, int],
    channels: int,
    text_dim: int,
    batch: int,
    tokens: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """What a warm-up step reads, in the shapes of a call's own.

    Args:
        batch: samples of the step; half of an even number are the unconditional twins.
        tokens: of the prompt, the rest of its 512 zeros as encoders leave them.

    Returns:
        Latents [B, C, T, H, W] and embeddings [batch, 512, text_dim], float32.
    """
    embeddings = torch.zeros(batch, PROMPT_TOKENS, text_dim, device=device)
    embeddings[:, :tokens].normal_()
    samples = batch if batch % 2 else batch // 2
    return torch.randn(samples, channels, *latent, device=device), embeddings


@runtime_checkable
class Diagnosable(Protocol):
    """An engine that can look for what is wrong with its weights."""

    def not_finite(self) -> list[str]:
        """Names of the parameters that hold NaN or infinity."""
        ...


@runtime_checkable
class PublishedNumerics(Protocol):
    """An engine that can compute as the published code does, in float32 where that does."""

    def published_numerics(self, on: bool) -> None:
        """Turn it on or off."""
        ...


@runtime_checkable
class Reserving(Protocol):
    """Weights whose places on the device can be allocated before they come."""

    def reserve(self) -> None:
        """Allocate the places; `load`, in whatever thread, then only copies."""
        ...


@runtime_checkable
class Sharing(Protocol):
    """An engine whose velocity another process may have computed (`nexus_rt.parallel`)."""

    def share(self, velocity: Tensor) -> Tensor:
        """The velocity, once it is here; until then what `velocity` returned is its place."""
        ...


@runtime_checkable
class Experts(Protocol):
    """A generator of several engines, of which each step runs the one that the plan names."""

    @property
    def experts(self) -> Mapping[str, Any]:
        """Engines by the name of their expert, "high" or "low"."""
        ...


@runtime_checkable
class Changeable(Protocol):
    """An engine whose LoRAs can be changed."""

    def set_loras(self, loras: Sequence[Any]) -> None:
        """Make these the LoRAs, and no others."""
        ...


Ability = TypeVar("Ability")


def supports(engine: Any, protocol: type[Ability]) -> TypeGuard[Ability]:
    """Whether an engine has what a protocol asks; one that wraps another, whether that has.

    Since Python 3.12 `isinstance` does not see attributes that `__getattr__` hands on.
    """
    return isinstance(getattr(engine, "wrapped", engine), protocol)


class Wrapper:
    """An engine around another: what it does not do itself is the other's."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    @property
    def wrapped(self) -> Any:
        """The innermost engine, whose abilities are this one's."""
        return getattr(self.engine, "wrapped", self.engine)
