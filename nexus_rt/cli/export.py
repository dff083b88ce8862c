"""`nexus-rt export`: engines of a pair's parts."""

from __future__ import annotations

import argparse

from nexus_rt.cli.arguments import models
from nexus_rt.cli.pipeline import check_device
from nexus_rt.engines.backends import ENGINE_BACKENDS


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    export = commands.add_parser(
        "export",
        parents=[models()],
        help="make engines of a pair's parts, compared before they count",
    )
    export.add_argument(
        "--backend", default="onnx", help=f"{' | '.join(ENGINE_BACKENDS)} (default onnx)"
    )
    export.add_argument(
        "--precision",
        default=None,
        help="fp32 | fp16 | bf16 | int8 (onnx on a CPU; default: bf16 on a GPU, fp32 on a CPU)",
    )
    export.add_argument(
        "--parts",
        metavar="A,B,...",
        help="parts to export: small, large, vae, text_encoder (default: small,large)",
    )
    export.add_argument(
        "--sizes",
        metavar="WxHxF,...",
        help=(
            "such as 832x480x81,1280x720x81, or a range 256x256x17..832x480x81 (default: the"
            " pair's)"
        ),
    )
    export.add_argument(
        "--opset",
        type=int,
        default=23,
        help="ONNX operator set: 23 (default), or 20 for consumers that lack it",
    )
    export.add_argument(
        "--sm",
        metavar="X.Y",
        help="compute capability that tensorrt-rtx builds for (default: all it knows)",
    )
    export.add_argument(
        "--weight-streaming",
        action="store_true",
        help="TensorRT: allow weights to stay in host memory",
    )
    export.add_argument(
        "--refit", action="store_true", help="TensorRT: allow weights to be replaced in the engine"
    )
    export.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="the folder for `generate --engines DIR`",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from nexus_rt.export.command import run

    check_device(args.device)
    return run(args)
