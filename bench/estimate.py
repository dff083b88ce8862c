"""What a preset costs where no machine at hand can hold it: weights, working memory and arithmetic,
counted on the meta device, and the least time that arithmetic takes at a given rate. Nothing is
run; the times are bounds, not predictions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nexus_rt.bench.presets import Need
from nexus_rt.core.size import ClipSize
from nexus_rt.method.plan import Plan, StepCosts
from nexus_rt.models.decoder import decode_whole
from nexus_rt.models.wan import WanConfig, WanTransformer
from nexus_rt.models.wan_vae import WanVae
from nexus_rt.pipeline.costs import median_ms


def matrix_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large matrix product here, TFLOP/s."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, 5, 2, device.type == "cuda") / 1e9


@torch.no_grad()
def forward_flops(config: dict[str, Any], size: ClipSize, tokens: int = 512) -> int:
    """Multiplications and additions of one forward of one sample, counted operation by
    operation."""
    with torch.device("meta"):
        model = WanTransformer(WanConfig(**config)).use_kernels("torch", "sdpa").eval()
        t, h, w = size.latent
        latents = torch.empty(1, model.config.in_channels, t, h, w)
        context = model.prepare_context(
            torch.empty(1, tokens, model.config.text_dim), collapse=False
        )
        timestep = torch.empty(())
    with FlopCounterMode(display=False) as counter:
        model(latents, timestep, context)
    return counter.get_total_flops()


@torch.no_grad()
def decode_flops(size: ClipSize, config: dict[str, Any] | None = None) -> int:
    """Multiplications and additions of Wan's VAE decoding one clip; frame by frame they are as
    many."""
    with torch.device("meta"):
        vae = WanVae(config or {})
        z = torch.empty(1, vae.config.z_dim, *size.latent)
    with FlopCounterMode(display=False) as counter:
        decode_whole(vae, z)
    return counter.get_total_flops()


def estimate(
    configs: dict[str, dict[str, Any]],
    need: Need,
    size: ClipSize,
    plans: list[Plan],
    scales: tuple[float, float],
    tflops: float,
) -> dict[str, Any]:
    """TFLOP by part, and the time each plan's denoising takes at least at `tflops`.

    A guided step is counted as two forwards of 512 tokens of text.
    """
    flops = {name: forward_flops(config, size) for name, config in configs.items()}
    ms = {name: count / tflops / 1e9 for name, count in flops.items()}
    costs = StepCosts(
        **{
            f"{n}{g}": (2 if g else 1) * ms.get(n, 0.0)
            for n in ("small", "large")
            for g in ("", "_guided")
        }
    )
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
