"""Results of `nexus-rt bench` for a terminal."""

from __future__ import annotations

from nexus_rt.bench.cells import Cells, terms
from nexus_rt.bench.schema import Estimate, Peer, Report, Row, unit_of

CELLS = Cells()
COLUMNS = {  # name -> title and width
    "engine": ("engine", -12),
    "p50": ("p50 ms", 9),
    "p95": ("p95 ms", 9),
    "denoise": ("denoise", 9),
    "vae": ("vae", 8),
    "predicted": ("predicted", 9),
    "psnr": ("PSNR dB", 9),
    "ssim": ("SSIM", 7),
    "error": ("latents", 8),
    "right": ("right", 7),
}


def text(report: Report) -> str:
    """Notes, rows, peers and fits."""
    if report.estimate is not None:
        return "\n".join([*report.notes, *_estimate(report.estimate)])
    wide = max([12, *(len(r.plan) for r in report.rows)])
    titles = {name: title for name, (title, _) in COLUMNS.items()}
    out = [*report.notes, _line("plan", titles, wide)]
    out += [_row(row, wide) for row in report.rows]
    out += [_peer(row) for row in report.peers]
    for axis, curves in report.scaling.items():
        for name, curve in curves.items():
            if fit := curve.fit:
                words = terms(fit, unit_of(axis))
                out.append(f"scaling over {axis}, {name}: {words}; R2 {fit.r2:.4f}")
    return "\n".join(out)


def _line(plan: str, cells: dict[str, str], wide: int) -> str:
    own = ((cells[name], width) for name, (_, width) in COLUMNS.items())
    fitted = (f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" for cell, width in own)
    return " ".join([f"{plan:{wide}}", *fitted])


def _row(row: Row, wide: int) -> str:
    if row.failed is not None:
        return f"{row.plan:{wide}} {row.engine:12} failed: {row.failed}"
    return _line(row.plan, CELLS.figures(row), wide)


def _peer(row: Peer) -> str:
    if row.failed is not None:
        return f"peer {row.peer}: {row.failed}"
    cells = CELLS.figures(row)
    return (
        f"peer {row.peer}: {cells['theirs']} ms, our {row.plan} {cells['ours']} ms,"
        f" {cells['ratio']}; latents differ by {cells['error']}, frames {CELLS.psnr(row, ' dB')}"
    )


def _estimate(estimate: Estimate) -> list[str]:
    lines = [f"{name}: {count:,} TFLOP" for name, count in estimate.tflop.items()]
    return lines + [
        f"{r.plan}: {r.steps} steps take at least {CELLS.number(r.denoise_ms_at_least, ',')} ms at"
        f" {estimate.tflops} TFLOP/s"
        for r in estimate.rows
    ]
