"""Tables of documents, made from results files, so that no figure there was typed.

python -m nexus_rt.bench.tables README.md bench/README.md     # replaces what stands between <!--
results F --> and <!-- end -->

F, named from the document's folder: what `nexus-rt bench --json` wrote, or the GPU suite.
`<!-- headline F -->` gives the former in a few rows, `<!-- serve F -->` what `bench.serve` wrote.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nexus_rt.bench.cells import Cells, done, machine, names, terms
from nexus_rt.bench.gpu.tables import targets_table
from nexus_rt.bench.results import read, write_text
from nexus_rt.bench.schema import (
    Curve,
    Fingerprint,
    Load,
    Peer,
    Row,
    Suite,
    read_as,
    report_of,
    unit_of,
)
from nexus_rt.core.documents import read_object
from nexus_rt.core.errors import InputError, ModelError, NexusError

PLACE = re.compile(r"(<!-- (results|headline|serve) (\S+) -->\n).*?(<!-- end -->)", re.S)
PEERS = {
    "naive": "the paper's schedule written down, diffusers' transformers",
    "naive-ours": "the paper's schedule written down, our transformers",
    "diffusers": "diffusers' `WanPipeline`",
    "diffusers+compile": "the same, `torch.compile`d",
}
CELLS = Cells(ms=".0f", strong=("**", "**"))
ROW_COLUMNS = {  # figures -> title
    "plan": "plan",
    "engine": "engine",
    "p50, p95": "end to end, ms (p50, p95)",
    "denoise": "denoising",
    "vae": "VAE",
    "preview": "preview",
    "predicted": "predicted",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "error": "latent error",
    "right": "riddles",
}
PEER_COLUMNS = {
    "peer": "peer",
    "plan": "ours",
    "theirs": "theirs, ms",
    "ours": "ours, ms",
    "ratio": "ratio",
    "psnr": "frames, dB",
    "error": "latents differ by",
}


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*names: str) -> str:
    return _line(list(names)) + "\n" + "|---" * len(names) + "|"


def _rows(rows: Sequence[Row | Peer], columns: Mapping[str, str]) -> list[str]:
    """The lines of rows, one that failed with why; columns: name of a figure -> its title."""
    lines = [_head(*columns.values())]
    for row in rows:
        if row.failed is not None:
            start = [*names(row), row.failed]
            lines.append(_line([*start, *[""] * (len(columns) - len(start))]))
        else:
            cells = CELLS.figures(row)  # a column of two figures is named "a, b"
            lines.append(_line([", ".join(cells[n] for n in name.split(", ")) for name in columns]))
    return lines


def _fits(scaling: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    return [
        _line([axis, name, terms(fit, unit_of(axis)), f"{fit.r2:.4f}"])
        for axis, curves in scaling.items()
        for name, curve in curves.items()
        if (fit := curve.fit) is not None
    ]


def headline(document: dict[str, Any]) -> str:
    """Our plans against their peers (another clip against the first of them alone), and the engines
    of the first plan, as markdown.

    Raises:
        ModelError: the report is none, or has no row.
    """
    report = report_of(document)
    if not report.rows:
        raise ModelError("the report has no row; measure again.", code="missing", param="rows")
    ours = [r for r in done(report.peers) if r.peer in PEERS]
    ours = [r for r in ours if r.same_mathematics or r.peer != "naive-ours"]
    out = (
        [_head("ours", "against, in the same run", "ms", "theirs", "ratio", "frames")]
        if ours
        else []
    )
    right = {
        r.plan: f", {CELLS.right(r.quality)} riddles"
        for r in done(report.rows)
        if r.quality.accuracy is not None
    }
    for r in sorted(ours, key=lambda r: (not r.same_mathematics, list(PEERS).index(r.peer))):
        cells = CELLS.figures(r)
        frames = CELLS.psnr(r, " dB") + ("" if r.same_mathematics else ", another clip")
        figures = [cells[name] for name in ("ours", "theirs", "ratio")]
        out.append(_line([f"`{r.plan}`", PEERS[r.peer], *figures, frames + right.get(r.plan, "")]))
    first = report.rows[0].plan
    out += [
        *[""] * bool(out),
        _head(f"engine, plan `{first}`", "denoising, ms", "VAE", "whole call"),
    ]
    for cells in (CELLS.figures(r) for r in done(report.rows) if r.plan == first):
        out.append(_line([cells[name] for name in ("engine", "denoise", "vae", "p50")]))
    return f"{_made(report.fingerprint)}\n\n" + "\n".join(out) + "\n"


def _made(mark: Fingerprint) -> str:
    torch = mark.versions.get("torch", "unknown")
    return f"{machine(mark)}, torch {torch}, {mark.when[:10]}; `{mark.command}`"


def tables(document: dict[str, Any]) -> str:
    """Plans and engines, peers, and scaling, as markdown.

    Raises:
        ModelError: the report is none.
    """
    report = report_of(document)
    out = [_made(report.fingerprint), "", *_rows(report.rows, ROW_COLUMNS)]
    if report.peers:
        out += ["", *_rows(report.peers, PEER_COLUMNS)]
    if fits := _fits(report.scaling):
        out += ["", _head("over", "of", "milliseconds", "R2"), *fits]
    return "\n".join(out) + "\n"


def load_table(document: dict[str, Any]) -> str:
    """What a server did under load (`nexus_rt.bench.serve`).

    Raises:
        ModelError: the report is none.
    """
    report = read_as(document, Load, "the report")
    churn, held, lost = report.churn, report.connections, report.lost
    gets = lambda ms: f"{ms.p50:.2f}, {ms.p95:.2f}, {ms.p99:.2f}"
    rows = [
        ("GET of a job, nothing else going on, ms (p50, p95, p99)", gets(report.quiet_get_ms)),
        (
            f"{churn.jobs} jobs queued and cancelled on 8 connections",
            f"{churn.jobs_per_second:.0f} a second",
        ),
        ("GET meanwhile, ms", gets(churn.get_ms)),
        (
            "the server's memory before, half-way and after, MB",
            ", ".join(f"{m:.1f}" for m in churn.rss_mb),
        ),
        ("its slope over the second half", f"{churn.slope_kb_per_job:.3f} kB a job"),
        (
            f"GET beside {held.open} open connections and running jobs, ms",
            gets(held.get_ms),
        ),
        ("memory before and with them, MB", ", ".join(f"{m:.1f}" for m in held.rss_mb)),
        (
            "broken bodies, by answer",
            ", ".join(f"{n} x {status}" for status, n in report.malformed.items()),
        ),
        (
            "jobs accepted, ended, lost",
            f"{lost.submitted:.0f}, {lost.ended:.0f}, {lost.lost:.0f}",
        ),
    ]
    if parts := report.parts:
        numbers = lambda values: ", ".join(f"{ms:g} ({name})" for name, ms in values.items())
        rows += [
            ("a clip by itself, in twos, in fours, ms", numbers(parts.batch_ms_a_clip)),
            ("one preview, ms", numbers(parts.preview_ms)),
        ]
    return (
        "\n".join(
            [_made(report.fingerprint), "", _head("", "measured"), *(_line([*r]) for r in rows)]
        )
        + "\n"
    )


def fill(text: str, folder: Path) -> str:
    """A document with every marked table made again from its file, named relative to `folder`."""
    made = {
        "results": made_of,
        "headline": lambda path: headline(read(path)),
        "serve": lambda path: load_table(read_object(path)),
    }
    return PLACE.sub(lambda m: m[1] + made[m[2]](folder / m[3]) + m[4], text)


def made_of(path: Path) -> str:
    """The tables of one results file, of either kind.

    Raises:
        ModelError: it is none, or damaged.
    """
    report = read_object(path)
    if "run" not in report:
        return tables(read(path))
    run = read_as(report, Suite, str(path)).run
    rows = {part: read_as(rows, dict[str, Any], f"{path}: {part}") for part, rows in report.items()}
    made = [
        run.gpu or "CPU, dry: no speed here means anything",
        f"torch {run.torch}",
        f"triton {run.triton}",
        run.date[:10],
        f"commit {run.commit}",
    ]
    return f"{', '.join(made)}; `{run.command}`\n\n{targets_table(rows)}\n"


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        try:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{path} cannot be read ({error}); check the path.", code="unreadable"
                ) from None
            write_text(path, fill(text, path.parent))
        except NexusError as error:
            raise SystemExit(f"nexus-rt: {error}") from None


if __name__ == "__main__":
    main()
