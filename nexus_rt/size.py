"""A clip's size in pixels and frames: one type, one reader of it."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from nexus_rt.errors import InputError


class ClipSize(NamedTuple):
    """A clip's size in pixels and frames."""

    width: int
    height: int
    frames: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """T, H, W of its latents (Wan's VAE: 8 pixels and 4 frames a cell)."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    @classmethod
    def of(cls, latents: Tensor) -> ClipSize:
        """Of latents [B, C, T, H, W]."""
        t, h, w = latents.shape[2:]
        return cls(8 * w, 8 * h, 4 * t - 3)

    @classmethod
    def parse(cls, text: str) -> ClipSize:
        """ "832x480x81" and the like.

        Raises:
            InputError: not three numbers, sides that are not multiples of 16, frames other than
                4k+1.
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if not found:
            raise InputError(f"size {text!r} is not WIDTHxHEIGHTxFRAMES, such as 832x480x81.")
        size = cls(*map(int, found.groups()))
        if min(size) < 1 or size.width % 16 or size.height % 16 or size.frames % 4 != 1:
            raise InputError(
                f"size {size} cannot be made: sides are multiples of 16, and frames 4k+1, such as"
                " 832x480x81."
            )
        return size


def parse_sizes(text: str) -> tuple[tuple[ClipSize, ...], bool]:
    """ "832x480x81,1280x720x81", or a range "256x256x17..832x480x81": the sizes, and whether they
    are a range's ends.

    Raises:
        InputError: as `ClipSize.parse`; a range beside other sizes, or whose end is below its
            start.
    """
    ends = text.split("..")
    if len(ends) == 1:
        return tuple(ClipSize.parse(s) for s in text.split(",")), False
    if len(ends) != 2 or "," in text:
        raise InputError(f"sizes {text!r}: a range stands alone, as in 256x256x17..832x480x81.")
    low, high = map(ClipSize.parse, ends)
    if any(a > b for a, b in zip(low, high, strict=True)):
        raise InputError(f"sizes {text!r}: {low} is not below {high} in every dimension.")
    return (low, high), True
