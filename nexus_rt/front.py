"""The front that `nexus-rt tune` finds: plans, each the best of those that take no longer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec

from nexus_rt import documents
from nexus_rt.errors import InputError, cut


class FrontPlan(msgspec.Struct, frozen=True):
    """One plan of a front.

    plan: its words. ms: its price, by the costs that the front was made with. score, low, high: the
    mean on the report prompts and its 95% interval. rewrite: "auto" or "off". count: report
    prompts. search_score: the mean on the prompts of the search, which chose it. wall_ms: measured
    milliseconds a clip.
    """

    plan: str
    ms: float
    score: float
    low: float
    high: float
    rewrite: str = "off"
    count: int = 0
    search_score: float | None = None
    wall_ms: float | None = None


class Front(msgspec.Struct, frozen=True):
    """What a search found, cheapest first; `tried`: how many plans it took to find it."""

    front: list[FrontPlan]
    tried: int
    judge: str
    budget_ms: float | None = None
    default: FrontPlan | None = None
    costs: dict[str, float] = {}
    settings: dict[str, object] = {}

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(msgspec.to_builtins(self), indent=1) + "\n")


def read_front(path: str | Path) -> Front:
    """A front's file.

    Raises:
        InputError: no such file, or none of `nexus-rt tune`.
    """
    return documents.read(Path(path).expanduser(), Front, InputError, "make it with nexus-rt tune")


def from_front(text: str) -> FrontPlan:
    """`@FILE:BUDGET`, BUDGET in milliseconds, such as @front.json:900: the best plan within it.

    Raises:
        InputError: not of this form, no front, or nothing that takes so little.
    """
    match = re.fullmatch(r"@(.+):(\d+(?:\.\d+)?)(?:ms)?", text.strip())
    if not match:
        raise InputError(
            f"plan {cut(text, 80)!r} is not @FILE:MILLISECONDS, such as @front.json:900."
        )
    front, budget = read_front(match[1]), float(match[2])
    within = [p for p in front.front if p.ms <= budget]
    if not within:
        least = min((p.ms for p in front.front), default=None)
        raise InputError(
            f"{match[1]} holds no plan within {budget:g} ms; its cheapest takes"
            f" {'nothing' if least is None else f'{least:.0f} ms'}."
        )
    return max(within, key=lambda p: (p.score, -p.ms))
