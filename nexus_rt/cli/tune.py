"""`nexus-rt tune`: search the plans of a pair for the front of time and quality."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from nexus_rt.cli.arguments import add_settings, add_size, models, running
from nexus_rt.cli.pipeline import call_settings, check_device, quiet_pipeline
from nexus_rt.core.errors import InputError, choose, shown
from nexus_rt.core.paths import as_path
from nexus_rt.pipeline import settings

if TYPE_CHECKING:
    from nexus_rt.core.size import ClipSize
    from nexus_rt.method.plan import StepCosts
    from nexus_rt.pipeline.pipeline import NexusPipeline

JUDGES = ("pixels", "latents", "statistics", "vlm")


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    tune = commands.add_parser(
        "tune",
        parents=[models(), running()],
        help="search the plans of a pair for the best quality within each time",
    )
    tune.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="for the search's state, front.json, front.md and front.html; goes on where it was",
    )
    group = tune.add_argument_group("what is searched")
    group.add_argument("--trials", type=int, default=40, metavar="N", help="plans to judge (40)")
    group.add_argument(
        "--budget", type=float, metavar="MS", help="most milliseconds of denoising a clip"
    )
    group.add_argument(
        "--costs",
        metavar="SMALL,LARGE",
        help="milliseconds of one guided step of each, instead of measuring this machine",
    )
    group.add_argument(
        "--rungs",
        default="6,18,54",
        metavar="N,N,...",
        help="prompts judged before each decision to go on (default: 6,18,54)",
    )
    group.add_argument("--no-rewrite", action="store_true", help="leave rewriting out")
    group.add_argument("--seed", type=int, default=0, help="seed of the search and of the noise")
    group.add_argument("--batch", type=int, default=6, metavar="N", help="prompts of one call (6)")
    add_size(group)
    add_settings(group, [settings.fields()["num_frames"]])
    group = tune.add_argument_group("what judges")
    group.add_argument(
        "--judge",
        default=None,
        help=(
            "pixels (the mini pair's riddles, its default) | latents (of --best, the default) |"
            " statistics (of --best) | vlm"
        ),
    )
    group.add_argument(
        "--best",
        default="reference",
        metavar="PLAN",
        help="plan that latents and statistics are compared with",
    )
    group.add_argument("--prompts", metavar="LIST", help="prompts of the search")
    group.add_argument("--report-prompts", metavar="LIST", help="other prompts, for the report")
    group.add_argument("--count", type=int, metavar="N", help="riddles of the report (102)")
    group.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible endpoint of the VLM")
    group.add_argument("--judge-model", metavar="NAME", help="model at --judge-url, or a folder")


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""

    from nexus_rt.cli.plan import parse_costs
    from nexus_rt.core.checks import number, whole

    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"tune needs Optuna ({error}); pip install 'nexus-rt[tune]'.",
            code="missing_package",
            param="optuna",
        ) from error
    from nexus_rt.bench.results import write_text
    from nexus_rt.bench.tune import report
    from nexus_rt.bench.tune.search import Search
    from nexus_rt.bench.tune.space import Space
    from nexus_rt.pipeline.request import make_request

    for name, value, least, most in (
        ("--trials", args.trials, 1, 100_000),
        ("--batch", args.batch, 1, 256),
        ("--count", args.count, 1, 100_000),
        ("--seed", args.seed, 0, 2**32 - 1),  # NumPy's generators take no larger one
    ):
        if value is not None:
            whole(name, value, least, most)
    call = call_settings(args)
    rungs = parse_rungs(args.rungs)
    if args.budget is not None:
        number("--budget", args.budget, 1e-3, 1e12)
    if args.costs:
        parse_costs(args.costs)  # before any model is read
    check_device(args.device)
    mini = not (args.pair or args.small or args.large or args.engines)
    name = choose("judge", args.judge or ("pixels" if mini else "latents"), JUDGES)
    if name == "pixels" and not mini:
        raise InputError(
            "--judge pixels knows the mini pair's riddles alone; name another.",
            code="conflict",
            param="--judge",
        )
    pipe = quiet_pipeline(args)
    if len(pipe.engines) < 2:
        raise InputError(
            "tune searches plans of two generators; pass --small and --large.", code="missing"
        )
    size = make_request(call, pipe.defaults).size
    pipe.grid.check(size)
    search, told = judges(name, pipe, args, size, rungs[-1])
    folder = as_path("--output", args.output)
    rewrite = not args.no_rewrite and pipe.context is not None
    work = Search(
        pipe,
        search,
        told,
        step_costs(pipe, size, args.costs),
        folder,
        args.budget,
        Space(rewrite=rewrite),
        rungs,
        args.seed,
        args.batch,
        size.options,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    front = work.run(args.trials)
    front.save(folder / "front.json")
    text = report.markdown(front)
    write_text(folder / "front.md", text + "\n")
    page = report.page(front, work, folder)
    print(text)
    print(f"{folder / 'front.json'}, {page}")
    return 0


def parse_rungs(text: str) -> tuple[int, ...]:
    """Ascending numbers of prompts."""
    words = text.split(",")
    if not all(re.fullmatch(r" *[0-9]{1,6} *", w) for w in words):
        raise InputError(
            f"--rungs is {shown(text)}; expected numbers of prompts, such as 6,18,54.",
            code="invalid_type",
            param="--rungs",
        )
    rungs = tuple(int(w) for w in words)
    if rungs[0] < 2 or list(rungs) != sorted(set(rungs)):
        raise InputError(
            f"--rungs is {shown(text)}; expected rising numbers of at least 2.", param="--rungs"
        )
    return rungs


def judges(
    name: str, pipe: NexusPipeline, args: argparse.Namespace, size: ClipSize, count: int
) -> tuple[Any, Any]:
    """The judges of the search's and of the report's prompts."""
    from nexus_rt.bench.tune.judging import LatentJudge, PixelJudge, StatisticsJudge, VlmJudge

    if name == "pixels":
        if args.prompts or args.report_prompts:
            raise InputError(
                "--judge pixels makes its own riddles; leave the lists out.",
                code="conflict",
                param="--prompts" if args.prompts else "--report-prompts",
            )
        report = 102 if args.count is None else args.count
        return PixelJudge(pipe, count, 1000), PixelJudge(pipe, report, 2000)
    if not args.prompts or not args.report_prompts:
        raise InputError(
            f"--judge {name} needs two disjoint lists: --prompts for the search, --report-prompts"
            " for the report.",
            code="missing",
            param="--report-prompts" if args.prompts else "--prompts",
        )
    if name in ("latents", "statistics"):
        from nexus_rt.pipeline.prompts import read_prompts

        kind = LatentJudge if name == "latents" else StatisticsJudge

        texts = [[i.prompt for i in read_prompts(p)] for p in (args.prompts, args.report_prompts)]
        first, second = (kind(pipe, own, args.best, args.seed, **size.options) for own in texts)
        return first, second
    from nexus_rt.bench.vrbench.judges import find_judge
    from nexus_rt.bench.vrbench.schema import read_bench, read_taxonomy

    if not args.judge_model:
        raise InputError(
            "--judge vlm needs --judge-model: a name at --judge-url, or a folder.",
            code="missing",
            param="--judge-model",
        )
    judge, taxonomy = find_judge(args.judge_url, args.judge_model), read_taxonomy()
    lists = [read_bench(p, taxonomy) for p in (args.prompts, args.report_prompts)]
    return VlmJudge(judge, lists[0]), VlmJudge(judge, lists[1])


def step_costs(pipe: NexusPipeline, size: ClipSize, given: str | None) -> StepCosts:
    """Prices of a step's parts, given or measured here."""
    from nexus_rt.cli.plan import measured_costs, parse_costs
    from nexus_rt.method.blend_config import BlendConfig

    return parse_costs(given) if given else measured_costs(pipe, size, BlendConfig(), "unipc")
