"""The front that `nexus-rt tune` finds: plans, each the best of those that take no longer."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, shorten
from nexus_rt.core.part_files import part_file
from nexus_rt.core.paths import as_path
from nexus_rt.method.plan_text import check_plan

MAX_MS = 1e12  # 31 years
MAX_SCORE = 1e12
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_MS)]
Score = Annotated[float, msgspec.Meta(ge=-MAX_SCORE, le=MAX_SCORE)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class FrontPlan(msgspec.Struct, frozen=True):
    """One plan of a front.

    plan: its words. ms: its price, by the costs that the front was made with. score, low, high: the
    mean on the report prompts and its 95% interval. rewrite: "auto" or "off". count: report
    prompts. search_score: the mean on the prompts of the search, which chose it. wall_ms: measured
    milliseconds a clip.
    """

    plan: str
    ms: Milliseconds
    score: Score
    low: Score
    high: Score
    rewrite: Literal["auto", "off"] = "off"
    count: Count = 0
    search_score: Score | None = None
    wall_ms: Milliseconds | None = None

    def __post_init__(self) -> None:
        check_plan(self.plan)


class Front(msgspec.Struct, frozen=True):
    """What a search found, cheapest first; `tried`: how many plans it took to find it."""

    front: list[FrontPlan]
    tried: Count
    judge: str
    budget_ms: Milliseconds | None = None
    default: FrontPlan | None = None
    costs: dict[str, Milliseconds] = {}
    settings: dict[str, object] = {}

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with part_file(path) as part:
            part.write_text(json.dumps(msgspec.to_builtins(self), indent=1) + "\n")
            os.replace(part, path)


def read_front(path: str | Path) -> Front:
    """A front's file.

    Raises:
        InputError: no such file, one without an end, or none of `nexus-rt tune`.
    """
    file = as_path("a front's file", path)
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise InputError(
            f"{shorten(file)} is no file; expected the front.json of nexus-rt tune, as in"
            " @front.json:900.",
            code="unreadable",
            param="plan",
        )
    return documents.read(file, Front, InputError, "make it with nexus-rt tune")


def from_front(text: str) -> FrontPlan:
    """`@FILE:BUDGET`, BUDGET in milliseconds, such as @front.json:900: the best plan within it.

    Raises:
        InputError: not of this form, no front, or nothing that takes so little.
    """
    match = re.fullmatch(r"@(.+):([0-9]{1,15}(?:\.[0-9]{1,15})?)(?:ms)?", text.strip())
    if not match:
        raise InputError(
            f"plan {shorten(text, 80)!r} is not @FILE:MILLISECONDS, such as @front.json:900.",
            param="plan",
        )
    front, budget = read_front(match[1]), float(match[2])
    within = [p for p in front.front if p.ms <= budget]
    if not within:
        least = min((p.ms for p in front.front), default=None)
        raise InputError(
            f"{shorten(match[1])} holds no plan within {budget:g} ms; its cheapest takes"
            f" {'nothing' if least is None else f'{least:.0f} ms'}.",
            code="out_of_range",
            param="plan",
        )
    return max(within, key=lambda p: (p.score, -p.ms))
