"""Arguments that several commands share, as parent parsers."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.fields import CLI, REWRITING, Field, fields_of
from nexus_rt.core.size import parse_sides
from nexus_rt.pipeline import settings
from nexus_rt.pipeline.sources import ModelSources, RunOptions

PLAN_HELP = (
    "reference | small | large | handoff=AT[,bridge=K] | auto[=TOLERANCE] | segments such as"
    " 'small:10 bridge:5 large:15@1'. AT is a fraction of the steps below 1, a timestep from 1 up,"
    " or sigma:0.9; segments take steps, percentages (30%%) or * for the rest, and a guidance scale"
    " of their own after @, guided steps after it (@3[0:40%%]), /every=K, /guidance-every=K or"
    " /adaptive=X for reuse; small:4/10 large:4 gives each a clock of its own, small:10"
    " renoise=0.75 large:4 re-noises between; @FILE:MS takes the best plan of a front"
    " (`nexus-rt tune`) within MS"
)
DTYPES = fields_of(RunOptions)["dtype"].choices
SEED_HELP = (
    "0 to 2^64 - 1; the same seed gives the same video, -1 draws a fresh one and prints it"
    " (default: 0)"
)
FPS_HELP = "frames per second of the file, such as 16, 23.976 or 30000/1001 (default: 16)"


WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
REAL = re.compile(r"[+-]?(?:[0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,4})?")


def whole_number(text: str) -> int:
    """Decimal digits with a sign; Python's int() takes underscores and other scripts' digits too,
    and refuses 4,301 digits."""
    if not WHOLE.fullmatch(text.strip(" ")):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number; expected such as 50")
    return int(text)


def real_number(text: str) -> float:
    """A finite decimal number; Python's float() takes nan, inf and 1e309 too."""
    value = float(text) if REAL.fullmatch(text.strip(" ")) else math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number; expected such as 0.5")
    return value


def frame_size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT."""
    try:
        return parse_sides(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def guidance(text: str) -> float | tuple[float, float]:
    """A guidance scale, or "HIGH,LOW" of a generator's two experts."""
    numbers = [real_number(part) for part in text.split(",", 2)]
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{shown(text)} has a third scale; expected HIGH,LOW")
    return (numbers[0], numbers[1]) if len(numbers) == 2 else numbers[0]


def timesteps(text: str) -> list[float]:
    """A list of numbers."""
    return [real_number(part) for part in text.split(",")]


# From an option's text to a setting's value, by `Field.kind`.
TYPES: dict[Any, Callable[[str], Any]] = {
    int: int,  # `whole_number`, by each parser's registry
    float: float,  # `real_number`
    "scale": guidance,
    "numbers": timesteps,
}


def models() -> argparse.ArgumentParser:
    """Where the models are."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("models (folders in diffusers' or Wan's layout, or hub ids)")
    add_settings(group, fields_of(ModelSources).values(), closed=True)
    return parent


def running() -> argparse.ArgumentParser:
    """What runs the models."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("what runs them")
    add_settings(group, fields_of(RunOptions).values(), closed=True)
    return parent


def add_settings(
    group: argparse._ActionsContainer, fields: Iterable[Field], closed: bool = False
) -> None:
    """An option a setting; of a struct of settings, an option for each of its fields.

    Ranges and names are left to the settings' own check, whose error suggests the nearest name;
    closed: the settings have no check, and the parser takes their names alone.
    """
    for field in fields:
        if field.nested:
            add_settings(group, fields_of(field.kind).values())
            continue
        option = "--" + field.flag.replace("_", "-")
        names = field.choices if closed else ()
        words = (field.sentence if names else field.help).replace("%", "%%")
        words += f": {PLAN_HELP}" if field.name == "plan" else ""
        form: dict[str, Any] = {"metavar": field.metavar}
        if field.kind is bool:
            form = {"action": "store_true"}
        elif field.kind == "texts":
            form |= {"action": "append", "default": []}
        else:
            form |= {"type": TYPES.get(field.kind, str), "choices": names or None}
            form["default"] = field.default if closed else None
        group.add_argument(option, help=words, **form)


def add_size(group: argparse._ArgumentGroup) -> None:
    """Width and height in one option."""
    group.add_argument(
        "--size",
        type=frame_size,
        metavar="WxH",
        help="frame size, such as 832x480 (default: the pair's)",
    )


def walk() -> argparse.ArgumentParser:
    """A call's settings."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("what runs when")
    add_size(group)
    add_settings(group, settings.fields(CLI).values())
    return parent


def rewriting() -> argparse.ArgumentParser:
    """What the large generator reads."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("rewriting (what the large generator reads)")
    add_settings(group, settings.fields(REWRITING).values())
    group.add_argument(
        "--rewriter",
        metavar="DIR|URL",
        help="rewrite by a chat model's folder, or an OpenAI-compatible endpoint (http://HOST/v1)",
    )
    group.add_argument("--rewriter-model", metavar="NAME", help="model name at the --rewriter URL")
    return parent


def clips() -> argparse.ArgumentParser:
    """A list of prompts and the folder of their clips."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(
        "prompts", metavar="LIST", help="a prompt a line (.txt), .json, .jsonl, or VR-Bench's files"
    )
    group = parent.add_argument_group("the folder of clips")
    group.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="for the clips and results.jsonl; goes on where it was",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of clips whose entry names none; " + SEED_HELP
    )
    group.add_argument("--fps", default="16", help=FPS_HELP)
    group.add_argument("--format", default="mp4", help="mp4 (default) | gif | png (contact sheets)")
    group.add_argument(
        "--shard", default="1/1", metavar="I/N", help="this process's part of the list, such as 1/4"
    )
    group.add_argument(
        "--ray",
        action="store_true",
        help="distribute the list over Ray workers (pip install 'nexus-rt[ray]')",
    )
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="number of Ray workers (default: one per GPU, else one)",
    )
    return parent
