"""The loop: a plan, the engines it names, the blend, the solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus_rt.engines.base import Engine
from nexus_rt.errors import Cancelled, InputError, NumericsError
from nexus_rt.plan import Plan, Step
from nexus_rt.solver import make_solver
from nexus_rt.upfb import BlendConfig, blend, guide

# The paper's code writes v_c + s (v_c - v_u) with s = 5.0; in diffusers' meaning that is g = s + 1 = 6.0.
GUIDANCE_SCALE = 6.0


@dataclass(frozen=True)
class Prompt:
    """What a generator is told: embeddings [B, L, D], and those of the negative prompt (None where none is needed)."""

    conditional: Tensor
    unconditional: Tensor | None = None


class Generator:
    """An engine with the contexts a plan needs of it, prepared once."""

    def __init__(self, name: str, engine: Engine, prompt: Prompt, plan: Plan, guidance_scale: float) -> None:
        self.name, self.engine, self.default = name, engine, guidance_scale
        scales = {self.scale(step) for step in plan.steps if getattr(step, name)}
        self.contexts: dict[bool, Any] = {}
        if any(s != 1.0 for s in scales):
            if prompt.unconditional is None:
                raise InputError(
                    f"the {name} generator is guided (scale {max(scales):g}) but has no negative prompt embeddings; "
                    "pass them, or a guidance_scale of 1."
                )
            self.contexts[True] = engine.prepare(torch.cat([prompt.conditional, prompt.unconditional]))
        if 1.0 in scales:
            self.contexts[False] = engine.prepare(prompt.conditional)

    def scale(self, step: Step) -> float:
        own = step.guidance_small if self.name == "small" else step.guidance_large
        return float(self.default if own is None else own)

    def velocity(self, latents: Tensor, step: Step) -> Tensor:
        """The guided velocity at a step, float32 [B, C, T, H, W]."""
        scale = self.scale(step)
        timestep = torch.tensor(float(step.timestep), device=latents.device)
        raw = self.engine.velocity(latents, timestep, self.contexts[scale != 1.0])
        v = guide(*raw.chunk(2), scale) if scale != 1.0 else guide(raw, None, 1.0)
        if not math.isfinite(float(v.sum())):
            bad = self.engine.not_finite() if hasattr(self.engine, "not_finite") else []
            cause = (
                f"its weights hold NaN or infinity in {', '.join(bad[:3])}: load an undamaged checkpoint."
                if bad
                else "its weights are finite: try a wider dtype (bfloat16 or float32) or a smaller guidance_scale."
            )
            raise NumericsError(
                f"the {self.name} generator's velocity is not finite at step {step.index} (timestep {step.timestep}); {cause}"
            )
        return v


def denoise(
    latents: Tensor,
    plan: Plan,
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Prompt],
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    guidance_scale_2: float | None = None,
    blend_config: BlendConfig = BlendConfig(),  # noqa: B008 (frozen)
    solver: str = "unipc",
    on_step: Callable[[Step, Tensor], Tensor | None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Walk a plan from noise to clean latents.

    Args:
        latents: noise [B, C, T, H, W]; computed in float32.
        plan: made for the same number of steps the solver walks.
        engines, prompts: under "small" and "large", those the plan runs; any objects with the engine protocol.
        guidance_scale, guidance_scale_2: of the small and the large generator (the latter None: the same), where the
            plan sets none; 1 means no guidance, one forward instead of two.
        on_step: called after every step with it and the new latents; may return latents to go on with.
        should_stop: asked before every step.

    Returns:
        Clean latents, float32 [B, C, T, H, W].

    Raises:
        InputError: a generator the plan runs is missing, or has no negative embeddings while guided.
        NumericsError: a velocity is not finite; names the generator and the step.
        Cancelled: `should_stop` said so.
    """
    scales = {"small": guidance_scale, "large": guidance_scale if guidance_scale_2 is None else guidance_scale_2}
    for name in plan.generators:
        if name not in engines or name not in prompts:
            raise InputError(
                f"plan {plan.name!r} runs the {name} generator; pass its engine and its prompt, or plan without it."
            )
    generators = {n: Generator(n, engines[n], prompts[n], plan, scales[n]) for n in plan.generators}
    solve = make_solver(solver, plan.grid)
    latents = latents.float()
    for step in plan.steps:
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before step {step.index} of {len(plan)}, as asked.")
        small = generators["small"].velocity(latents, step) if step.small else None
        large = generators["large"].velocity(latents, step) if step.large else None
        if step.blended:
            velocity = blend(small, large, step.w, blend_config, step.energy)
        else:
            velocity = small if large is None else large
        latents = solve.step(step.index, latents, velocity)
        if on_step is not None:
            replaced = on_step(step, latents)
            latents = latents if replaced is None else replaced.float()
    return latents
