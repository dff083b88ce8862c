"""A report as one self-contained HTML page: tables, and every clip with its answers and reasons;
all text is escaped."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from nexus_rt.bench.page import document, figure, table
from nexus_rt.bench.pictures import thumbnail
from nexus_rt.bench.vrbench.report import absent, introduction, sections
from nexus_rt.bench.vrbench.schema import Taxonomy
from nexus_rt.bench.vrbench.scoring import UNKNOWN, YES
from nexus_rt.core.errors import InputError
from nexus_rt.media.reading import read_frames

OWN = """
details{border-bottom:1px solid #e5e5e5;padding:.4rem 0}summary{cursor:pointer}
.clip td{white-space:normal;vertical-align:top;text-align:left}.yes{color:#2a7d4f}.no{color:#a4161a}.unknown{color:#8a6d00}
.clip{margin:.4rem 0 1rem;display:table;width:100%}.clip td:nth-child(2){min-width:14rem}
.clip img{height:auto;max-width:100%}summary code{font-size:12px}
"""


def picture(run: dict[str, Any], clip: dict[str, Any] | None) -> str:
    """A clip's frames as an element; a dash where there is no clip, or no longer."""
    try:
        shown = clip and thumbnail(
            read_frames(Path(run["folder"]) / Path(clip["file"]).name), 6, 80, "JPEG"
        )
    except InputError:
        shown = None
    return f'<img src="{escape(shown, quote=True)}" alt="frames">' if shown else "—"


def _answer(answer: dict[str, Any] | None) -> str:
    if answer is None:
        return "—"
    kind = "yes" if answer["answer"] == YES else "unknown" if answer["answer"] == UNKNOWN else "no"
    return f'<b class="{kind}">{escape(str(answer["answer"]))}</b> {escape(str(answer["reason"]))}'


def clip_details(report: dict[str, Any], name: str) -> str:
    """A prompt: what it was to show, and every run's frames, score, answers and reasons side by
    side."""
    runs = report["runs"]
    known = [(r, r["clips"].get(name)) for r in runs]
    any_clip = next(c for _, c in known if c)
    scores = " / ".join(figure(c["score"] if c else None, 4) for _, c in known)
    rows = [["", "", *(picture(run, clip) for run, clip in known)]]
    questions = {q: a for _, c in known if c for q, a in c["answers"].items()}
    for q, asked in questions.items():
        cells = [_answer(c["answers"].get(q) if c else None) for _, c in known]
        rows.append([escape(f"{q} ({asked['weight']:g})"), escape(asked["question"]), *cells])
    head = ["", "question", *(escape(r["name"]) for r in runs)]
    inside = table(head, rows, len(head)).replace("<table>", '<table class="clip">', 1)
    return (
        f"<details><summary><b>{escape(name)}</b> {escape(any_clip['category'])}"
        f" {escape(any_clip['difficulty'])} <code>{scores}</code>"
        f" {escape(any_clip['prompt'])}</summary>{inside}</details>"
    )


def page(report: dict[str, Any], taxonomy: Taxonomy) -> str:
    """The whole page; pictures are read from the runs' folders."""
    runs = report["runs"]
    names = list(dict.fromkeys(i for r in runs for i in r["clips"]))
    body = ["<h1>VR-Bench</h1>"]
    body += [f'<p class="note">{escape(introduction(r))}</p>' for r in runs]
    body += [f'<p class="note">{escape(note)}</p>' for note in report["notes"]]
    body.append(
        '<p class="note">Means of clips\' weighted shares of Yes, with bootstrap 95% intervals over'
        " clips.</p>"
    )
    for title, rows in sections(report, taxonomy):
        head = ["", *(escape(r["name"]) for r in runs)]
        body += [
            f"<h2>{escape(title)}</h2>",
            table(head, [[escape(n), *map(escape, row)] for n, row in rows]),
        ]
    if lost := absent(report):
        cells = [[escape(cell) for cell in row] for row in lost]
        body += ["<h2>Without answers</h2>", table(["run", "prompt", "why"], cells, 3)]
    body += ["<h2>Clips</h2>", *(clip_details(report, name) for name in names)]
    return document("VR-Bench", body, OWN)
