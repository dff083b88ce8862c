"""`nexus-rt convert`: a published checkpoint to a pair's folder."""

from __future__ import annotations

import argparse
import sys

from nexus_rt.core.errors import choose


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    convert = commands.add_parser(
        "convert", help="make a pair's folder of a published checkpoint; reads pickles safely"
    )
    convert.add_argument("kind", help="what SRC is: omnivideo, or wan")
    convert.add_argument(
        "source", metavar="SRC", help="the published folder; of wan also a single file"
    )
    convert.add_argument(
        "target", metavar="DST", help="the folder to make; it appears only when complete"
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    choose("checkpoint", args.kind, ("omnivideo", "wan"))
    if args.kind == "omnivideo":
        from nexus_rt.loading.convert import convert_omnivideo as convert
    else:
        from nexus_rt.loading.convert_wan import convert_wan as convert

    report = convert(args.source, args.target, lambda line: print(line, file=sys.stderr))
    print(report)
    print(f"{args.target}: complete; every key is in conversion.json")
    return 0
