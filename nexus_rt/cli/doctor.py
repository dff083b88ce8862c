"""`nexus-rt doctor`: what this machine has."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    commands.add_parser(
        "doctor", help="versions, devices, which backends work here and why others do not"
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from nexus_rt.cli.report import report

    print(report())
    return 0
