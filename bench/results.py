"""Results as files: what made them, reading them back, and comparing two."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, ModelError, readable, shorten, shown
from nexus_rt.core.part_files import part_file
from nexus_rt.core.versions import versions
from nexus_rt.loading.experts import GeneratorSource, transformers_of
from nexus_rt.loading.source import folder_fingerprint
from nexus_rt.method.plan import engine_name

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
        gpu = torch.cuda.get_gpu(device)
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


MAX_RUNS = 10_000  # of a row: the interval of a ratio draws them 2,000 times
Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


class _Quality(msgspec.Struct):
    psnr_db: float | None = None
    identical: bool | None = None
    accuracy: float | None = None


class _Row(msgspec.Struct):
    """A row as far as two files are compared."""

    plan: str
    engine: str
    size: list[int]
    steps: int
    failed: str | None = None
    total_runs_ms: Annotated[list[Milliseconds], msgspec.Meta(max_length=MAX_RUNS)] = []
    total_duration_ms: Milliseconds | None = None
    quality: _Quality | None = None
    peak_host_bytes: float | None = None
    peak_device_bytes: float | None = None

    def __post_init__(self) -> None:
        if self.failed is None and (
            not self.total_runs_ms or None in (self.total_duration_ms, self.quality)
        ):
            raise ValueError(f"row {self.plan} on {self.engine} has neither times nor a failure")


class _Fingerprint(msgspec.Struct):
    hardware: dict[str, Any]
    versions: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    device: str = ""


class Results(msgspec.Struct):
    """A results file: what `bench compare` reads of it."""

    rows: list[_Row]
    fingerprint: _Fingerprint


def read(path: str | Path) -> dict[str, Any]:
    """A results file; errors as `read_as`."""
    results = read_as(Path(path), KIND, SCHEMA, "`nexus-rt bench --json`", "measure again")
    documents.check(results, Results, str(path), remedy="measure again")
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


def _key(row: dict[str, Any]) -> tuple:
    return row["plan"], row["engine"], tuple(row["size"]), row["steps"]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What two fingerprints differ in: machine, device, versions, weights."""
    differences = []
    for group, names in (
        ("hardware", ("processor", "gpu", "cores", "threads", "system")),
        ("versions", None),
        ("weights", None),
    ):
        a, b = before.get(group, {}), after.get(group, {})
        for name in names or sorted(a.keys() | b.keys()):
            if a.get(name) != b.get(name):
                kind = "weights of " if group == "weights" else ""
                differences.append(
                    f"{kind}{name} differs ({shorten(a.get(name), 60)} and"
                    f" {shorten(b.get(name), 60)})"
                )
    if before.get("device") != after.get("device"):
        differences.append(f"device differs ({before.get('device')} and {after.get('device')})")
    return differences


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Lines on every row both have, and the regressions among them.

    A row regresses where its median is slower by more than NOISE even at the near end of the
    ratio's 95% interval, its peak memory grows by more than MEMORY, its PSNR falls by more than
    PSNR_DB decibels, or its accuracy by more than ACCURACY.

    Raises:
        InputError: no row is in both.
    """
    lines, worse = [], []
    old = {_key(r): r for r in before["rows"] if r.get("failed") is None}
    shared = [r for r in after["rows"] if _key(r) in old]
    if not shared:
        raise InputError(
            "the two files have no plan and engine in common at one size and number of steps;"
            " nothing to compare.",
            code="mismatch",
        )
    lines += [
        f"note: {d}; what follows compares that as well"
        for d in differences(before["fingerprint"], after["fingerprint"])
    ]
    for row in shared:
        was, title = old[_key(row)], f"{row['plan']} on {row['engine']}"
        if row.get("failed") is not None:
            worse.append(f"{title}: failed ({row['failed']})")
            continue
        ratio, low, high = ratio_interval(was["total_runs_ms"], row["total_runs_ms"])
        line = (
            f"{title}: {was['total_duration_ms']:.1f} -> {row['total_duration_ms']:.1f} ms,"
            f" {ratio:.3f}x [{low:.3f}, {high:.3f}]"
        )
        lines.append(line)
        if low > 1 + NOISE:
            worse.append(f"{line}: slower")
        for name in ("peak_host_bytes", "peak_device_bytes"):
            a, b = was.get(name), row.get(name)
            if a and b and b > a * (1 + MEMORY):
                worse.append(f"{title}: {name} {a / 1e6:.0f} -> {b / 1e6:.0f} MB")
        a, b = was["quality"].get("psnr_db"), row["quality"].get("psnr_db")
        if b is not None and not row["quality"].get("identical") and (a is None or b < a - PSNR_DB):
            worse.append(
                f"{title}: PSNR to the reference {'identical' if a is None else f'{a:.1f}'} ->"
                f" {b:.1f} dB"
            )
        a, b = (r["quality"].get("accuracy") for r in (was, row))
        if a is not None and b is not None and b < a - ACCURACY:
            worse.append(f"{title}: accuracy {a:.2f} -> {b:.2f}")
    gone = [k for k in old if k not in {_key(r) for r in after["rows"]}]
    lines += [f"{k[0]} on {k[1]}: not in the second file" for k in gone]
    return lines, worse
