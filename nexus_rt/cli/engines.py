"""`nexus-rt engines list | verify | prune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_rt.core.errors import InputError, ModelError, choose
from nexus_rt.core.size import ClipSize

if TYPE_CHECKING:
    from nexus_rt.engines.folder import EngineFolder

ACTIONS = ("list", "verify", "prune")


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    engines = commands.add_parser("engines", help="the engines in the cache: list, verify, prune")
    engines.add_argument("action", help=" | ".join(ACTIONS))
    engines.add_argument(
        "folders",
        nargs="*",
        metavar="DIR",
        help="engine folders to list or verify, not the cache's",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code: 1 where verify finds damage."""
    return maintain(args.action, args.folders)


def maintain(action: str, folders: list[str]) -> int:
    """Do one; returns the exit code: 1 where verify finds damage."""
    choose("action", action, ACTIONS)
    if folders and action == "prune":
        raise InputError(
            "engines prune takes no folders: it removes from the cache what is unfinished, failed"
            " or damaged.",
            code="conflict",
            param="folders",
        )
    return {"list": _list, "verify": _verify, "prune": _prune}[action](folders)


def _line(engine: EngineFolder) -> str:
    m = engine.manifest
    where = m.device["name"] or m.device["type"]
    worst = max(
        (r.get("relative_error") or 0.0 for r in m.parity.get("rows", {}).values()), default=0.0
    )
    never = m.parity.get("compared") is False or not m.parity
    parity = (
        "never compared"
        if never
        else f"parity {'passed' if m.parity.get('passed') else 'FAILED'} ({worst:.1e})"
    )
    sizes = ",".join(str(ClipSize(*b)) for b in m.buckets)
    return (
        f"{engine.path.name}  {m.part:5} {m.backend} {m.backend_version} {m.precision} on {where} "
        f" {sizes}  {engine.nbytes / 1e6:.1f} MB  {parity}"
    )


def _list(folders: list[str]) -> int:
    from nexus_rt.engines.folder import EngineFolder, cached, engines_root

    engines = [EngineFolder.read(f) for f in folders] or list(cached())
    for engine in engines:
        print(_line(engine))
    if not engines:
        print(f"no engines in {engines_root()}; `nexus-rt export` makes them.")
    return 0


def _verify(folders: list[str]) -> int:
    from nexus_rt.engines.folder import EngineFolder, cached

    paths = [Path(f) for f in folders] or [e.path for e in cached()]
    bad = 0
    for path in paths:
        try:
            EngineFolder.read(path).verify(again=True)
            print(f"{path}: whole")
        except ModelError as error:
            bad += 1
            print(f"{path}: {error}")
    return 1 if bad else 0


def _prune(folders: list[str]) -> int:
    from nexus_rt.engines.folder import engines_root, unusable
    from nexus_rt.engines.publish import remove

    count = 0
    for path, why in unusable():
        remove(path)
        count += 1
        print(f"removed {path.name}: {why}")
    print(f"{count} removed from {engines_root()}")
    return 0
