"""Answers to scores.

A clip's score is the sum of the weights of its Yes over the sum of the weights of its Yes and No,
rounded to four places as published. An `Unknown` (the judge said nothing that could be read) is in
neither sum: it is counted beside the score, and a clip of nothing but Unknown has no score.
Categories, groups, difficulties and the whole are means over clips, with bootstrap 95% intervals
over clips; two runs are compared clip by clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from nexus_rt.bench.vrbench.schema import Taxonomy

YES, NO, UNKNOWN = "Yes", "No", "Unknown"
DRAWS = 10_000


def weighted(answers: Iterable[dict[str, Any]], unanswered: bool = False) -> float | None:
    """Share of Yes by weight, of answers `{"answer", "weight"}`; None where none is known.

    unanswered: an Unknown stays in the denominator, as published.
    """
    known = [a for a in answers if unanswered or a["answer"] != UNKNOWN]
    whole = sum(a["weight"] for a in known)
    return (
        round(sum(a["weight"] for a in known if a["answer"] == YES) / whole, 4)
        if whole > 0
        else None
    )


def clip_scores(
    answers: dict[str, dict[str, Any]], layer_names: tuple[str, ...], unanswered: bool = False
) -> dict[str, Any]:
    """{"score", "layers": {name: score}, "unknown", "questions"} of a clip's answers
    `{"answer", "weight", "layer"}`."""
    of_layer = lambda i: (a for a in answers.values() if a["layer"] == i)
    layers = {name: weighted(of_layer(i), unanswered) for i, name in enumerate(layer_names)}
    unknown = sum(a["answer"] == UNKNOWN for a in answers.values())
    return {
        "score": weighted(answers.values(), unanswered),
        "layers": layers,
        "unknown": unknown,
        "questions": len(answers),
    }


def mean_interval(values: list[float], draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """{"mean", "low", "high", "count"}: bootstrap percentile 95% interval over the values; one
    value has no interval."""
    if not values:
        return {"mean": None, "low": None, "high": None, "count": 0}
    given = np.asarray(values, dtype=np.float64)
    interval = {
        "mean": round(float(given.mean()), 4),
        "low": None,
        "high": None,
        "count": len(values),
    }
    if len(values) > 1:
        means = given[
            np.random.default_rng(seed).integers(0, len(given), (draws, len(given)))
        ].mean(1)
        interval["low"], interval["high"] = (
            round(float(q), 4) for q in np.quantile(means, (0.025, 0.975))
        )
    return interval


def _means(clips: list[dict[str, Any]]) -> dict[str, Any]:
    interval = mean_interval([c["score"] for c in clips if c["score"] is not None])
    return interval | {
        "unknown": sum(c["unknown"] for c in clips),
        "questions": sum(c["questions"] for c in clips),
    }


def summary(clips: dict[str, dict[str, Any]], taxonomy: Taxonomy) -> dict[str, Any]:
    """Scores of a run: {"overall", "groups", "categories" (with "layers"), "difficulties"}, each
    mean with its interval.

    clips: by id, with "category", "difficulty" and what `clip_scores` gives.
    """
    rows = list(clips.values())
    table: dict[str, Any] = {
        "overall": _means(rows),
        "groups": {},
        "categories": {},
        "difficulties": {},
    }
    for group, codes in taxonomy.groups.items():
        if part := [c for c in rows if c["category"] in codes]:
            table["groups"][group] = _means(part)
    present = {c["category"] for c in rows}
    for code in [c for c in taxonomy.names if c in present] + sorted(
        present - taxonomy.names.keys()
    ):
        part = [c for c in rows if c["category"] == code]
        layers = {
            name: mean_interval([v for c in part if (v := c["layers"].get(name)) is not None])
            for name in taxonomy.layer_names(code)
        }
        table["categories"][code] = _means(part) | {"layers": layers}
    for level in sorted({c["difficulty"] for c in rows if c["difficulty"]}, key=_difficulty):
        table["difficulties"][level] = _means([c for c in rows if c["difficulty"] == level])
    return table


def _difficulty(name: str) -> tuple[int, str]:
    order = ("easy", "simple", "low", "medium", "moderate", "hard", "difficult", "high")
    return (order.index(name.lower()) if name.lower() in order else len(order)), name


def paired(first: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How `other` differs from `first` on the clips both have scores of: mean difference with its
    interval, better, worse, same."""
    shared = [
        i
        for i, c in first.items()
        if c["score"] is not None and (other.get(i) or {}).get("score") is not None
    ]
    differences = [other[i]["score"] - first[i]["score"] for i in shared]
    return mean_interval(differences) | {
        "better": sum(d > 0 for d in differences),
        "worse": sum(d < 0 for d in differences),
        "same": sum(d == 0 for d in differences),
    }
