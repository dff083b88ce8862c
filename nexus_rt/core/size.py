"""A clip's size in pixels and frames: one type, and the readers of its text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nexus_rt.core.errors import InputError, shorten, shown

if TYPE_CHECKING:
    from torch import Tensor


class ClipSize(NamedTuple):
    """A clip's size in pixels and frames."""

    width: int
    height: int
    frames: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """T, H, W of its latents (Wan's VAE: 8 pixels and 4 frames a cell)."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def cells(self) -> int:
        """The number of its latents' cells."""
        return math.prod(self.latent)

    def tokens(self, patch: Sequence[int] = (1, 2, 2)) -> int:
        """The number of its tokens in a transformer of patches of so many cells."""
        return math.prod(side // p for side, p in zip(self.latent, patch, strict=True))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    @property
    def options(self) -> dict[str, int]:
        """The size as a pipeline's call names it."""
        return {"width": self.width, "height": self.height, "num_frames": self.frames}

    @classmethod
    def of_defaults(
        cls, defaults: Any, sides: tuple[int, int] | None = None, frames: int | None = None
    ) -> ClipSize:
        """(width, height) and frames, each a pair's own (`Defaults`) where it is None."""
        width, height = sides or (defaults.width, defaults.height)
        return cls(width, height, frames or defaults.num_frames)

    @classmethod
    def of(cls, latents: Tensor) -> ClipSize:
        """The size of a clip with latents [B, C, T, H, W]."""
        t, h, w = latents.shape[2:]
        return cls(8 * w, 8 * h, 4 * t - 3)

    @classmethod
    def parse(cls, text: str) -> ClipSize:
        """ "832x480x81" and the like.

        Raises:
            InputError: not three numbers, sides that are not multiples of 16, frames other than
                4k+1.
        """
        numbers = _numbers(text, 3)
        if not numbers:
            raise InputError(
                f"size {shorten(text, 80)!r} is not WIDTHxHEIGHTxFRAMES, such as 832x480x81.",
                param="size",
            )
        size = cls(*numbers)
        if min(size) < 1 or size.width % 16 or size.height % 16 or size.frames % 4 != 1:
            raise InputError(
                f"size {size} cannot be made: sides are multiples of 16, and frames 4k+1, such as"
                " 832x480x81.",
                param="size",
            )
        return size


@dataclass(frozen=True)
class BuiltSizes:
    """The sizes that an exported part was built for.

    ranged: the two sizes are the ends of a range. bound: how many of width, height and frames its
        graphs were built for.
    """

    part: str
    sizes: tuple[ClipSize, ...]
    ranged: bool = False
    bound: int = 3

    def check(self, size: ClipSize) -> None:
        """Raise an `InputError` that names the sizes, unless this is one of them."""
        asked = size[: self.bound]
        if self.ranged:
            low, high = self.sizes
            right = all(a <= b <= c for a, b, c in zip(low, asked, high, strict=False))
        else:
            right = asked in [s[: self.bound] for s in self.sizes]
        if not right:
            between = " to " if self.ranged else ", "
            raise InputError(
                f"size {size} is none that this {self.part} engine was built for:"
                f" {between.join(map(str, self.sizes))}; generate one of them, or export with"
                " --sizes.",
                code="unsupported",
                param="size",
            )


def _numbers(text: str, count: int) -> tuple[int, ...]:
    """Numbers with an x between, as many as `count`; () for anything else."""
    words = text.strip().lower().split("x")
    if len(words) != count or not all(re.fullmatch(r"[0-9]{1,9}", word) for word in words):
        return ()
    return tuple(map(int, words))


def parse_sides(text: str) -> tuple[int, int]:
    """ "832x480": width and height in pixels.

    Raises:
        InputError: not two numbers.
    """
    match _numbers(text, 2):
        case (width, height):
            return width, height
    raise InputError(f"{shown(text)} is not WIDTHxHEIGHT, such as 832x480.", param="size")


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
        raise InputError(
            f"sizes {text!r}: a range stands alone, as in 256x256x17..832x480x81.",
            code="conflict",
            param="sizes",
        )
    low, high = map(ClipSize.parse, ends)
    if any(a > b for a, b in zip(low, high, strict=True)):
        raise InputError(
            f"sizes {text!r}: {low} is not below {high} in every dimension.",
            code="out_of_range",
            param="sizes",
        )
    return (low, high), True
