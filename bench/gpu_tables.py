"""What a run of the GPU suite says, as tables: every row of it, and what was wanted beside what was
measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

EXACT_PEERS = ("sdpa", "flash", "cudnn")


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(results: dict[str, Any]) -> str:
    """Every row of a run; what was wanted first."""
    lines = ["# " + results["run"].get("gpu", "CPU, dry: no speed here means anything"), ""]
    lines += [f"{k}: {v}  " for k, v in results["run"].items()]
    lines += ["", "## wanted", "", targets_table(results)]
    for part, rows in results.items():
        if part == "run":
            continue
        lines += ["", f"## {part}", ""]
        flat = {}
        for name, row in rows.items():
            if isinstance(row, dict) and "backends" in row:
                flat |= {
                    f"{name}: {b}{' (chosen)' if b == row['chosen'] else ''}": r
                    for b, r in row["backends"].items()
                }
            else:
                flat[name] = row
        lines += ["| | |", "|---|---|"]
        for name, row in flat.items():
            items = row.items() if isinstance(row, dict) else [("", row)]
            lines.append(f"| {name} | {', '.join(f'{k} {shown(v)}'.strip() for k, v in items)} |")
    return "\n".join(lines) + "\n"


def _number(results: dict[str, Any], *keys: str) -> float | None:
    """A figure of a run; None where its part did not run, failed or was refused."""
    at: Any = results
    for key in keys:
        at = at.get(key) if isinstance(at, dict) else None
    return at if isinstance(at, (int, float)) and not isinstance(at, bool) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _rows(results: dict[str, Any], part: str, start: str) -> list[str]:
    rows = results.get(part)
    return [n for n in rows if n.startswith(start)] if isinstance(rows, dict) else []


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
    for kernel in ("qk_norm_rope", "modulate gated residual", "modulate "):
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
    for name in _rows(results, "attention", "self"):
        backends = results["attention"][name]["backends"]
        peers = [backends[b]["ms"] for b in EXACT_PEERS if "ms" in backends.get(b, {})]
        best = min(peers, default=None)
        chosen = _number(backends, results["attention"][name]["chosen"], "ms")
        ours = [c["ms"] for b, c in backends.items() if b.split(",")[0] == "triton" and "ms" in c]
        eighth = [
            c["ms"] for b, c in backends.items() if b.split(",")[0] == "triton-fp8" and "ms" in c
        ]
        yield row(
            f"attention {name}: auto against the best of PyTorch's",
            "at least",
            1,
            _ratio(best, chosen),
            "x",
        )
        yield row(
            f"attention {name}: triton", "at least", 0.9, _ratio(best, min(ours, default=None)), "x"
        )
        yield row(
            f"attention {name}: triton-fp8",
            "at least",
            1.4,
            _ratio(best, min(eighth, default=None)),
            "x",
        )
    ours = [
        v
        for n in ("torch", "triton", "torch, blocks compiled")
        if (v := _number(results, "dit large", n, "ms"))
    ]
    theirs = [
        v
        for n in _rows(results, "dit large", "diffusers")
        if (v := _number(results, "dit large", n, "ms"))
    ]
    guided = _number(results, "pipeline", "costs", "large_guided")
    yield row("14B, a guided step in seconds", "at most", 4.6, _ratio(guided, 1000))
    ratio = _ratio(min(theirs, default=None), min(ours, default=None))
    yield row("14B, a forward against the best of diffusers'", "at least", 1.15, ratio, "x")
    for mode, most in (("resident", 1.10), ("prefetched", 1.25)):
        value = _number(results, "swap", mode, "first_over_median")
        yield row(f"the step after the swap over the median, {mode}", "at most", most, value)
        part = _number(results, "swap", mode, "planned_over_peak")
        off = None if part is None else 100 * abs(part - 1)
        yield row(f"peak memory off the plan, percent, {mode}", "at most", 5, off)
    rows = results.get("pipeline")
    for name in rows if isinstance(rows, dict) else ():
        off = _number(results, "pipeline", name, "prediction_error")
        if off is not None:
            yield row(f"plan {name}: price off its time, percent", "at most", 5, 100 * abs(off))


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
