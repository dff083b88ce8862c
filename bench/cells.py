"""Figures of results as cells of a table: one reading of them for terminals, markdown and pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from nexus_rt.bench.schema import Fingerprint, Fit, Peer, Quality, Row

Measured = TypeVar("Measured", Row, Peer)


@dataclass(frozen=True)
class Cells:
    """How a medium writes figures.

    absent: what stands for one that is not known. ms: the format of milliseconds. decibels: the
        unit of a PSNR, where its column has none. strong: around what matters most.
    """

    absent: str = "-"
    ms: str = ".1f"
    decibels: str = ""
    strong: tuple[str, str] = ("", "")

    def number(self, value: float | None, form: str = ".1f", unit: str = "") -> str:
        return self.absent if value is None else f"{value:{form}}{unit}"

    def time(self, value: float | None) -> str:
        return self.number(value, self.ms)

    def psnr(self, q: Quality, unit: str = "") -> str:
        return "identical" if q.identical else self.number(q.psnr_db, ".1f", unit)

    def ssim(self, q: Quality) -> str:
        return self.number(q.ssim, ".4f")

    def error(self, q: Quality) -> str:
        return self.number(q.latent_error, ".1e")

    def right(self, q: Quality) -> str:
        return self.absent if q.accuracy is None else f"{q.right}/{q.count}"

    def megabytes(self, count: float | None) -> str:
        return self.number(None if count is None else count / 1e6, ",.0f", " MB")

    def figures(self, row: Row | Peer) -> dict[str, str]:
        """Every figure of a row that did not fail, by its name."""
        return self._row(row) if isinstance(row, Row) else self._peer(row)

    def _row(self, row: Row) -> dict[str, str]:
        q, off = row.quality, row.prediction_error
        return {
            "plan": row.plan,
            "engine": row.engine,
            "p50": self.time(row.total_duration_ms),
            "p95": self.time(row.total_p95_ms),
            "denoise": self.time(row.denoise_ms),
            "vae": self.time(row.components_ms.get("vae")),
            "cold": self.number(row.cold_ms, ",.0f"),
            "preview": self.time(row.first_preview_ms),
            "swap": self.number(row.swap_ratio, ".2f"),
            "predicted": self.number(None if off is None else 100 * off, "+.1f", "%"),
            "psnr": self.psnr(q, self.decibels),
            "ssim": self.ssim(q),
            "error": self.error(q),
            "right": self.right(q),
            "host": self.megabytes(row.peak_host_bytes),
            "device": self.megabytes(row.peak_device_bytes),
        }

    def _peer(self, row: Peer) -> dict[str, str]:
        before, after = self.strong
        return {
            "peer": row.peer,
            "plan": row.plan + ("" if row.same_mathematics else " (another plan)"),
            "ours": self.time(row.ours_ms.p50),
            "theirs": self.time(row.theirs_ms.p50),
            "ratio": f"{before}{row.ratio:.2f}x{after}",
            "psnr": self.psnr(row, self.decibels),
            "ssim": self.ssim(row),
            "error": self.error(row),
        }


def names(row: Row | Peer) -> list[str]:
    """What a row is of: the cells before its failure."""
    return [row.plan, row.engine] if isinstance(row, Row) else [row.peer]


def done(rows: list[Measured]) -> list[Measured]:
    """The rows that did not fail."""
    return [r for r in rows if r.failed is None]


def terms(fit: Fit, unit: str) -> str:
    """A fitted curve: "3 + 0.5 tokens + 0.01 tokens²"."""
    powers = ("", f" {unit}", f" {unit}²")
    pairs = zip(fit.coefficients, fit.powers, strict=True)
    return " + ".join(f"{c:.3g}{powers[p]}" for c, p in pairs)


def machine(mark: Fingerprint) -> str:
    """The processor of a run."""
    own = mark.hardware
    return f"{own.gpu or own.processor}, {own.threads} threads"
