"""What a batch makes of a list of prompts, and where: the folder, the shard and the settings of a
clip."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nexus_rt.core.checks import instance
from nexus_rt.core.errors import InputError, choose, shown
from nexus_rt.media.video import SUFFIXES
from nexus_rt.pipeline.prompts import Item, check_name
from nexus_rt.pipeline.settings import CallSettings

ONE_CLIP = ("num_videos_per_prompt", "output_type", "reuse_parity")  # settings without a part here


@dataclass(frozen=True)
class Job:
    """What a run makes of every item that does not say otherwise.

    settings: of a call; an item's own go before them. models: words for where the models are from;
        a clip made by others is made again.

    Raises:
        InputError: a shard that does not exist, another suffix than a clip's, or settings of
            several videos or of no frames.
    """

    folder: Path
    seed: int = 0
    fps: str | int | float = 16
    suffix: str = ".mp4"
    shard: tuple[int, int] = (1, 1)
    settings: CallSettings = CallSettings()  # noqa: RUF009 (frozen)
    models: str = ""

    def __post_init__(self) -> None:
        part, count = self.shard
        if not 1 <= part <= count:
            raise InputError(
                f"shard {part}/{count} does not exist; expected I/N with I from 1 to N, such as"
                " 1/4.",
                code="out_of_range",
                param="shard",
            )
        choose("format", self.suffix, SUFFIXES)
        instance("settings", self.settings, CallSettings, "CallSettings")
        _check_one_clip(self.settings)

    @property
    def results(self) -> Path:
        """Where this shard writes its lines."""
        part, count = self.shard
        return self.folder / ("results.jsonl" if count == 1 else f"results.{part}-of-{count}.jsonl")

    def mine(self, items: list[Item]) -> list[Item]:
        """This shard's items."""
        part, count = self.shard
        return items[part - 1 :: count]

    def clip(self, item: Item) -> Path:
        """Where an item's clip is.

        Raises:
            InputError: an id that can be no file's name.
        """
        check_name(item.id, "item")
        return self.folder / f"{item.id}{self.suffix}"

    def settings_of(self, item: Item) -> CallSettings:
        """The job's settings with the item's own before them.

        Raises:
            InputError: one of the item's is no setting's value, or not one clip's.
        """
        if not item.settings:
            return self.settings
        merged = self.settings.replace(**item.settings)
        _check_one_clip(merged)
        return merged


def _check_one_clip(wanted: CallSettings) -> None:
    """Raise an `InputError` where settings are of more than a clip."""
    if name := next((n for n in ONE_CLIP if n in wanted.given), None):
        raise InputError(
            f"a batch makes one clip of each prompt; leave {name} out.",
            code="unsupported",
            param=name,
        )


def parse_shard(text: str) -> tuple[int, int]:
    """ "I/N"."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    if not match:
        raise InputError(
            f"shard {shown(text)} is not I/N; expected such as 1/4.",
            code="unreadable",
            param="shard",
        )
    return int(match[1]), int(match[2])
