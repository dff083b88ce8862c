"""Attention in the GPU suite: every backend at Wan's shapes, self and cross, each one checked by
`decide` before it is timed."""

from __future__ import annotations

from functools import partial
from typing import Any

from nexus_rt.bench.gpu import estimates
from nexus_rt.bench.gpu.setting import figure
from nexus_rt.bench.gpu.units import Unit

KERNELS = {"triton": "attention", "triton-fp8": "attention_fp8"}
KEYS = (("self", None, False), ("cross 512", 512, False), ("cross biased", 40, True))


def cases(s: Any) -> dict[str, Any]:
    """Label -> case; self-attention of the large generator, which is what a step waits for,
    first."""
    from nexus_rt.ops.attention import Case

    out = {}
    for label, count, biased in KEYS:
        for name, config in reversed(s.configs.items()):
            keys = s.tokens if count is None else min(count, 8) if s.dry else count
            shape = config["num_attention_heads"], config["attention_head_dim"]
            out[f"{label} {name}"] = Case(1, s.tokens, keys, *shape, s.dtype, s.device, biased)
    return out


def units(s: Any) -> dict[str, Unit]:
    """A row a case and backend, and one a way of our kernels to load a tile: what `launch_config`
    should choose. The backends of the large generator's self-attention are headline rows."""
    from nexus_rt.kernels.attention_launch import TIMED
    from nexus_rt.ops.attention import ATTENTION_BACKENDS

    rows = {}
    for label, case in cases(s).items():
        for backend in sorted(ATTENTION_BACKENDS, key=_order):
            call = partial(_backend, s, case, backend)
            first = label == f"self {s.names[1]}"
            seconds = estimates.backend_s(s, backend) if first else 0.0
            rows[f"{label}: {backend}"] = Unit(call, 30.0, seconds)
        for backend in KERNELS:
            for loads in TIMED[1:]:
                call = partial(_loads, s, case, backend, loads)
                rows[f"{label}: {backend}, {loads}"] = Unit(call, 30.0)
    return rows


def _order(backend: str) -> int:
    """PyTorch's own first: what ours is held against must be there."""
    return 0 if backend not in KERNELS else 1


def _rates(s: Any, case: Any, backend: str, ms: float) -> dict:
    from nexus_rt.bench.work import attention_flops
    from nexus_rt.ops.attention import ATTENTION_BACKENDS

    flops = case.batch * attention_flops(case.queries, case.keys, case.heads * case.head_dim)
    exact = ATTENTION_BACKENDS[backend].exact
    rate = s.of_roof(ms, flops=flops, matmul="matmul_tflops" if exact else "fp8_matmul_tflops")
    return {**rate, "exact": exact}


def _backend(s: Any, case: Any, backend: str) -> dict:
    from nexus_rt.ops.attention import ATTENTION_BACKENDS, Trial

    if KERNELS.get(backend) in s.wrong:
        return {"why": "it is wrong: see correctness"}
    trial = Trial.of(case)
    found = trial.measure(backend)
    if "why" in found:
        return found
    ms = s.ms(lambda: ATTENTION_BACKENDS[backend].run(*trial.tensors), 5, 1)
    return {**found, **_rates(s, case, backend, ms)}


def _loads(s: Any, case: Any, backend: str, loads: str) -> dict:
    from nexus_rt.kernels.attention import attention
    from nexus_rt.kernels.attention_fp8 import attention_fp8

    if any(n.split()[0] == KERNELS[backend] and n.endswith(f", {loads}") for n in s.faults):
        return {"why": "it is wrong: see correctness"}
    shape = (case.batch, case.queries, case.heads, case.head_dim)
    q, (k, v) = s.random(*shape), (s.random(1, case.keys, *shape[2:]) for _ in range(2))
    bias = s.random(1, case.keys).float() if case.biased else None
    kernel = attention if backend == "triton" else attention_fp8
    try:
        ms = s.ms(lambda: kernel(q, k, v, bias, loads), 5, 1)
    except ValueError as error:  # not for these tensors
        return {"why": str(error)}
    return _rates(s, case, backend, ms)


def chosen(rows: dict[str, Any], case: str) -> str | None:
    """What "auto" stands for in a case: the fastest of the exact backends; None where none ran."""
    own = {
        label.rpartition(": ")[2]: row["ms"]
        for label, row in rows.items()
        if label.startswith(f"{case}: ") and row.get("exact") and "," not in label
    }
    return min(own, key=own.__getitem__) if own else None


def with_ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows with the share of the best exact backend's speed that each has."""
    best: dict[str, float] = {}
    for label, row in rows.items():
        case = label.rpartition(": ")[0]
        if row.get("exact") and "ms" in row:
            best[case] = min(row["ms"], best.get(case, row["ms"]))
    return {
        label: {**row, "of_best_exact": figure(best[case] / row["ms"])}
        if "ms" in row and (case := label.rpartition(": ")[0]) in best
        else row
        for label, row in rows.items()
    }
