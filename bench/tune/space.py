"""The plans that a search draws from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.time_grid import TimeGrid

Rewrite = Literal["auto", "off"]
RENOISE = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)


@dataclass(frozen=True)
class Candidate:
    """A plan's words, and whether the large generator reads the rewritten prompt."""

    plan: str
    rewrite: Rewrite = "off"

    @property
    def key(self) -> str:
        return f"{self.plan} rewrite={self.rewrite}"


@dataclass(frozen=True)
class Space:
    """Ranges of the search.

    small, large: fewest and most steps of the clocks. guidance: scales of the large generator.
    rewrite: whether rewriting may be chosen.
    """

    small: tuple[int, int] = (4, 24)
    large: tuple[int, int] = (2, 12)
    guidance: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    rewrite: bool = True

    def suggest(self, trial: Any, grid: TimeGrid) -> Candidate:
        """A candidate by an Optuna trial's choices."""
        form = trial.suggest_categorical("form", ["clocks", "renoise"])
        steps = trial.suggest_int("small clock", *self.small)
        large = trial.suggest_int("large steps", *self.large)
        scale = trial.suggest_categorical("large guidance", list(self.guidance))
        reuse = ""
        if scale != 1.0 and large > 1:
            every = trial.suggest_int("guidance every", 1, 3)
            reuse += f"/guidance-every={every}" if every > 1 else ""
        if large > 3:
            every = trial.suggest_int("velocity every", 1, 2)
            reuse += f"/every={every}" if every > 1 else ""
        tail = f"large:{large}@{scale:g}{reuse}"
        if form == "clocks":
            share = trial.suggest_float("handover", 0.15, 0.9)
            walked = min(max(1, round(share * steps)), steps - 1)
            words = f"small:{walked}/{steps} {tail}"
        else:
            sigma = trial.suggest_categorical("renoise", list(RENOISE))
            words = f"small:{steps} renoise={sigma:g} {tail}"
        rewrite: Rewrite = "off"
        if self.rewrite:
            rewrite = trial.suggest_categorical("rewrite", ["auto", "off"])
        return Candidate(parse_plan(words, grid).name, rewrite)
