"""Results as files: what made them, reading them back, and comparing two."""

from __future__ import annotations

import math
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from nexus_rt.bench.cells import done
from nexus_rt.bench.schema import Fingerprint, Row, report_of
from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, ModelError, readable, shorten, shown
from nexus_rt.core.part_files import part_file
from nexus_rt.core.versions import versions
from nexus_rt.loading.experts import GeneratorSource, transformers_of
from nexus_rt.loading.locate import folder_fingerprint
from nexus_rt.method.step import engine_name

SCHEMA, KIND = 1, "nexus-rt bench"
NOISE = 0.02  # a slowdown that counts, beyond what the runs' own spread explains
MEMORY = 0.05
PSNR_DB, ACCURACY = 1.0, 0.05


def processor() -> str:
    """The CPU's name, where the system says."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        settings |= {
            "gpu": gpu.name,
            "gpu_bytes": gpu.total_memory,
            "sm": f"{gpu.major}.{gpu.minor}",
        }
    return settings


def weights_fingerprint(generators: dict[str, GeneratorSource]) -> dict[str, str]:
    """`folder_fingerprint` of every generator's transformers."""
    return {
        engine_name(name, expert): folder_fingerprint(folder)
        for name, source in generators.items()
        for expert, folder in transformers_of(source).items()
    }


def fingerprint(device: torch.device, weights: dict[str, str], command: str) -> dict[str, Any]:
    """Hardware, versions, weights and command of a run."""
    return {
        "hardware": hardware(device),
        "device": str(device),
        "python": platform.python_version(),
        "versions": {k: v for k, v in versions().items() if v},
        "weights": weights,
        "command": command,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_text(path: Path, text: str) -> None:
    """A whole file or none.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with part_file(path) as part:
            part.write_text(readable(text), encoding="utf-8")
            part.replace(path)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise InputError(
            f"{path} could not be written ({error}); free some space or write somewhere else.",
            code="not_writable",
        ) from error


def read(path: str | Path) -> dict[str, Any]:
    """A results file; errors as `read_as`."""
    results = read_as(Path(path), KIND, SCHEMA, "`nexus-rt bench --json`", "measure again")
    report_of(results, str(path))
    return results


def read_as(path: Path, kind: str, schema: int, maker: str, remedy: str) -> dict[str, Any]:
    """A JSON object that says what it is under "kind" and "schema".

    Args:
        maker: what writes such files. remedy: what to do about a bad one, to put into the errors.

    Raises:
        InputError: there is none. ModelError: it is damaged, something else, or of another schema.
    """
    try:
        data = documents.read_bytes(path, InputError)
    except InputError as error:
        raise InputError(
            f"{path} cannot be read ({shorten(error)}); expected a file that {maker} wrote.",
            code=error.code,
        ) from None
    try:
        document = documents.parse(data, str(path), InputError, remedy)
    except InputError as error:  # it is a file, and a damaged one
        raise ModelError(str(error), code=error.code, param=error.param) from None
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise ModelError(
            f"{path} holds no results of {kind}; expected a file that {maker} wrote.", param="kind"
        )
    if document.get("schema") != schema:
        raise ModelError(
            f"{path} has schema {shown(document.get('schema'))}, and this nexus-rt reads {schema};"
            f" {remedy}, or use the version that wrote it.",
            code="unsupported",
            param="schema",
        )
    return document


def ratio_interval(
    before: list[float], after: list[float], draws: int = 2000
) -> tuple[float, float, float]:
    """Median of `after` over median of `before`, with its bootstrap 95% interval."""
    rng = np.random.default_rng(0)
    pick = lambda v: np.median(rng.choice(v, (draws, len(v))), 1)
    ratios = pick(np.asarray(after)) / pick(np.asarray(before))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return median(after) / median(before), float(low), float(high)


def _key(row: Row) -> tuple[Any, ...]:
    return row.plan, row.engine, tuple(row.size), row.steps


def differences(before: Fingerprint, after: Fingerprint) -> list[str]:
    """What two fingerprints differ in: machine, versions, weights, device."""
    pairs = [
        (name, getattr(before.hardware, name), getattr(after.hardware, name))
        for name in ("processor", "gpu", "cores", "threads", "system")
    ]
    for title, a, b in (
        ("", before.versions, after.versions),
        ("weights of ", before.weights, after.weights),
    ):
        pairs += [(f"{title}{name}", a.get(name), b.get(name)) for name in sorted({*a, *b})]
    pairs.append(("device", before.device, after.device))
    return [
        f"{name} differs ({shorten(a, 60)} and {shorten(b, 60)})" for name, a, b in pairs if a != b
    ]


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines on every row both have, and the regressions among them.

    A row regresses where its median is slower by more than NOISE even at the near end of the
    ratio's 95% interval, its peak memory grows by more than MEMORY, its PSNR falls by more than
    PSNR_DB decibels, or its accuracy by more than ACCURACY.

    Raises:
        InputError: no row is in both. ModelError: results are none.
    """
    a, b = (report_of(results, "the results") for results in (before, after))
    worse: list[str] = []
    old = {_key(r): r for r in done(a.rows)}
    shared = [r for r in b.rows if _key(r) in old]
    if not shared:
        raise InputError(
            "the two files have no plan and engine in common at one size and number of steps;"
            " nothing to compare.",
            code="mismatch",
        )
    lines = [
        f"note: {d}; what follows compares that as well"
        for d in differences(a.fingerprint, b.fingerprint)
    ]
    for row in shared:
        was, title = old[_key(row)], f"{row.plan} on {row.engine}"
        if row.failed is not None:
            worse.append(f"{title}: failed ({row.failed})")
            continue
        ratio, low, high = ratio_interval(was.total_runs_ms, row.total_runs_ms)
        line = (
            f"{title}: {was.total_duration_ms:.1f} -> {row.total_duration_ms:.1f} ms,"
            f" {ratio:.3f}x [{low:.3f}, {high:.3f}]"
        )
        lines.append(line)
        if low > 1 + NOISE:
            worse.append(f"{line}: slower")
        worse += [f"{title}: {words}" for words in _losses(was, row)]
    gone = old.keys() - {_key(r) for r in b.rows}
    lines += [f"{k[0]} on {k[1]}: not in the second file" for k in old if k in gone]
    return lines, worse


def _losses(was: Row, row: Row) -> list[str]:
    """What of a row's memory and quality became worse."""
    losses = []
    for name in ("peak_host_bytes", "peak_device_bytes"):
        a, b = getattr(was, name), getattr(row, name)
        if a and b and b > a * (1 + MEMORY):
            losses.append(f"{name} {a / 1e6:.0f} -> {b / 1e6:.0f} MB")
    before, after = was.quality, row.quality
    a, b = before.psnr_db, after.psnr_db
    if b is not None and not after.identical and (a is None or b < a - PSNR_DB):
        known = "identical" if a is None else f"{a:.1f}"
        losses.append(f"PSNR to the reference {known} -> {b:.1f} dB")
    a, b = before.accuracy, after.accuracy
    if a is not None and b is not None and b < a - ACCURACY:
        losses.append(f"accuracy {a:.2f} -> {b:.2f}")
    return losses


def finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value
