"""`nexus-rt engines list | verify | prune`."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    engines = commands.add_parser("engines", help="the engines in the cache: list, verify, prune")
    engines.add_argument("action", help="list | verify | prune")
    engines.add_argument(
        "folders",
        nargs="*",
        metavar="DIR",
        help="engine folders to list or verify, not the cache's",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 where verify finds damage."""
    from nexus_rt.engines.command import run as maintain

    return maintain(args.action, args.folders)
