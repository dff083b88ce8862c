"""The search: Optuna proposes plans, each is judged on more and more prompts while it may still be
on the front, and what remains is judged again on prompts that the search has not seen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from torch import Tensor

from nexus_rt.bench.tune.judging import ClipJudge, noise
from nexus_rt.bench.tune.space import Candidate, Rewrite, Space
from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, shorten
from nexus_rt.method.plan import StepCosts
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.pipeline.front import Front, FrontPlan
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.pipeline.request import default_grid, make_guidance
from nexus_rt.pipeline.settings import CallSettings

Z = 1.96  # of a 95% interval
STATE = "search.log"


class Judged(msgspec.Struct):
    """What the journal keeps of a judged plan."""

    plan: str
    rewrite: Rewrite
    scores: list[Annotated[float, msgspec.Meta(ge=0, le=1)]]
    wall_ms: Annotated[float, msgspec.Meta(ge=0, le=1e15)] = 0.0


@dataclass
class Search:
    """One search.

    Args:
        search, report: judges of two disjoint lists of prompts, for finding and for reporting.
        costs: prices of a step's parts. budget_ms: the most a plan may be priced at.
        rungs: prompts judged before each decision to go on (successive halving).
        seed: of the noise and the proposals.
        options: of the pipeline's call. batch: prompts of one call.
    """

    pipe: NexusPipeline
    search: ClipJudge
    report: ClipJudge
    costs: StepCosts
    folder: Path
    budget_ms: float | None = None
    space: Space = field(default_factory=Space)
    rungs: tuple[int, ...] = (6, 18, 54)
    seed: int = 0
    batch: int = 6
    options: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        shared = set(self.search.prompts) & set(self.report.prompts)
        if shared:
            raise InputError(
                f"{len(shared)} prompts are of the search and of the report, such as"
                f" {min(shared)[:80]!r}; expected disjoint lists.",
                code="conflict",
                param="report",
            )
        most = len(self.search.prompts)
        self.rungs = tuple(sorted({min(r, most) for r in self.rungs}))
        self.grid = default_grid(self.pipe.defaults)
        own = make_guidance(CallSettings(), self.pipe.defaults)
        self.scales = (own.small, own.large)

    def price(self, plan: str) -> float:
        """Milliseconds of a plan's denoising by the costs."""
        return parse_plan(plan, self.grid).price(self.costs, *self.scales)

    def latents(self, candidate: Candidate, judge: ClipJudge, places: Sequence[int]) -> Tensor:
        """A candidate's clips of some prompts, each from its own noise: latents [B, C, T, H, W]."""
        return self.pipe(
            [judge.prompts[i] for i in places],
            plan=parse_plan(candidate.plan, self.grid),
            generator=noise(places, self.seed),
            output_type="latent",
            rewrite=candidate.rewrite if self.space.rewrite else None,
            **self.options,
        ).frames

    def judge(
        self, candidate: Candidate, judge: ClipJudge, places: Sequence[int]
    ) -> tuple[list[float], float]:
        """Scores of a candidate's clips of some prompts, and milliseconds of denoising a clip."""
        scores: list[float] = []
        spent = 0.0
        for start in range(0, len(places), self.batch):
            part = list(places[start : start + self.batch])
            begun = time.perf_counter()
            latents = self.latents(candidate, judge, part)
            spent += 1000 * (time.perf_counter() - begun)
            scores += judge.scores(part, latents, self.pipe.decode(latents))
        return scores, spent / max(1, len(places))

    def study(self) -> Any:
        """The Optuna study of the folder, made or gone on with."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        state = self.folder / STATE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            storage = JournalStorage(JournalFileBackend(str(state)))
            study = optuna.create_study(
                storage=storage,
                study_name="tune",
                directions=["minimize", "maximize"],
                sampler=optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=12),
                load_if_exists=True,
            )
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot be written ({error.strerror or error}); choose a place you"
                " may write to.",
                code="not_writable",
            ) from error
        except Exception as error:  # Optuna replays the journal, and checks nothing in it
            raise InputError(
                f"{state} is damaged ({shorten(error)}); move it away to begin anew.",
                code="damaged",
            ) from error
        asked = self.settings()
        kept = study.user_attrs.get("settings")
        if kept is not None and kept != asked:
            same = kept if isinstance(kept, dict) else {}
            changed = sorted(k for k in asked if same.get(k) != asked[k])
            raise InputError(
                f"{self.folder} holds a search with other {', '.join(changed)}; use the same, or"
                " another folder.",
                code="mismatch",
            )
        study.set_user_attr("settings", asked)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # of a killed process
        return study

    def settings(self) -> dict[str, Any]:
        """What two runs of one folder must share."""
        return {
            "judge": self.search.name,
            "prompts": len(self.search.prompts),
            "first prompt": self.search.prompts[0],
            "budget": self.budget_ms,
            "seed": self.seed,
            "rungs": list(self.rungs),
            "models": self.pipe.identity,
            "size": {k: v for k, v in self.options.items() if isinstance(v, int)},
        }

    def run(self, trials: int) -> Front:
        """Try plans until `trials` have been judged, and report the front.

        Raises:
            InputError: the folder holds another search, or no plan keeps the budget.
        """
        import optuna

        study = self.study()
        rows = self.judged(study)
        for _ in range(50 * trials):
            if len(rows) >= trials:
                break
            trial = study.ask()
            candidate = self.space.suggest(trial, self.grid)
            price = self.price(candidate.plan)
            trial.set_user_attr("plan", candidate.plan)
            trial.set_user_attr("rewrite", candidate.rewrite)
            if self.budget_ms is not None and price > self.budget_ms:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            if (known := rows.get(candidate.key)) is not None:
                study.tell(trial, [price, known.score])
                continue
            row = self.climb(candidate, price, rows)
            trial.set_user_attr("scores", row.scores)
            trial.set_user_attr("wall_ms", row.wall_ms)
            study.tell(trial, [price, row.score])
            rows[candidate.key] = row
            self.say(
                f"[{len(rows)}/{trials}] {candidate.key}: {price:.0f} ms, {row.score:.3f} on"
                f" {len(row.scores)} prompts"
            )
        if not rows:
            raise InputError(
                f"no plan of the space takes at most {self.budget_ms:g} ms; raise the budget.",
                code="out_of_range",
                param="budget",
            )
        return self._report(rows)

    def judged(self, study: Any) -> dict[str, Row]:
        """The plans that a study has judged, by their words.

        Raises:
            InputError: its journal holds a trial that is none of a search.
        """
        rows: dict[str, Row] = {}
        for trial in study.get_trials(deepcopy=False):
            if not trial.user_attrs.get("scores") or not trial.values:
                continue
            where = f"{self.folder / STATE}: trial {trial.number}"
            remedy = "move the file away to begin anew"
            kept = documents.check(trial.user_attrs, Judged, where, InputError, remedy)
            candidate = Candidate(kept.plan, kept.rewrite)
            rows[candidate.key] = Row(candidate, trial.values[0], kept.scores, kept.wall_ms)
        return rows

    def climb(self, candidate: Candidate, price: float, rows: dict[str, Row]) -> Row:
        """Judge a candidate rung by rung, until another plan that is no dearer is surely better."""
        row = Row(candidate, price, [], 0.0)
        for rung in self.rungs:
            places = range(len(row.scores), rung)
            scores, wall = self.judge(candidate, self.search, places)
            row.scores += scores
            row.wall_ms = wall
            if any(o.price <= price and o.low(rung) > row.high() for o in rows.values()):
                break
        return row

    def _report(self, rows: dict[str, Row]) -> Front:
        """Judge the front, and the pair's own plan, on the report's prompts."""
        whole = [r for r in rows.values() if len(r.scores) == self.rungs[-1]]
        front = pareto(whole or list(rows.values()))
        places = range(len(self.report.prompts))
        reported = []
        for row in front:
            self.say(f"reporting {row.candidate.key}")
            scores, wall = self.judge(row.candidate, self.report, places)
            reported.append(_front_plan(row.candidate, row.price, scores, wall, row.score))
        d = self.pipe.defaults
        own = Candidate(d.plan, "auto" if d.rewrite == "auto" else "off")
        scores, wall = self.judge(own, self.report, places)
        default = _front_plan(own, self.price(own.plan), scores, wall, None)
        reported.sort(key=lambda p: p.ms)
        return Front(
            reported,
            len(rows),
            self.report.name,
            self.budget_ms,
            default,
            {k: round(v, 4) for k, v in vars(self.costs).items()},
            {**self.settings(), "report prompts": len(self.report.prompts)},
        )


@dataclass
class Row:
    """A judged candidate: its price and its scores, a prompt each."""

    candidate: Candidate
    price: float
    scores: list[float]
    wall_ms: float

    @property
    def score(self) -> float:
        return float(np.mean(self.scores))

    def low(self, count: int) -> float:
        """The lower end of the interval on the first `count` prompts."""
        return interval(self.scores[:count])[0]

    def high(self) -> float:
        """The upper end of the interval."""
        return interval(self.scores)[1]


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean of scores in 0..1, normal approximation; never narrower than that of a
    share of as many with one more right and one more wrong."""
    n, mean = len(scores), float(np.mean(scores))
    spread = float(np.std(scores, ddof=1)) / math.sqrt(n) if n > 1 else 0.5
    least = math.sqrt((n * mean + 1) * (n * (1 - mean) + 1)) / (n + 2) / math.sqrt(n + 2)
    half = Z * max(spread, least)
    return max(0.0, mean - half), min(1.0, mean + half)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in price and score, cheapest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.price, -r.score)):
        if not front or row.score > front[-1].score:
            front.append(row)
    return front


def _front_plan(
    candidate: Candidate, price: float, scores: list[float], wall: float, found: float | None
) -> FrontPlan:
    low, high = interval(scores)
    return FrontPlan(
        candidate.plan,
        round(price, 3),
        round(float(np.mean(scores)), 4),
        round(low, 4),
        round(high, 4),
        candidate.rewrite,
        len(scores),
        None if found is None else round(found, 4),
        round(wall, 2),
    )
