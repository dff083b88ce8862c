"""Every kernel against float64, in the dtype of the run: what the GPU suite asks before it grants a
speed.

Oracles are written from the formulas, in float64 on the device of the run; an error may be twice
what eager PyTorch loses at the same precision. What a call on a Wan pair launches comes first, a
row a kernel and generator; a row of its own for every other case follows when the headline is made.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from nexus_rt.bench.gpu import estimates
from nexus_rt.bench.gpu.cases import Cases, attention_label, cases, key_counts, planes
from nexus_rt.bench.gpu.units import Unit


def units(setting: Any) -> dict[str, Unit]:
    """What a call on a Wan pair launches at 480p; headline rows."""
    known = cases(setting)
    rows = {
        label: {name: known[name] for name in names if name in known}
        for label, names in launched(setting).items()
    }
    return {
        label: Unit(partial(together, own), 60.0, estimates.compile_s(len(own)))
        for label, own in rows.items()
        if own
    }


def units_elsewhere(setting: Any) -> dict[str, Unit]:
    """Every other case: other ways to load, widths and planes, and tensors of more than 2^31
    elements."""
    first = {name for names in launched(setting).values() for name in names}
    return {name: Unit(call, 60.0) for name, call in cases(setting).items() if name not in first}


def launched(s: Any) -> dict[str, list[str]]:
    """Row -> its cases, of the kernels that a call launches: the large generator's in bfloat16 and
    in fp8, the small one's in bfloat16, the blend and the solver's step."""
    out: dict[str, list[str]] = {}
    for name in dict.fromkeys(reversed(s.names)):
        config = s.configs[name]
        heads, head_dim, inner = (
            config[key] for key in ("num_attention_heads", "attention_head_dim", "ffn_dim")
        )
        dim = heads * head_dim
        out[f"modulate {name}"] = [f"modulate {dim}", f"modulate stream {dim}"]
        out[f"qk_norm_rope {name}"] = [f"qk_norm_rope {which} {dim}" for which in "qk"]
        out[f"linear_gelu {name}"] = [f"linear_gelu {dim}"]
        kinds: dict[bool, list[str]] = {False: [], True: []}
        for keys, biased in key_counts(s):
            label = f"{attention_label(heads, head_dim, keys, biased)}, auto"
            kinds[biased].append(label)
            if not biased:
                kinds[biased].append(f"far {label}")
        if name == s.names[1]:
            out[f"attention {name} self"] = [f"attention {label}" for label in kinds[False]]
            out[f"attention {name} cross"] = [f"attention {label}" for label in kinds[True]]
            out[f"modulate_rows {name}"] = [f"modulate_rows {dim}"]
            out[f"quantise_rows {name}"] = [
                f"quantise_rows {dim}",
                f"quantise_rows GELU {inner}",
            ]
            out[f"attention_fp8 {name}"] = [f"attention_fp8 {label}" for label in kinds[False]]
        else:
            both = [*kinds[False], *kinds[True]]
            out[f"attention {name}"] = [f"attention {label}" for label in both]
    plane = "{}x{}".format(*planes(s, True)[0])
    out[f"band_blend {plane}"] = [f"band_blend {plane}", f"band_blend sums {plane}"]
    out[f"solver_step {plane}"] = [f"solver_step {plane}"]
    return out


def together(calls: Cases) -> dict[str, Any]:
    """One row of several cases: right where all are, with the figures of the worst of them."""
    rows = {name: call() for name, call in calls.items()}
    wrong = [name for name, row in rows.items() if not row["right"]]

    def badness(name: str) -> tuple[bool, float]:
        row = rows[name]
        error = float(row["error" if "error" in row else "relative_error"])
        return not row["right"], math.inf if math.isnan(error) else error

    worst = rows[max(rows, key=badness)]
    return {**worst, "cases": len(rows), **({"wrong": wrong} if wrong else {})}
