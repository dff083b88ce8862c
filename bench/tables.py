"""Tables of documents, made from results files, so that no figure there was typed.

python -m nexus_rt.bench.tables README.md bench/README.md     # replaces what stands between <!--
results F --> and <!-- end -->

F, named from the document's folder: what `nexus-rt bench --json` wrote, or the GPU suite.
`<!-- headline F -->` gives the former in a few rows, `<!-- serve F -->` what `bench.serve` wrote.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from nexus_rt.bench.gpu.tables import targets_table
from nexus_rt.bench.results import read, write_text
from nexus_rt.bench.shown import Load, Report, Suite, checked
from nexus_rt.core.documents import read_object
from nexus_rt.core.errors import InputError, ModelError, NexusError

PLACE = re.compile(r"(<!-- (results|headline|serve) (\S+) -->\n).*?(<!-- end -->)", re.S)
PEERS = {
    "naive": "the paper's schedule written down, diffusers' transformers",
    "naive-ours": "the paper's schedule written down, our transformers",
    "diffusers": "diffusers' `WanPipeline`",
    "diffusers+compile": "the same, `torch.compile`d",
}


def _psnr(q: dict[str, Any]) -> str:
    return (
        "identical"
        if q.get("identical")
        else "-"
        if q.get("psnr_db") is None
        else f"{q['psnr_db']:.1f}"
    )


def _error(q: dict[str, Any]) -> str:
    return "-" if q.get("latent_error") is None else f"{q['latent_error']:.1e}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*names: str) -> str:
    return _line(list(names)) + "\n" + "|---" * len(names) + "|"


def _row(r: dict[str, Any]) -> str:
    if r.get("failed") is not None:
        return _line([r["plan"], r["engine"], r["failed"], *[""] * 8])
    q, off, preview = r["quality"], r.get("prediction_error"), r.get("first_preview_ms")
    return _line(
        [
            r["plan"],
            r["engine"],
            f"{r['total_duration_ms']:.0f}, {r['total_p95_ms']:.0f}",
            f"{r['denoise_ms']:.0f}",
            f"{r.get('components_ms', {}).get('vae', 0):.0f}",
            "-" if preview is None else f"{preview:.0f}",
            "-" if off is None else f"{100 * off:+.1f}%",
            _psnr(q),
            "-" if q.get("ssim") is None else f"{q['ssim']:.4f}",
            _error(q),
            f"{q['right']}/{q['count']}" if q.get("accuracy") is not None else "-",
        ]
    )


def _peer(r: dict[str, Any]) -> str:
    if r.get("failed") is not None:
        return _line([r["peer"], r["failed"], *[""] * 5])
    plan = r["plan"] if r["same_mathematics"] else f"{r['plan']} (another plan)"
    times = f"{r['theirs_ms']['p50']:.0f}", f"{r['ours_ms']['p50']:.0f}"
    return _line([r["peer"], plan, *times, f"**{r['ratio']:.2f}x**", _psnr(r), _error(r)])


def _fits(scaling: dict[str, Any]) -> list[str]:
    lines = []
    for axis, curves in scaling.items():
        for name, curve in curves.items():
            if fit := curve.get("fit"):
                n = "steps" if axis == "steps" else "tokens"
                terms = [
                    f"{c:.3g}" + ("", f" {n}", f" {n}²")[p]
                    for c, p in zip(fit["coefficients"], fit["powers"], strict=True)
                ]
                lines.append(_line([axis, name, " + ".join(terms), f"{fit['r2']:.4f}"]))
    return lines


def headline(report: dict[str, Any]) -> str:
    """Our plans against their peers (another clip against the first of them alone), and the engines
    of the first plan, as markdown.

    Raises:
        ModelError: the report is none, or has no row.
    """
    checked(report, Report, "the report")
    if not report.get("rows"):
        raise ModelError("the report has no row; measure again.", code="missing", param="rows")
    done = lambda rows: [r for r in rows if r.get("failed") is None]
    ours = [r for r in done(report.get("peers", [])) if r["peer"] in PEERS]
    ours = [r for r in ours if r["same_mathematics"] or r["peer"] != "naive-ours"]
    out = (
        [_head("ours", "against, in the same run", "ms", "theirs", "ratio", "frames")]
        if ours
        else []
    )
    right = {
        r["plan"]: f", {r['quality']['right']}/{r['quality']['count']} riddles"
        for r in done(report["rows"])
        if r["quality"].get("accuracy") is not None
    }
    for r in sorted(ours, key=lambda r: (not r["same_mathematics"], list(PEERS).index(r["peer"]))):
        shown = (
            _psnr(r)
            + (" dB" if r.get("psnr_db") is not None else "")
            + ("" if r["same_mathematics"] else ", another clip")
        )
        times = f"{r['ours_ms']['p50']:.0f}", f"{r['theirs_ms']['p50']:.0f}"
        ratio = f"**{r['ratio']:.2f}x**"
        out.append(
            _line(
                [
                    f"`{r['plan']}`",
                    PEERS[r["peer"]],
                    *times,
                    ratio,
                    shown + right.get(r["plan"], ""),
                ]
            )
        )
    first = report["rows"][0]["plan"]
    rows = [r for r in done(report["rows"]) if r["plan"] == first]
    out += [
        *[""] * bool(out),
        _head(f"engine, plan `{first}`", "denoising, ms", "VAE", "whole call"),
    ]
    for r in rows:
        vae = r.get("components_ms", {}).get("vae", 0)
        times = (r["denoise_ms"], vae, r["total_duration_ms"])
        out.append(_line([r["engine"], *(f"{t:.0f}" for t in times)]))
    return f"{_made(report)}\n\n" + "\n".join(out) + "\n"


def _made(report: dict[str, Any]) -> str:
    mark = report["fingerprint"]
    h, v = mark["hardware"], mark.get("versions", {})
    made = (
        f"{h.get('gpu') or h.get('processor', '')}, {h['threads']} threads, torch"
        f" {v.get('torch', 'unknown')},"
        f" {mark['when'][:10]}"
    )
    return f"{made}; `{mark['command']}`"


def tables(report: dict[str, Any]) -> str:
    """Plans and engines, peers, and scaling, as markdown.

    Raises:
        ModelError: the report is none.
    """
    checked(report, Report, "the report")
    names = (
        "plan",
        "engine",
        "end to end, ms (p50, p95)",
        "denoising",
        "VAE",
        "preview",
        "predicted",
        "PSNR, dB",
        "SSIM",
        "latent error",
        "riddles",
    )
    out = [_made(report), "", _head(*names), *(_row(r) for r in report.get("rows", []))]
    if report.get("peers"):
        head = _head(
            "peer", "ours", "theirs, ms", "ours, ms", "ratio", "frames, dB", "latents differ by"
        )
        out += ["", head, *(_peer(r) for r in report["peers"])]
    if fits := _fits(report.get("scaling", {})):
        out += ["", _head("over", "of", "milliseconds", "R2"), *fits]
    return "\n".join(out) + "\n"


def load_table(report: dict[str, Any]) -> str:
    """What a server did under load (`nexus_rt.bench.serve`).

    Raises:
        ModelError: the report is none.
    """
    checked(report, Load, "the report")
    churn, held, lost = report["churn"], report["connections"], report["lost"]
    gets = lambda ms: f"{ms['p50']:.2f}, {ms['p95']:.2f}, {ms['p99']:.2f}"
    rows = [
        ("GET of a job, nothing else going on, ms (p50, p95, p99)", gets(report["quiet_get_ms"])),
        (
            f"{churn['jobs']} jobs queued and cancelled on 8 connections",
            f"{churn['jobs_per_second']:.0f} a second",
        ),
        ("GET meanwhile, ms", gets(churn["get_ms"])),
        (
            "the server's memory before, half-way and after, MB",
            ", ".join(f"{m:.1f}" for m in churn["rss_mb"]),
        ),
        ("its slope over the second half", f"{churn['slope_kb_per_job']:.3f} kB a job"),
        (
            f"GET beside {held['open']} open connections and running jobs, ms",
            gets(held["get_ms"]),
        ),
        ("memory before and with them, MB", ", ".join(f"{m:.1f}" for m in held["rss_mb"])),
        (
            "broken bodies, by answer",
            ", ".join(f"{n} x {status}" for status, n in report["malformed"].items()),
        ),
        (
            "jobs accepted, ended, lost",
            ", ".join(f"{lost[n]:.0f}" for n in ("submitted", "ended", "lost")),
        ),
    ]
    if parts := report.get("parts"):
        numbers = lambda values: ", ".join(f"{ms:g} ({name})" for name, ms in values.items())
        rows += [
            ("a clip by itself, in twos, in fours, ms", numbers(parts["batch_ms_a_clip"])),
            ("one preview, ms", numbers(parts["preview_ms"])),
        ]
    return (
        "\n".join([_made(report), "", _head("", "measured"), *(_line([*r]) for r in rows)]) + "\n"
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
    run = checked(report, Suite, str(path))["run"]
    rows = {part: checked(rows, dict[str, Any], f"{path}: {part}") for part, rows in report.items()}
    made = [
        run.get("gpu") or "CPU, dry: no speed here means anything",
        f"torch {run['torch']}",
        f"triton {run.get('triton')}",
        run["date"][:10],
        f"commit {run['commit']}",
    ]
    return f"{', '.join(made)}; `{run['command']}`\n\n{targets_table(rows)}\n"


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
