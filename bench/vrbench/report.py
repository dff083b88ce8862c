"""Judged runs as one report: scores beside each other, and every run compared with the first, clip
by clip."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from nexus_rt.bench.vrbench.judging import judgments, read_judgment
from nexus_rt.bench.vrbench.protocol import Protocol
from nexus_rt.bench.vrbench.schema import Taxonomy
from nexus_rt.bench.vrbench.scoring import clip_scores, mean_interval, paired, summary
from nexus_rt.core.errors import InputError, shorten
from nexus_rt.pipeline.batch_log import finished

ESCAPES = str.maketrans(
    {"<": "&lt;", ">": "&gt;", "&": "&amp;", **{mark: f"\\{mark}" for mark in "\\`*_{}[]|"}}
)


def make_report(runs: list[Path], taxonomy: Taxonomy) -> dict[str, Any]:
    """{"runs": [{"name", "judge", "protocol", "scores", "against_first", "clips", "missing",
    "failed", ...}], "notes"}.

    A folder judged by both protocols is two runs, side by side. Scores are made anew from the
    answers, under this taxonomy.

    Raises:
        InputError: a run was not judged, or none holds a clip. ModelError: a damaged file.
    """
    report: dict[str, Any] = {"kind": "nexus-rt vrbench report", "runs": [], "notes": []}
    folders = [path if path.is_dir() else path.parent for path in runs]
    for path, folder, name in zip(runs, folders, _names(folders), strict=True):
        files = judgments(path)
        for file in files:
            judgment = read_judgment(file)
            protocol = Protocol(judgment["protocol"])
            rule = protocol.counts_unanswered
            clips = {
                i: c | clip_scores(c["answers"], taxonomy.layer_names(c["category"]), rule)
                for i, c in judgment["clips"].items()
            }
            kept = {
                k: judgment[k]
                for k in ("judge", "when", "template", "missing", "failed", "protocol")
            }
            scores = {"scores": summary(clips, taxonomy), "clips": clips}
            shown_as = name if protocol.name == "strict" else f"{name} ({protocol.name})"
            report["runs"].append(
                {
                    "name": shown_as,
                    "folder": str(folder),
                    "made_with": made_with(folder),
                    **kept,
                    **scores,
                }
            )
    if not any(run["clips"] for run in report["runs"]):
        raise InputError(
            "no run holds a judged clip; nothing to report.", code="missing", param="runs"
        )
    first = report["runs"][0]
    for run in report["runs"][1:]:
        if run["protocol"] != first["protocol"]:
            report["notes"].append(
                f"{first['name']} is judged by the {first['protocol']} protocol, {run['name']} by"
                f" the {run['protocol']} one: their scores stand side by side and are not compared"
            )
            continue
        run["against_first"] = paired(first["clips"], run["clips"])
        for field, words in (("judge", "judges"), ("template", "prompt templates")):
            if run[field] != first[field]:
                report["notes"].append(
                    f"{first['name']} and {run['name']} had different {words}: their scores do not"
                    " compare"
                )
    for run in report["runs"]:
        if absent := len(run["missing"]) + len(run["failed"]):
            report["notes"].append(
                f"{run['name']}: {absent} prompts have no answers (listed below), and are in no"
                " mean"
            )
        if unknown := run["scores"]["overall"]["unknown"]:
            where = (
                "count as not Yes, as published"
                if run["protocol"] == "published"
                else "are in no mean"
            )
            report["notes"].append(
                f"{run['name']}: {unknown} of {run['scores']['overall']['questions']} answers are"
                f" Unknown (could not be read), and {where}"
            )
    return report


def made_with(folder: Path) -> str:
    """Plan, steps, size and models of a folder's clips, where `nexus-rt batch` or
    `vrbench generate` made them."""
    rows = [r["settings"] for r in finished(folder)[0].values() if r["status"] == "done"]
    words = lambda s: "{plan}, {steps} steps, {size}x{frames} {models}".format_map(
        collections.defaultdict(str, s)
    )
    texts = {shorten(words(s), 200) for s in rows}
    return "; ".join(sorted(texts)[:3]) + ("; ..." if len(texts) > 3 else "")


def _names(folders: list[Path]) -> list[str]:
    """The folders' names, made longer where two are the same."""
    whole = [folder.resolve() for folder in folders]
    for depth in range(1, 20):
        names = ["/".join(w.parts[-depth:]) for w in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{i + 1}: {w.name}" for i, w in enumerate(whole)]


def shown(score: dict[str, Any], sign: str = "") -> str:
    """A mean and its interval; sign: "+" for a difference."""
    if score["mean"] is None:
        return "-"
    number = lambda key: f"{score[key]:{sign}.4f}"
    mean = number("mean")
    return mean if score["low"] is None else f"{mean} [{number('low')}, {number('high')}]"


def sections(
    report: dict[str, Any], taxonomy: Taxonomy
) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Title and rows (what it is, a cell a run) of every table."""
    runs = report["runs"]

    def cells(*keys: str) -> list[str]:
        out = []
        for run in runs:
            at: Any = run["scores"]
            for key in keys:
                at = at.get(key, {})
            out.append(shown(at or mean_interval([])))
        return out

    every = lambda kind: list(dict.fromkeys(k for r in runs for k in r["scores"][kind]))
    whole = [r["scores"]["overall"] for r in runs]
    overall = [
        ("protocol", [r["protocol"] for r in runs]),
        ("all clips", cells("overall")),
        ("clips scored", [str(w["count"]) for w in whole]),
        ("Unknown answers", [f"{w['unknown']}/{w['questions']}" for w in whole]),
    ]
    if len(runs) > 1:
        counted = lambda a: f"{a['better']}, {a['same']}, {a['worse']}"
        for name, words in (
            (f"minus {runs[0]['name']}, paired", lambda a: shown(a, "+")),
            ("better, same, worse", counted),
        ):
            compared = [
                words(r["against_first"]) if "against_first" in r else "-" for r in runs[1:]
            ]
            overall.append((name, ["-", *compared]))
    sections = [("Overall", overall)]
    sections.append(("Groups", [(g, cells("groups", g)) for g in every("groups")]))
    sections.append(
        (
            "Categories",
            [(_titled(c, taxonomy), cells("categories", c)) for c in every("categories")],
        )
    )
    layers = [
        (f"{c}: {layer}", cells("categories", c, "layers", layer))
        for c in every("categories")
        for layer in taxonomy.layer_names(c)
    ]
    sections.append(("Layers", layers))
    sections.append(("Difficulty", [(d, cells("difficulties", d)) for d in every("difficulties")]))
    return [(title, rows) for title, rows in sections if rows]


def _titled(code: str, taxonomy: Taxonomy) -> str:
    return f"{code} {taxonomy.names[code]}" if code in taxonomy.names else code


def absent(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(run, id, why) of every prompt without answers."""
    return [
        (r["name"], i, why)
        for r in report["runs"]
        for kind in ("missing", "failed")
        for i, why in r[kind].items()
    ]


def introduction(run: dict[str, Any]) -> str:
    """A run in one line."""
    made = f"{run['made_with']}; " if run["made_with"] else ""
    return (
        f"{run['name']}: {made}judged by {run['judge']}, {run['protocol']} protocol,"
        f" {run['when'][:10]}"
    )


def _escaped(text: str) -> str:
    """Text as markdown shows it, HTML and table marks included."""
    return " ".join(text.translate(ESCAPES).split())


def markdown(report: dict[str, Any], taxonomy: Taxonomy) -> str:
    """Tables as markdown: means with bootstrap 95% intervals."""
    runs = report["runs"]
    out = ["# VR-Bench", ""]
    out += [f"- {_escaped(introduction(r))}" for r in runs]
    out += [f"- {_escaped(note)}" for note in report["notes"]]
    out += ["", "Means of clips' weighted shares of Yes, with bootstrap 95% intervals."]
    for title, rows in sections(report, taxonomy):
        head = "| " + " | ".join(["", *(_escaped(r["name"]) for r in runs)]) + " |"
        out += ["", f"## {title}", "", head, "|---" * (len(runs) + 1) + "|"]
        out += ["| " + " | ".join([_escaped(name), *cells]) + " |" for name, cells in rows]
    if lost := absent(report):
        out += ["", "## Without answers", ""]
        out += [f"- {_escaped(run)}, {_escaped(i)}: {_escaped(why)}" for run, i, why in lost]
    return "\n".join(out) + "\n"
