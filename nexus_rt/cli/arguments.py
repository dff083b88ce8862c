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

PLAN_HELP = (
    "reference | small | large | handoff=AT[,bridge=K] | auto[=TOLERANCE] | segments such as"
    " 'small:10 bridge:5 large:15@1'. AT is a fraction of the steps below 1, a timestep from 1 up,"
    " or sigma:0.9; segments take steps, percentages (30%%) or * for the rest, and a guidance scale"
    " of their own after @, guided steps after it (@3[0:40%%]), /every=K, /guidance-every=K or"
    " /adaptive=X for reuse; small:4/10 large:4 gives each a clock of its own, small:10"
    " renoise=0.75 large:4 re-noises between; @FILE:MS takes the best plan of a front"
    " (`nexus-rt tune`) within MS"
)
DTYPES = ("float32", "bfloat16", "float16")
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
    group.add_argument(
        "--pair",
        metavar="DIR",
        help="a folder that holds small/, large/, vae/, text_encoder/, tokenizer/",
    )
    group.add_argument(
        "--small",
        metavar="DIR",
        help=(
            "the small generator: a folder, a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, a"
            " file (safetensors, GGUF), or two of these, HIGH,LOW, the experts of Wan 2.2"
        ),
    )
    group.add_argument(
        "--large",
        metavar="DIR",
        help="the large generator, such as Wan-AI/Wan2.1-T2V-14B-Diffusers",
    )
    group.add_argument(
        "--vae", metavar="DIR", help="the VAE (default: that of --large, else of --small)"
    )
    group.add_argument(
        "--text-encoder",
        metavar="DIR",
        help="holds text_encoder/ and tokenizer/ (default: as --vae)",
    )
    group.add_argument(
        "--boundary",
        type=float,
        metavar="SHARE",
        help=(
            "of a generator of two experts: the share of the timesteps from which up the first runs"
            " (default: its folder's, else 0.875)"
        ),
    )
    group.add_argument(
        "--tokenizer", metavar="DIR", help="the text encoder's, where it is not beside it"
    )
    group.add_argument(
        "--understanding", metavar="DIR", help="the language model that steers the small generator"
    )
    group.add_argument(
        "--connector",
        metavar="DIR",
        help="between the two (both: `nexus-rt convert omnivideo` makes them)",
    )
    for name in ("small", "large"):
        group.add_argument(
            f"--{name}-lora",
            metavar="FILE[@SCALE]",
            action="append",
            default=[],
            help=f"a LoRA to merge into the {name} generator; may be given again",
        )
    group.add_argument(
        "--weights",
        choices=("dense", "small"),
        help=(
            "small: keep what a checkpoint stores in 8 bits or fewer as it is stored, and widen it"
            " layer by layer (default: dense)"
        ),
    )
    group.add_argument(
        "--quantize",
        choices=("int8", "int8-dynamic", "fp8", "fp8-dynamic", "fp8-dynamic-all"),
        help=(
            "quantise the generators' matrices as they are read, a scale a row; -dynamic: the"
            " activations too; fp8-dynamic leaves the first and the last block as they are,"
            " fp8-dynamic-all does not"
        ),
    )
    for name in ("small", "large"):
        group.add_argument(
            f"--{name}-recipe",
            metavar="NAME",
            help=f"how a few-step {name} generator is run: lightx2v-4step | fastwan-3step",
        )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--local-files-only", action="store_true", help="never ask the hub")
    return parent


def running() -> argparse.ArgumentParser:
    """What runs the models."""
    parent = argparse.ArgumentParser(add_help=False)
    group = parent.add_argument_group("what runs them")
    group.add_argument(
        "--engines", metavar="DIR", help="exported engines (`nexus-rt export`) instead of models"
    )
    group.add_argument(
        "--force", action="store_true", help="with --engines: load one that failed its parity gate"
    )
    group.add_argument(
        "--vram",
        metavar="SIZE",
        help="a memory budget such as 24GB: weights come and go to keep within it",
    )
    group.add_argument(
        "--cuda-graphs", action="store_true", help="record each generator's step once and replay it"
    )
    group.add_argument("--backend", default="torch", help="what runs the models: torch (default)")
    group.add_argument(
        "--kernels",
        default="auto",
        help="blend, solver, norms and RoPE by torch | triton | auto (default)",
    )
    group.add_argument(
        "--attention",
        default="auto",
        help=(
            "auto (default) | auto-fp8 | sdpa | flash | cudnn | math | triton | triton-fp8 | fa3 |"
            " sage"
        ),
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="data type of generators and encoders (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    return parent


def add_settings(group: argparse._ArgumentGroup, fields: Iterable[Field]) -> None:
    """An option a setting; of a struct of settings, an option for each of its fields. Ranges and
    names are left to the settings' own check, whose error suggests the nearest name."""
    for field in fields:
        if field.nested:
            add_settings(group, fields_of(field.kind).values())
            continue
        option = "--" + field.flag.replace("_", "-")
        words = field.help.replace("%", "%%") + (f": {PLAN_HELP}" if field.name == "plan" else "")
        if field.kind is bool:
            group.add_argument(option, action="store_true", help=words)
        else:
            kind = TYPES.get(field.kind, str)
            group.add_argument(option, type=kind, metavar=field.metavar, help=words)


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
