"""The loop: from noise to clean latents along a plan.

Each step: (1) each generator that the plan names predicts a velocity; (2) guidance combines its
conditional and unconditional halves; (3) the velocities of the small and the large generator are
blended by frequency; (4) the solver advances the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.process import computes
from nexus_rt.core.tracing import span
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.engine import Engine
from nexus_rt.method.finite_check import FiniteCheck
from nexus_rt.method.generator import Pending, Prompt, make_generators
from nexus_rt.method.guidance import Guidance, Prediction, Velocity
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.plan import Plan
from nexus_rt.method.reuse import Reused
from nexus_rt.method.solver import make_solver
from nexus_rt.method.step import Step
from nexus_rt.method.upfb import combine
from nexus_rt.ops.block_ops import choose_ops

Predict = Callable[[Tensor, Step], Any]  # latents and a step to a velocity, or one that has begun


def denoise(
    latents: Tensor,
    plan: Plan,
    generators: Mapping[str, Predict],
    bridge: Callable[[Any, Any, Step], Any],
    solver: Callable[[Step, Tensor, Any], Tensor],
    hooks: Hooks | None = None,
) -> Tensor:
    """Walk a plan from noise to clean latents.

    Plain functions of tensors will do: `denoise(x, plan, {"small": f, "large": g}, bridge, euler)`
    is the method itself, and the oracle of `sample`.

    Args:
        latents: noise [B, C, T, H, W].
        generators: under "small" and "large", those that the plan runs; each takes latents and a
            step and gives its guided velocity there.
        bridge: takes both velocities (None where a generator does not run) and the step.
        solver: takes the step, the latents and the bridged velocity; gives the next latents.
        hooks: everything else that happens around a step.

    Returns:
        Clean latents; partly denoised if `hooks.should_finish` ended the walk.
    """
    hooks = hooks or Hooks()
    small, large = generators.get("small"), generators.get("large")
    for step in plan.steps:  # fixed before the first step
        if hooks.finished(step):
            break
        latents = hooks.before(step, latents)
        # step.w is the small generator's weight: it falls from 1 to 0 as the noise does. Before
        # the handoff it is 1 and the plan skips the large generator; after it, 0, and the small.
        v_small = small(latents, step) if step.small and small is not None else None
        v_large = large(latents, step) if step.large and large is not None else None
        # The blend averages two velocities and so loses energy; `step.energy` says which RMS it
        # is scaled back to. One velocity alone passes through.
        velocity = bridge(v_small, v_large, step)
        # On a GPU the velocity is more than a tensor: guidance and the energy's factor wait in
        # it until the solver's kernel reads every element anyway.
        latents = solver(step, latents, velocity)
        latents = hooks.after(step, latents)
    hooks.done()
    return latents


@dataclass(frozen=True)
class Bridge:
    """The blend of a step's velocities, or the lone one as it is.

    use_triton: one launch, guidance included; else PyTorch.
    """

    config: BlendConfig
    use_triton: bool

    def __call__(self, small: Pending | None, large: Pending | None, step: Step) -> Velocity:
        """Both have begun; the first one waited for is the small generator's."""
        v_small = None if small is None else small.result()
        v_large = None if large is None else large.result()
        if not step.blended:
            lone = v_small if v_large is None else v_large
            assert isinstance(lone, Prediction)  # every step runs a generator
            return Velocity(lone)
        with span("blend", step=step.index):
            return combine(
                v_small, v_large, step.w, self.config, step.energy, use_triton=self.use_triton
            )


@torch.no_grad()
def sample(
    latents: Tensor,
    plan: Plan,
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Prompt],
    guidance: Guidance = Guidance(),  # noqa: B008 (frozen)
    *,
    blend: BlendConfig = BlendConfig(),  # noqa: B008 (frozen)
    solver: str = "unipc",
    kernels: str = "auto",
    hooks: Hooks | None = None,
) -> Tensor:
    """`denoise` with engines: their prompts prepared once, predictions guided or reused, and the
    blend and the solver in kernels.

    Args:
        latents: noise [B, C, T, H, W]; computed in float32.
        engines, prompts: under "small" and "large", those that the plan runs; any objects with the
            engine protocol.
        guidance: scales of both generators, at steps where the plan sets none.
        solver: "unipc", "euler", or "lcm" (consistency sampling, new noise at every step).
        kernels: of the blend and the solver: "torch", "triton", or "auto" (triton on a GPU that can
            run it).

    Returns:
        Clean latents, float32 [B, C, T, H, W].

    Raises:
        InputError: a generator that the plan runs is missing, or has no negative embeddings while
            guided.
        NumericsError: a velocity is not finite; names the generator and the step. On a GPU it is
            raised at most two steps later, so that the GPU need not wait at every step.
        Cancelled: `hooks.should_stop` said so.
    """
    computes()
    plan = plan.walked_by(solver)
    use_triton = choose_ops(kernels, latents.device).name == "triton"
    check = FiniteCheck(engines)
    own = make_generators(plan, engines, prompts, guidance, latents.device, check)
    hooks = replace(hooks or Hooks(), generators=own, check=check)  # the caller's stay as they are
    if hooks.engines_stay:
        for step in plan.steps:  # engines that come and go prepare when they first run
            for name, generator in own.items():
                if getattr(step, name):
                    generator.prepare(step)
    steps = make_solver(solver, plan.grid, use_triton)

    def advance(step: Step, x: Tensor, velocity: Velocity) -> Tensor:
        with span("solver", step=step.index):
            return steps.step(step.index, x, velocity)

    running: dict[str, Predict] = {
        name: Reused(generator, plan, hooks.reuse_deviations)
        if any(step.reuses(name) for step in plan.steps)
        else generator
        for name, generator in own.items()
    }
    return denoise(latents.float(), plan, running, Bridge(blend, use_triton), advance, hooks)
