"""`nexus-rt batch`: a list of prompts to a folder of videos."""

from __future__ import annotations

import argparse
import sys

from nexus_rt.cli.arguments import clips, models, rewriting, running, walk
from nexus_rt.cli.pipeline import check_device, clip_settings, model_words, quiet_pipeline
from nexus_rt.core.paths import as_path


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    commands.add_parser(
        "batch",
        parents=[models(), running(), walk(), rewriting(), clips()],
        help="turn a list of prompts into a folder of videos",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 where a clip failed."""
    from nexus_rt.pipeline.prompts import read_prompts

    return run_batch(args, read_prompts(args.prompts))


def run_batch(args: argparse.Namespace, items: list) -> int:
    """Make the clips of a list of `Item`, here or by Ray's workers."""
    from nexus_rt.core.checks import whole
    from nexus_rt.pipeline.batch import run
    from nexus_rt.pipeline.batch_job import Job, parse_shard

    call = clip_settings(args)
    whole("--seed", args.seed, -1, 2**64 - 1)
    models = model_words(args)
    folder = as_path("--output", args.output)
    job = Job(
        folder,
        args.seed,
        args.fps,
        f".{args.format.lstrip('.')}",
        parse_shard(args.shard),
        call,
        models,
    )
    say = lambda line: print(line, file=sys.stderr, flush=True)
    if args.ray:
        from nexus_rt.pipeline.batch_ray import run_on_ray

        counts = run_on_ray(quiet_pipeline, args, items, job, args.workers, say)
    else:
        check_device(args.device)
        counts = run(quiet_pipeline(args), items, job, say)
    print(f"{folder}: {counts['made']} made, {counts['kept']} kept, {counts['failed']} failed")
    return 1 if counts["failed"] else 0
