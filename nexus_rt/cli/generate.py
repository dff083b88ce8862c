"""`nexus-rt generate`: a prompt to a video file."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from nexus_rt.cli.arguments import (
    FPS_HELP,
    SEED_HELP,
    add_settings,
    models,
    rewriting,
    running,
    walk,
)
from nexus_rt.cli.pipeline import check_device, clip_settings, make_pipeline, model_words
from nexus_rt.core.errors import InputError, NexusError
from nexus_rt.core.fields import GENERATE
from nexus_rt.pipeline import settings

if TYPE_CHECKING:
    from pathlib import Path

    from nexus_rt.method.reuse import ReuseDeviation
    from nexus_rt.pipeline.pipeline import NexusPipeline
    from nexus_rt.pipeline.rewriting import Rewriting
    from nexus_rt.pipeline.settings import CallSettings


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    generate = commands.add_parser(
        "generate",
        parents=[models(), running(), walk(), rewriting()],
        help="turn a prompt into a video",
    )
    generate.add_argument(
        "prompt",
        help="what to show, such as 'a striped red circle moves left on a black background'",
    )
    generate.add_argument(
        "-o",
        "--output",
        default="out.mp4",
        metavar="FILE",
        help=".mp4, .gif or .png (a contact sheet)",
    )
    generate.add_argument("--negative", default="", metavar="PROMPT", help="what not to show")
    generate.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    generate.add_argument("--fps", default="16", help=FPS_HELP)
    add_settings(generate, settings.fields(GENERATE).values())
    generate.add_argument(
        "--parallel",
        metavar="HOW",
        help=(
            "share the clip between the processes that torchrun started, such as cfg=2,ulysses=2:"
            " cfg=2 the halves of a guided step, pair=2 the generators, ulysses=N the tokens; all"
            " decode"
        ),
    )
    generate.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from nexus_rt.core.checks import check_seed
    from nexus_rt.media.video import check_output

    output = check_output(args.output)  # before any model is read
    call = clip_settings(args)
    if not args.prompt.strip():
        raise InputError(
            "the prompt is empty; say what the video should show.", code="missing", param="prompt"
        )
    check_device(args.device)
    seed = check_seed("--seed", args.seed)
    if args.seed == -1:
        print(f"seed {seed}", file=sys.stderr)
    pipe = make_pipeline(args)
    if pipe.parallel is None:
        return _generate(args, pipe, seed, output, call)
    from nexus_rt.parallel.layout import broadcast_failure

    with broadcast_failure(pipe.parallel.mesh):
        code = _generate(args, pipe, pipe.parallel.mesh.same(seed), output, call)
    pipe.parallel.close()
    return code


def _generate(
    args: argparse.Namespace, pipe: NexusPipeline, seed: int, output: Path, call: CallSettings
) -> int:
    """The clip of a pipeline, which the first of several processes writes."""
    import torch

    from nexus_rt.media.latents import rescue_latents
    from nexus_rt.media.video import made_with, save_video

    first = pipe.parallel is None or pipe.parallel.first
    pipe.set_progress_bar_config(disable=args.quiet or not first or None)
    noise = torch.Generator("cpu").manual_seed(seed)
    latents = pipe(
        args.prompt,
        args.negative,
        generator=noise,
        output_type="latent",
        **call.given,
    )
    if first:
        _say_rewriting(latents.rewriting)
    frames = pipe.decode(latents.frames, "np", rescue=output.parent)
    if not first:
        return 0
    metadata = made_with(
        args.prompt, args.negative, seed, latents.plan.text, call.given, model_words(args)
    )
    if latents.rewriting is not None:
        metadata["rewritten"] = latents.rewriting.texts[0]
    try:
        save_video(frames[0], output, args.fps, metadata, truncate=call.as_published)
    except InputError as error:
        if (kept := rescue_latents(latents.frames, output.parent)) is None:
            raise
        raise NexusError(
            f"{error} The latents are saved in {kept}; decode them again with `nexus-rt decode`.",
            code=error.code,
            param=error.param,
        ) from error
    if latents.reuse_deviations is not None:
        _print_deviations(latents.reuse_deviations)
    if not args.quiet:
        print(
            f"{output}: {frames.shape[1]} frames of {frames.shape[3]}x{frames.shape[2]}, plan"
            f" {latents.plan.name}"
        )
    return 0


def _say_rewriting(rewriting: Rewriting | None) -> None:
    """What the large generator reads, or why it reads the prompt."""
    if rewriting is None:
        return
    if reason := rewriting.failures.get(0):
        print(
            f"nexus-rt: rewriting failed ({reason}); the large generator reads the prompt itself.",
            file=sys.stderr,
        )
    else:
        text = rewriting.texts[0]
        print(f"rewritten for the large generator ({rewriting.ms:.0f} ms): {text}", file=sys.stderr)


def _print_deviations(deviations: list[ReuseDeviation]) -> None:
    """A row for every reused step."""
    print(f"{'step':>4} {'generator':9} {'reused':10} {'error':>8}")
    for d in deviations:
        print(f"{d.step:4d} {d.generator:9} {d.reused:10} {100 * d.deviation:7.2f}%")
