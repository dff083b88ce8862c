"""Latents: which sizes a pair can make, and the noise they begin as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.checks import instance, whole
from nexus_rt.core.devices import send
from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.size import ClipSize

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


def check_generators(generator: Any, videos: int) -> None:
    """Raise unless `generator` is None, a torch.Generator, or one for each video."""
    several = (
        generator
        if isinstance(generator, (list, tuple))
        else []
        if generator is None
        else [generator]
    )
    for one in several:
        if not isinstance(one, torch.Generator):
            raise InputError(
                f"generator is {shown(one)}; expected a torch.Generator, such as"
                " torch.Generator().manual_seed(7), or one for each video.",
                code="invalid_type",
                param="generator",
            )
    if isinstance(generator, (list, tuple)) and len(generator) != videos:
        raise InputError(
            f"{len(generator)} generators for {videos} videos; pass one for each, or a single one.",
            code="mismatch",
            param="generator",
        )


def check_latents(latents: Any, shape: tuple[int | None, ...]) -> None:
    """Raise unless latents are finite and of a shape, of which None is any number from 1 up."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        words = str(latents.dtype) if isinstance(latents, Tensor) else shown(latents)
        raise InputError(
            f"latents are {words}; expected a floating-point tensor [B, C, T, H, W].",
            code="invalid_type",
            param="latents",
        )
    have = tuple(latents.shape)
    if len(have) != len(shape) or not all(
        n == wanted or (wanted is None and n) for n, wanted in zip(have, shape, strict=True)
    ):
        sides = [c if n is None else n for c, n in zip("BCTHW", shape, strict=True)]
        raise InputError(
            f"latents have shape {have}; expected [{', '.join(map(str, sides))}], as the models,"
            " the size and the frames ask.",
            code="mismatch",
            param="latents",
        )
    if latents.device.type == "meta" or not bool(latents.isfinite().all()):
        raise InputError(
            "latents hold NaN or infinity, or no values; pass finite ones.",
            code="not_finite",
            param="latents",
        )
