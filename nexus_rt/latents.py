"""Latents: which sizes a pair can make, and the noise they begin as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_rt.checks import instance, whole
from nexus_rt.devices import send
from nexus_rt.errors import InputError
from nexus_rt.size import ClipSize

# one, or one for each video
Generators = torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None


@dataclass(frozen=True)
class LatentGrid:
    """How pixels become latents: the VAE's factors in space and time, and the transformer's patch
    (time, height, width)."""

    space: int
    time: int
    patch: tuple[int, int, int]

    def latent(self, size: ClipSize) -> tuple[int, int, int]:
        """Latent frames, height and width of a clip."""
        return (
            (size.frames - 1) // self.time + 1,
            size.height // self.space,
            size.width // self.space,
        )

    def check(self, size: ClipSize) -> None:
        """Raise an `InputError` that names the nearest valid value."""
        instance("size", size, ClipSize, "a ClipSize(width, height, frames)")
        for name, value in size._asdict().items():
            whole(name, value, -(2**31), 2**31)
        for name, value, unit in (
            ("height", size.height, self.space * self.patch[1]),
            ("width", size.width, self.space * self.patch[2]),
        ):
            if value < unit or value % unit:
                near = sorted(
                    {max(unit, value // unit * unit), max(unit, -(-value // unit) * unit)}
                )
                raise InputError(
                    f"{name} is {value}; expected a multiple of {unit}, such as"
                    f" {' or '.join(map(str, near))}.",
                    param=name,
                )
        num_frames = size.frames
        if num_frames < 1 or (num_frames - 1) % self.time:
            low = max(1, (num_frames - 1) // self.time * self.time + 1)
            raise InputError(
                f"num_frames is {num_frames}; expected {self.time}k+1, such as {low} or"
                f" {low + self.time}.",
                param="num_frames",
            )


def random_latents(
    shape: tuple[int, ...],
    generator: Generators,
    device: torch.device,
) -> Tensor:
    """Noise [B, C, T, H, W], float32, drawn where a generator lives; several generators give
    each sample its own.

    Raises:
        InputError: more or fewer of them than samples.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise InputError(
                f"{len(generator)} generators for {shape[0]} videos; pass one for each, or a single"
                " one.",
                code="mismatch",
                param="generator",
            )
        return torch.cat([random_latents((1, *shape[1:]), g, device) for g in generator])
    source = generator.device if generator is not None else device
    noise = torch.randn(shape, generator=generator, device=source, dtype=torch.float32)
    return send(noise, device)


def renoise(latents: Tensor, sigma: float, generator: Generators) -> Tensor:
    """Clean latents at noise level sigma again: `(1 - sigma) x + sigma eps`, eps drawn as
    `random_latents`."""
    noise = random_latents(tuple(latents.shape), generator, latents.device)
    return torch.lerp(latents, noise, sigma)
