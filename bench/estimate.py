"""What a preset costs where no machine at hand can hold it: weights, working memory and arithmetic,
counted on the meta device, and the least time that arithmetic takes at a given rate. Nothing is
run; the times are bounds, not predictions.
"""

from __future__ import annotations

from typing import Any

import torch

from nexus_rt.bench.presets import Need
from nexus_rt.bench.work import decode_flops, forward_flops
from nexus_rt.core.limits import Scale
from nexus_rt.core.size import ClipSize
from nexus_rt.core.timing import median_ms
from nexus_rt.method.plan import Plan, StepCosts


def matrix_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large matrix product here, TFLOP/s."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, device=device) / 1e9


def estimate(
    configs: dict[str, dict[str, Any]],
    need: Need,
    size: ClipSize,
    plans: list[Plan],
    scales: tuple[Scale, Scale],
    tflops: float,
) -> dict[str, Any]:
    """TFLOP by part, and the time each plan's denoising takes at least at `tflops`.

    A guided step is counted as two forwards of 512 tokens of text.
    """
    flops = {name: forward_flops(config, size) for name, config in configs.items()}
    ms = {name: count / tflops / 1e9 for name, count in flops.items()}
    costs = StepCosts.of_forwards(ms)
    vae = decode_flops(size)
    return {
        "estimated": True,
        "tflops": round(tflops, 3),
        "size": list(size),
        "weights_bytes": need.parts,
        "working_bytes": need.working,
        "free_bytes": need.free,
        "tflop": {
            **{f"{n} forward": round(c / 1e12, 4) for n, c in flops.items()},
            "vae": round(vae / 1e12, 4),
        },
        "rows": [
            {
                "plan": p.name,
                "steps": len(p),
                "denoise_ms_at_least": round(p.price(costs, *scales), 1),
            }
            for p in plans
        ],
        "vae_ms_at_least": round(vae / tflops / 1e9, 1),
    }
