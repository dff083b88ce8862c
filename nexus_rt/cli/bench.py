"""`nexus-rt bench`: latency, memory and quality; comparison of runs."""

from __future__ import annotations

import argparse

from nexus_rt.cli.arguments import DTYPES, frame_size, models
from nexus_rt.cli.pipeline import check_device


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    bench = commands.add_parser(
        "bench",
        parents=[models()],
        help="latency, memory and quality of plans and engines; compare runs",
    )
    bench.add_argument(
        "action",
        nargs="*",
        metavar="compare A.json B.json",
        help="print what changed; 1 where it is worse",
    )
    group = bench.add_argument_group("what is measured")
    group.add_argument(
        "--preset",
        default="mini",
        help="mini (default) | wan-480p | wan-720p; random weights where none are given",
    )
    group.add_argument(
        "--plans", metavar="A,B,...", help="plans (default: reference, the pair's own, auto=0.02)"
    )
    group.add_argument(
        "--engines",
        default="torch",
        metavar="A,B,...",
        help="torch | compiled | onnx | aoti | tensorrt | tensorrt-rtx",
    )
    group.add_argument(
        "--parts",
        metavar="A,B,...",
        help=(
            "parts that are exported for --engines: small, large, vae, text_encoder (default: all)"
        ),
    )
    group.add_argument(
        "--vs",
        metavar="A,B,...",
        help=(
            "peers in the same run: diffusers | switch (each with +compile) | naive | naive-ours"
            " | all"
        ),
    )
    group.add_argument(
        "--scaling", action="store_true", help="also latency against frames, size, batch and steps"
    )
    group.add_argument("--prompt", help="what the clip shows (default: a riddle of the mini pair)")
    group.add_argument(
        "--size", type=frame_size, metavar="WxH", help="frame size (default: the preset's)"
    )
    group.add_argument(
        "--frames", type=int, metavar="N", help="4k+1 frames (default: the preset's)"
    )
    group.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps (default: the pair's)"
    )
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--runs", type=int, default=5, help="counted runs of each row (default: 5)")
    group.add_argument("--warmup", type=int, default=2, help="runs before those (default: 2)")
    group.add_argument(
        "--accuracy",
        type=int,
        default=12,
        metavar="N",
        help="riddles a row of the mini pair is scored with (12)",
    )
    group.add_argument("--kernels", default="auto", help="torch | triton | auto (default)")
    group.add_argument("--attention", default="auto", help="as in generate")
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="data type of the generators (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    group.add_argument(
        "--estimate",
        default="auto",
        help="count on the meta device: auto (what does not fit) | never | always",
    )
    group.add_argument(
        "--tflops",
        type=float,
        help="compute rate an estimate divides by (default: measured on this machine)",
    )
    group = bench.add_argument_group("where it goes")
    group.add_argument("--json", metavar="FILE", help="everything, for `bench compare`")
    group.add_argument("--html", metavar="FILE", help="one self-contained page")
    group.add_argument("--plot", metavar="FILE.svg", help="timeline and speed against quality")
    group.add_argument(
        "--trace",
        metavar="DIR",
        help="a trace of each row's last run, for Perfetto or chrome://tracing",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 where a comparison found something worse."""
    from nexus_rt.bench.command import run

    check_device(args.device)
    return run(args)
