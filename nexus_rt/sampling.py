"""The loop: from noise to clean latents along a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from nexus_rt.block_ops import choose_ops
from nexus_rt.engines.protocol import Engine
from nexus_rt.errors import Cancelled
from nexus_rt.guidance import GUIDANCE_SCALE, Guidance
from nexus_rt.latents import Generators, renoise
from nexus_rt.memory.residency import Residency
from nexus_rt.plan import Plan, Scale, Step
from nexus_rt.process import computes
from nexus_rt.reuse import ReuseError
from nexus_rt.solver import make_solver
from nexus_rt.step_runners import CallbackResult, FiniteCheck, Prompt, make_runner
from nexus_rt.tracing import span
from nexus_rt.upfb import BlendConfig


def denoise(
    latents: Tensor,
    plan: Plan,
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Prompt],
    *,
    guidance_scale: Scale = GUIDANCE_SCALE,
    guidance_scale_2: Scale | None = None,
    blend_config: BlendConfig = BlendConfig(),  # noqa: B008 (frozen)
    solver: str = "unipc",
    kernels: str = "auto",
    residency: Residency | None = None,
    generator: Generators = None,
    reuse_errors: list[ReuseError] | None = None,
    on_step: Callable[[Step, Tensor], Tensor | CallbackResult | None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    should_finish: Callable[[], bool] | None = None,
) -> Tensor:
    """Walk a plan from noise to clean latents.

    Args:
        latents: noise [B, C, T, H, W]; computed in float32.
        plan: made for the same number of steps the solver walks.
        engines, prompts: under "small" and "large", those the plan runs; any objects with the
            engine protocol.
        guidance_scale, guidance_scale_2: of the small and the large generator (the latter None: the
            same), where the plan sets none; 1 means no guidance, one forward instead of two. Two
            numbers are of the two experts of a generator.
        kernels: of the blend and the solver: "torch", "triton", or "auto" (triton on a GPU that can
            run it).
        residency: moves the engines between memories as the plan goes on; None: they are where they
            run, or load first.
        solver: "unipc", "euler", or "lcm" (consistency sampling, new noise at every step).
        generator: draws the noise of a plan that re-noises.
        reuse_errors: gets the error of every step at which a generator is reused, which is then
            computed as well (`nexus_rt.reuse`).
        on_step: called after every step with it and the new latents; may return latents to go on
            with, or a `CallbackResult`.
        should_stop, should_finish: asked before every step; the first ends in `Cancelled`, the
            second in the latents as they are.

    Returns:
        Clean latents, float32 [B, C, T, H, W].

    Raises:
        InputError: a generator the plan runs is missing, or has no negative embeddings while
            guided.
        NumericsError: a velocity is not finite; names the generator and the step. On a GPU it is
            raised at most two steps later, as nothing waits for it.
        Cancelled: `should_stop` said so.
    """
    computes()
    plan = plan.walked_by(solver)
    guidance = Guidance.of(guidance_scale, guidance_scale_2)
    fused = choose_ops(kernels, latents.device).name == "triton"
    runner = make_runner(
        plan, engines, prompts, guidance, blend_config, latents, fused, reuse_errors
    )
    solve, finite = make_solver(solver, plan.grid, fused), FiniteCheck(runner.generators)
    latents = latents.float()
    if residency is None or residency.plan.stays:
        runner.prepare()  # engines that come and go prepare their prompts when they first run
    for step in plan.steps:
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before step {step.index} of {len(plan)}, as asked.")
        if should_finish is not None and should_finish():
            break
        if residency is not None:
            residency.enter(step.index)
        if step.renoise:
            latents = renoise(latents, step.sigma, generator)
        # of the plan's generators, guided and blended
        velocity = runner.velocity(latents, step, finite)
        with span("solver", step=step.index):
            latents = solve.step(step.index, latents, velocity)
        finite.settle(step.index + 1)
        if on_step is not None and (change := on_step(step, latents)) is not None:
            change = change if isinstance(change, CallbackResult) else CallbackResult(change)
            latents = latents if change.latents is None else change.latents.float()
            runner.change_prompts(change.prompts or {})
    finite.settle(len(plan), wait=True)
    return latents
