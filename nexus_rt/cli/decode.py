"""`nexus-rt decode`: latents of a failed decoding to a video file."""

from __future__ import annotations

import argparse

from nexus_rt.cli.arguments import FPS_HELP, models, running
from nexus_rt.cli.pipeline import make_pipeline
from nexus_rt.core.amounts import frame_rate


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    decode = commands.add_parser(
        "decode",
        parents=[models(), running()],
        help="decode latents that a failed decoding left behind",
    )
    decode.add_argument(
        "latents", metavar="LATENTS", help="the safetensors file that the error named"
    )
    decode.add_argument(
        "-o",
        "--output",
        default="out.mp4",
        metavar="FILE",
        help=".mp4, .gif or .png (a contact sheet)",
    )
    decode.add_argument("--fps", default="16", help=FPS_HELP)


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from nexus_rt.media.latents import read_latents
    from nexus_rt.media.video import check_output, save_video

    frame_rate(args.fps, "--fps")
    output = check_output(args.output)
    latents = read_latents(args.latents)
    frames = make_pipeline(args).decode(latents, "np", rescue=output.parent)
    for i, clip in enumerate(frames):
        save_video(
            clip, output if len(frames) == 1 else output.with_stem(f"{output.stem}-{i}"), args.fps
        )
    return 0
