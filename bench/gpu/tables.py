"""What a run of the GPU suite says, as tables: every row of it, and what was wanted beside what was
measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nexus_rt.bench.gpu.attention import chosen, with_ratios

EXACT_PEERS = ("sdpa", "flash", "cudnn", "fa3")


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(results: dict[str, Any]) -> str:
    """Every row of a run; what was wanted first."""
    gpu = _machine(results).get("gpu")
    named = gpu if gpu and gpu != "none" else "CPU, dry: no speed here means anything"
    lines = [f"# {named}", ""]
    lines += [f"{k}: {v}  " for k, v in results["run"].items()]
    lines += ["", "## wanted", "", targets_table(results)]
    for part, rows in results.items():
        if part == "run":
            continue
        rows = with_ratios(rows) if part == "attention" else rows
        lines += ["", f"## {part}", "", "| | |", "|---|---|"]
        for name, row in rows.items():
            items = row.items() if isinstance(row, dict) else [("", row)]
            lines.append(f"| {name} | {', '.join(f'{k} {shown(v)}'.strip() for k, v in items)} |")
    return "\n".join(lines) + "\n"


def _machine(results: dict[str, Any]) -> dict[str, Any]:
    row = results.get("roofs", {}).get("machine", {})
    return row if isinstance(row, dict) else {}


def _number(results: dict[str, Any], *keys: str) -> float | None:
    """A figure of a run; None where its part did not run, failed or was refused."""
    at: Any = results
    for key in keys:
        at = at.get(key) if isinstance(at, dict) else None
    return at if isinstance(at, (int, float)) and not isinstance(at, bool) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _rows(results: dict[str, Any], part: str, start: str) -> list[str]:
    return [n for n in results.get(part, {}) if n.startswith(start)]


def _least(results: dict[str, Any], part: str, names: list[str], field: str) -> float | None:
    values = [v for n in names if (v := _number(results, part, n, field)) is not None]
    return min(values) if values and len(values) == len(names) else None


def targets(results: dict[str, Any]) -> Iterator[tuple[str, str, float | None, bool | None]]:
    """(figure, what was wanted, what was measured, whether it is met) of every figure that was
    promised; None: not measured."""

    def row(name: str, sign: str, wanted: float, value: float | None, unit: str = "") -> tuple:
        met = None if value is None else value >= wanted if sign == "at least" else value <= wanted
        return name, f"{sign} {wanted:g}{unit}", value, met

    for size in ("60x104", "90x160"):
        name = f"band_blend {size}"
        speed = _ratio(
            *(_number(results, "kernels", name, k) for k in ("eager_called_ms", "called_ms"))
        )
        yield row(f"{name}, against eager", "at least", 8, speed, "x")
        yield row(
            f"{name}, percent of the copy",
            "at least",
            80,
            _number(results, "kernels", name, "percent_of_roof"),
        )
    for kernel in (
        "qk_norm_rope",
        "modulate gated residual",
        "modulate ",
        "modulate_rows",
        "quantise_rows",
    ):
        names = [
            n for n in _rows(results, "kernels", kernel) if ("gated" in n) == ("gated" in kernel)
        ]
        least = _least(results, "kernels", names, "percent_of_roof")
        yield row(
            f"{kernel.strip()}, percent of the copy, the least of {len(names)}",
            "at least",
            85,
            least,
        )
    yield from _attention_targets(results, row)
    for name, kind, wanted in (
        ("in bf16", "guided", 5.0),
        ("with fp8 linear layers", "guided, fp8 linear", 4.0),
    ):
        guided = _number(results, "step large", kind, "ms")
        yield row(f"14B, a guided step {name}, seconds", "at most", wanted, _ratio(guided, 1000))
    for name, part in (("14B", "step large"), ("1.3B", "step small")):
        ours, theirs = (
            _number(results, part, kind, "ms") for kind in ("guided", "guided, diffusers")
        )
        ratio = _ratio(theirs, ours)
        yield row(f"{name}, a guided step against diffusers eager", "at least", 1.15, ratio, "x")
        best = [
            v
            for kind in ("guided", "guided, diffusers")
            if (v := _number(results, "compiled", f"{name} {kind}, blocks compiled", "ms"))
        ]
        ratio = _ratio(min(best, default=None), ours)
        yield row(f"{name}, a guided step against the best compiled", "at least", 1, ratio, "x")
    for part in ("step large", "step small"):
        for kind in ("guided", "guided, fp8 linear", "guided, fp8 linear and attention"):
            predicted = _number(results, part, kind, "predicted_ms", "total")
            if predicted is not None:
                ratio = _ratio(predicted, _number(results, part, kind, "ms"))
                off = None if ratio is None else 100 * abs(ratio - 1)
                yield row(f"{part}, {kind}: roofline off its time, percent", "at most", 15, off)
    for mode, most in (("resident", 1.10), ("prefetched", 1.25)):
        value = _number(results, "swap", mode, "first_over_median")
        yield row(f"the step after the swap over the median, {mode}", "at most", most, value)
        planned = _number(results, "swap", mode, "planned_over_peak")
        off = None if planned is None else 100 * abs(planned - 1)
        yield row(f"peak memory off the plan, percent, {mode}", "at most", 5, off)
    for name in results.get("pipeline", {}):
        off = _number(results, "pipeline", name, "prediction_error")
        if off is not None:
            yield row(f"plan {name}: price off its time, percent", "at most", 5, 100 * abs(off))


def _attention_targets(results: dict[str, Any], row: Any) -> Iterator[tuple]:
    rows = results.get("attention", {})
    for case in dict.fromkeys(n.rpartition(": ")[0] for n in rows if n.startswith("self")):
        own = {
            n.rpartition(": ")[2]: _number(results, "attention", n, "ms")
            for n in rows
            if n.startswith(f"{case}: ")
        }
        best = min((ms for n, ms in own.items() if n in EXACT_PEERS and ms), default=None)
        ran = {n: r for n, r in rows.items() if _number(results, "attention", n, "ms") is not None}
        taken = own.get(chosen(ran, case) or "")
        yield row(
            f"attention {case}: auto against the best of PyTorch's",
            "at least",
            1,
            _ratio(best, taken),
            "x",
        )
        for backend, wanted in (("triton", 0.9), ("triton-fp8", 1.4)):
            ms = [v for n, v in own.items() if n.split(",")[0] == backend and v]
            yield row(
                f"attention {case}: {backend}",
                "at least",
                wanted,
                _ratio(best, min(ms, default=None)),
                "x",
            )


def targets_table(results: dict[str, Any]) -> str:
    """Wanted beside measured, as markdown."""
    words = {None: "", True: "yes", False: "**no**"}
    lines = ["| figure | wanted | measured | met |", "|---|---|---|---|"]
    for name, wanted, value, met in targets(results):
        lines.append(
            f"| {name} | {wanted} | {'not measured' if value is None else shown(float(value))} |"
            f" {words[met]} |"
        )
    return "\n".join(lines)
