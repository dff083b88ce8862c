"""`nexus-rt vrbench generate | judge | report`."""

from __future__ import annotations

import argparse

from nexus_rt.cli.arguments import DTYPES, clips, models, rewriting, running, walk
from nexus_rt.cli.batch import run_batch


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    vrbench = commands.add_parser(
        "vrbench", help="VR-Bench: make the clips of its prompts, judge them, report the scores"
    )
    actions = vrbench.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser(
        "generate",
        parents=[models(), running(), walk(), rewriting(), clips()],
        help="make the clips: as batch, of VR-Bench's prompt files",
    )
    judge = actions.add_parser(
        "judge", help="ask a vision-language model every clip's questions; goes on where it was"
    )
    judge.add_argument(
        "prompts", metavar="PROMPTS", help='VR-Bench\'s file or folder of files, or "example"'
    )
    judge.add_argument(
        "clips", metavar="DIR", help="holds a clip for every prompt's id, as generate makes them"
    )
    judge.add_argument(
        "--judge-url",
        metavar="URL",
        help="an OpenAI-compatible server, such as http://localhost:8000/v1",
    )
    judge.add_argument(
        "--judge-model",
        metavar="MODEL",
        help="what the server calls it; without a URL, a folder such as Qwen3-VL's",
    )
    judge.add_argument(
        "--requests",
        type=int,
        default=4,
        metavar="N",
        help="clips asked about at a time (default: 4)",
    )
    judge.add_argument(
        "--protocol",
        default="strict",
        help=(
            "strict (default): unread answers are in no mean | published: lenient as the paper,"
            " unread ones count as not Yes"
        ),
    )
    judge.add_argument(
        "--frames",
        type=int,
        default=16,
        metavar="N",
        help="frames of a clip that the judge sees (default: 16)",
    )
    judge.add_argument(
        "--picture-size",
        type=int,
        metavar="N",
        help="longest side of a frame in pixels (default: what keeps a request below 4 MB)",
    )
    judge.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest reply in tokens (default: 1024)"
    )
    judge.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="sampling temperature of replies (default: 0)",
    )
    judge.add_argument(
        "--retry-unknown",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=(
            "ask again about clips with answers that could not be read in the run before (default:"
            " yes)"
        ),
    )
    judge.add_argument(
        "--device", help="device of a local judge (default: cuda where there is one)"
    )
    judge.add_argument("--dtype", choices=DTYPES, help="data type of a local judge")
    report = actions.add_parser(
        "report", help="tables of judged folders, the first of them compared with the others"
    )
    report.add_argument(
        "runs", nargs="+", metavar="DIR", help="folders that were judged, or their judgment.json"
    )
    report.add_argument("--markdown", metavar="FILE", help="the tables that are printed")
    report.add_argument("--json", metavar="FILE", help="everything")
    report.add_argument(
        "--html", metavar="FILE", help="one self-contained page with frames, answers and reasons"
    )
    for command in (judge, report):
        command.add_argument(
            "--taxonomy", metavar="FILE", help="categories, layers and groups of your own (JSON)"
        )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    import nexus_rt.bench.vrbench.command as command

    if args.action == "generate":
        return run_batch(args, command.items(args.prompts))
    return {"judge": command.judge, "report": command.report}[args.action](args)
