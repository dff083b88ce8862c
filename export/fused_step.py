"""A whole step in one graph: both generators, their guidance, and the blend, as plain products.

step:  latents [B, C, T, H, W], timestep [],
       keys, values, bias of each generator (batch 2 B, unconditional samples last),
       scalars [10], left [H, H], right [W, W]
       -> velocity [B, C, T, H, W], rms [2, B] of the guided velocities

Scalars and matrices are `nexus_rt.upfb.step_inputs` of a step, so one graph serves every step of a
plan and every split whose filter is separable: gaussian, and fft and dct with the Gaussian
low-pass. The prompts' parts are graphs of their own, "context_small" and "context_large".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexus_rt.export.dynamic_shapes import Shape, Symbols, Traced
from nexus_rt.export.graph import (
    ContextGraph,
    VelocityGraph,
    context_shapes,
    rope_in_graphs,
    traced,
    velocity_shapes,
)
from nexus_rt.kernels.formulas import EPS, guide, target_energy
from nexus_rt.models.wan import WanTransformer
from nexus_rt.size import ClipSize
from nexus_rt.upfb import STEP_SCALARS

NAMES = ("small", "large")


class StepGraph(nn.Module):
    """Both generators, guided and blended."""

    def __init__(self, models: dict[str, WanTransformer]) -> None:
        super().__init__()
        self.generators = nn.ModuleDict({name: VelocityGraph(models[name]) for name in NAMES})

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        keys_small: Tensor,
        values_small: Tensor,
        bias_small: Tensor,
        keys_large: Tensor,
        values_large: Tensor,
        bias_large: Tensor,
        scalars: Tensor,
        left: Tensor,
        right: Tensor,
    ) -> tuple[Tensor, Tensor]:
        both = torch.cat([latents, latents])
        contexts = {
            "small": (keys_small, values_small, bias_small),
            "large": (keys_large, values_large, bias_large),
        }
        s = dict(zip(STEP_SCALARS, scalars.unbind(0), strict=True))
        guided = {}
        for name in NAMES:
            raw = self.generators[name](both, timestep, *contexts[name])
            conditional, unconditional = raw[: latents.shape[0]], raw[latents.shape[0] :]
            guided[name] = guide(conditional, unconditional, s[f"guidance_{name}"])
        small, large = guided["small"], guided["large"]
        x = small - s["minus_large"] * large
        u = s["large"] * large + s["keep"] * x + s["low"] * (left @ x @ right)
        size = lambda v: v.square().mean((1, 2, 3, 4)).sqrt()
        rms_small, rms_large = size(small), size(large)
        wanted = s["rms_reference"] * target_energy(rms_small, rms_large, 1.0, "reference")
        wanted = wanted + s["rms_small"] * rms_small + s["rms_large"] * rms_large
        factor = s["as_is"] + (1 - s["as_is"]) * wanted / (size(u) + EPS)
        return u * factor.view(-1, 1, 1, 1, 1), torch.stack([rms_small, rms_large])


@torch.no_grad()
def trace_step(models: dict[str, WanTransformer], buckets: list[ClipSize]) -> dict[str, Traced]:
    """The step's graph and both contexts', for one size, or for the range that several span."""
    symbols = Symbols(buckets)
    some = models["small"]
    shapes: dict[str, Shape] = {k: velocity_shapes(some)[k] for k in ("latents", "timestep")}
    for name in NAMES:
        own = velocity_shapes(models[name], "2*batch")
        shapes |= {f"{k}_{name}": own[k] for k in ("keys", "values", "bias")}
    # each prompt has a length of its own
    shapes |= {
        k: tuple("tokens_small" if d == "tokens" else d for d in v)
        for k, v in shapes.items()
        if k.endswith("_small")
    }
    shapes |= {
        "scalars": (len(STEP_SCALARS),),
        "left": ("2*rows", "2*rows"),
        "right": ("2*columns", "2*columns"),
    }
    half = {f"{k}_{name}": models[name].dtype for name in NAMES for k in ("keys", "values")}
    with rope_in_graphs(*models.values()):
        graphs = {
            f"context_{name}": traced(
                ContextGraph(m),
                context_shapes(m),
                ("keys", "values"),
                symbols,
                m.device,
                {"embeds": m.dtype},
            )
            for name, m in models.items()
        }
        graphs["step"] = traced(
            StepGraph(models), shapes, ("velocity", "rms"), symbols, some.device, half
        )
    return graphs
