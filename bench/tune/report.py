"""A front as a table, and as a page with its clips."""

from __future__ import annotations

from html import escape
from pathlib import Path

from nexus_rt.bench.page import STYLE, table
from nexus_rt.bench.results import write_text
from nexus_rt.bench.tune.search import Search
from nexus_rt.bench.tune.space import Candidate
from nexus_rt.media.video import save_video
from nexus_rt.pipeline.front import Front, FrontPlan

HEAD = ["plan", "rewrite", "priced ms", "wall ms a clip", "score", "95% interval", "in the search"]


def _cells(plan: FrontPlan) -> list[str]:
    search = "" if plan.search_score is None else f"{plan.search_score:.3f}"
    wall = "" if plan.wall_ms is None else f"{plan.wall_ms:.0f}"
    between = f"{plan.low:.3f} to {plan.high:.3f}"
    return [plan.plan, plan.rewrite, f"{plan.ms:.0f}", wall, f"{plan.score:.3f}", between, search]


def summary(front: Front) -> str:
    """What was tried, by which judge, on how many prompts."""
    count = front.default.count if front.default else 0
    budget = "no budget" if front.budget_ms is None else f"budget {front.budget_ms:g} ms"
    return (
        f"{front.tried} plans tried, {budget}; judged by {front.judge} on {count} prompts that the"
        " search had not seen"
    )


def markdown(front: Front) -> str:
    """The front as a Markdown table, the pair's own plan last."""
    lines = [summary(front), "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    rows = [(_cells(p), "") for p in front.front]
    if front.default is not None:
        rows.append((_cells(front.default), " (the pair's own)"))
    for cells, mark in rows:
        lines.append("| `" + cells[0] + f"`{mark} | " + " | ".join(cells[1:]) + " |")
    return "\n".join(lines)


def page(front: Front, search: Search, folder: Path, clips: int = 3) -> Path:
    """Write `front.html` beside `clips/`: the table, and clips of the report's first prompts by
    every plan of the front."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    plans = [*front.front, *([front.default] if front.default else [])]
    texts = list(search.report.prompts[:clips])
    sections = []
    for k, plan in enumerate(plans):
        candidate = Candidate(plan.plan, plan.rewrite)
        latents = search.latents(candidate, search.report, range(len(texts)))
        cells = []
        for i, frames in enumerate(search.pipe.decode(latents)):
            file = folder / "clips" / f"{k}-{i}.mp4"
            save_video(frames, file)
            cells.append(
                f'<figure><video src="clips/{file.name}" autoplay loop muted playsinline'
                f' height="160"></video><figcaption>{escape(texts[i])}</figcaption></figure>'
            )
        title = f"<code>{escape(plan.plan)}</code>, rewrite {escape(plan.rewrite)}"
        title += " (the pair's own)" if plan is front.default else ""
        sections.append(f'<h2>{title}</h2><div class="clips">{"".join(cells)}</div>')
    rows = [[escape(c) for c in _cells(p)] for p in plans]
    html = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>nexus-rt tune</title>'
        f"<style>{STYLE}</style><h1>Plans on the front of time and quality</h1>"
        f'<p class="note">{escape(summary(front))}</p>{table(HEAD, rows, 2)}{"".join(sections)}'
        "</html>"
    )
    path = folder / "front.html"
    write_text(path, html)
    return path
