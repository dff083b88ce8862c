"""`nexus-rt vrbench generate | judge | report`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from nexus_rt.bench.results import write_text
from nexus_rt.bench.vrbench.judges import find_judge
from nexus_rt.bench.vrbench.judging import FILES, judge_clips
from nexus_rt.bench.vrbench.page import page
from nexus_rt.bench.vrbench.protocol import Protocol
from nexus_rt.bench.vrbench.report import make_report, markdown, shown
from nexus_rt.bench.vrbench.schema import read_bench, read_taxonomy
from nexus_rt.bench.vrbench.scoring import summary
from nexus_rt.core.checks import whole
from nexus_rt.core.paths import as_path, check_outputs
from nexus_rt.pipeline.prompts import Item

EXAMPLE = Path(__file__).with_name("example.json")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def prompts_path(given: str) -> Path:
    """The prompts' file or folder; "example" is the small file that comes with the package."""
    path = as_path("path", given)
    return EXAMPLE if given == "example" and not path.exists() else path


def items(given: str) -> list[Item]:
    """The clips to make of a prompts' file or folder, checked against the whole schema."""
    return [Item(p.id, p.text) for p in read_bench(prompts_path(given), read_taxonomy())]


def judge(args: argparse.Namespace) -> int:
    """Judge a folder of clips; 0 where every prompt has answers, else 1."""
    taxonomy = read_taxonomy(args.taxonomy)
    prompts = read_bench(prompts_path(args.prompts), taxonomy)
    whole("--requests", args.requests, 1, 1024)
    protocol = Protocol(
        args.protocol, args.frames, args.picture_size, args.max_tokens, args.temperature
    )
    dtype = getattr(torch, args.dtype) if args.dtype else None
    asked = find_judge(args.judge_url, args.judge_model, args.device, dtype, protocol)
    folder = as_path("clips", args.clips)
    outcome = judge_clips(
        prompts, folder, asked, taxonomy, args.requests, say, protocol, args.retry_unknown
    )
    scores = summary(outcome["clips"], taxonomy)
    for kind in ("missing", "failed"):
        for name, why in outcome[kind].items():
            say(f"{kind}: {name}: {why}")
    overall = scores["overall"]
    where = folder / FILES[protocol.name]
    print(
        f"{where}: {shown(overall)} over {overall['count']} clips, {overall['unknown']} of"
        f" {overall['questions']} answers Unknown, {len(outcome['missing'])} clips missing,"
        f" {len(outcome['failed'])} not judged"
    )
    return 1 if outcome["missing"] or outcome["failed"] else 0


def report(args: argparse.Namespace) -> int:
    """Print the tables of judged folders, and write them as asked."""
    check_outputs(args.markdown, args.json, args.html)
    taxonomy = read_taxonomy(args.taxonomy)
    report = make_report([as_path("run", p) for p in args.runs], taxonomy)
    text = markdown(report, taxonomy)
    made: list[tuple[str | None, Callable[[], str]]] = [
        (args.markdown, lambda: text),
        (args.html, lambda: page(report, taxonomy)),
        (args.json, lambda: json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
    ]
    for name, content in made:
        if name:
            write_text(as_path("output", name), content())
    print(text, end="")
    return 0
