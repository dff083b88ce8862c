"""The loop: a plan, the engines it names, the blend, the solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus_rt.engines.base import Engine
from nexus_rt.engines.residency import Residency
from nexus_rt.engines.step import StepEngine
from nexus_rt.errors import Cancelled, InputError, NumericsError
from nexus_rt.ops import choose_ops
from nexus_rt.plan import Plan, Step
from nexus_rt.solver import make_solver
from nexus_rt.tracing import span
from nexus_rt.upfb import BlendConfig, combine, step_inputs
from nexus_rt.velocity import Prediction, Velocity

# The paper's code writes v_c + s (v_c - v_u) with s = 5.0; in diffusers' meaning that is g = s + 1 = 6.0.
GUIDANCE_SCALE = 6.0


@dataclass(frozen=True)
class Prompt:
    """What a generator is told: embeddings [B, L, D], and those of the negative prompt (None where none is needed)."""

    conditional: Tensor
    unconditional: Tensor | None = None


@dataclass(frozen=True)
class Change:
    """What a callback goes on with: latents, and/or prompts by generator; None keeps what is."""

    latents: Tensor | None = None
    prompts: Mapping[str, Prompt] | None = None


class Generator:
    """An engine with the contexts a plan needs of it, each prepared once: before the first step, or where engines come and
    go when it is first needed."""

    def __init__(self, name: str, engine: Engine | None, prompt: Prompt, plan: Plan, guidance_scale: float) -> None:
        self.name, self.engine, self.prompt, self.default = name, engine, prompt, guidance_scale
        guided = [s for step in plan.steps if getattr(step, name) and (s := self.scale(step)) != 1.0]
        if guided and prompt.unconditional is None:
            raise InputError(
                f"the {name} generator is guided (scale {max(guided):g}) but has no negative prompt embeddings; "
                "pass them, or a guidance_scale of 1."
            )
        self.contexts: dict[bool, Any] = {}

    def context(self, guided: bool) -> Any:
        if guided not in self.contexts:
            p = self.prompt
            told = torch.cat([p.conditional, p.unconditional]) if guided else p.conditional
            with span("prepare", generator=self.name):
                self.contexts[guided] = self.engine.prepare(told)
        return self.contexts[guided]

    def tell(self, prompt: Prompt) -> None:
        """Another prompt from the next step on."""
        self.prompt, self.contexts = prompt, {}

    def scale(self, step: Step) -> float:
        own = step.guidance_small if self.name == "small" else step.guidance_large
        return float(self.default if own is None else own)

    def predict(self, latents: Tensor, step: Step) -> Tensor:
        """The engine's raw prediction at a step: [B, ...], or [2 B, ...] where it is guided, unconditional samples last."""
        timestep = torch.tensor(float(step.timestep), device=latents.device)
        context = self.context(self.scale(step) != 1.0)
        with span(self.name, step=step.index):
            return self.engine.velocity(latents, timestep, context)


class Together:
    """An engine that holds both generators, guidance and blend, for the steps it can take: both run, both are guided, and
    the split's filter is separable."""

    def __init__(
        self, engine: StepEngine | None, generators: Mapping[str, Generator], config: BlendConfig, like: Tensor
    ) -> None:
        self.engine, self.generators, self.config, self.like = engine, generators, config, like
        self.contexts: dict[str, Any] = {}

    def inputs(self, step: Step) -> dict[str, Tensor] | None:
        """What the engine is told of a step; None where it cannot take it."""
        if self.engine is None or not (step.blended and step.small and step.large):
            return None
        scales = tuple(self.generators[n].scale(step) for n in ("small", "large"))
        return None if 1.0 in scales else step_inputs(step.w, self.config, step.energy, scales, self.like)

    def prepare(self) -> None:
        """Prepare both prompts, once."""
        for name, g in self.generators.items() if not self.contexts else ():
            told = torch.cat([g.prompt.conditional, g.prompt.unconditional])
            with span("prepare", generator=name):
                self.contexts[name] = self.engine.prepare(name, told)

    def predict(self, latents: Tensor, step: Step, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The blended velocity, and the RMS of both guided ones [2, B]."""
        self.prepare()
        timestep = torch.tensor(float(step.timestep), device=latents.device)
        with span("fused step", step=step.index):
            return self.engine.step(latents, timestep, self.contexts, inputs)


class Watch:
    """Whether predictions are finite, asked without making a GPU wait: a step's sums are read when the next is queued."""

    def __init__(self, generators: Mapping[str, Generator]) -> None:
        self.generators = generators
        self.sums: list[tuple[Tensor, str, Step]] = []

    def add(self, raw: Tensor, name: str, step: Step) -> None:
        self.sums.append((raw.sum(dtype=torch.float32), name, step))

    def settle(self, before: int) -> None:
        """Check the steps before an index.

        Raises:
            NumericsError: names the generator, the step and, where its weights are at fault, the weights.
        """
        while self.sums and self.sums[0][2].index < before:
            total, name, step = self.sums.pop(0)
            if math.isfinite(float(total)):
                continue
            engine = self.generators[name].engine
            bad = engine.not_finite() if hasattr(engine, "not_finite") else []
            cause = (
                f"its weights hold NaN or infinity in {', '.join(bad[:3])}: load an undamaged checkpoint."
                if bad
                else "its weights are finite: try a wider dtype (bfloat16 or float32) or a smaller guidance_scale."
            )
            raise NumericsError(
                f"the {name} generator's velocity is not finite at step {step.index} (timestep {step.timestep}); {cause}"
            )


def predict(
    generators: Mapping[str, Generator], latents: Tensor, step: Step, config: BlendConfig, watch: Watch, fused: bool
) -> Velocity:  # fmt: skip
    """A step's velocity from the generators it runs, blended where it blends."""
    said = {}
    for name in ("small", "large"):
        if getattr(step, name):
            raw = generators[name].predict(latents, step)
            watch.add(raw, name, step)
            said[name] = Prediction.of(raw, generators[name].scale(step))
    if step.blended:
        with span("blend", step=step.index):
            return combine(said.get("small"), said.get("large"), step.w, config, step.energy, fused)
    return Velocity(*said.values())


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
    kernels: str = "auto",
    residency: Residency | None = None,
    step_engine: StepEngine | None = None,
    on_step: Callable[[Step, Tensor], Tensor | Change | None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    should_finish: Callable[[], bool] | None = None,
) -> Tensor:
    """Walk a plan from noise to clean latents.

    Args:
        latents: noise [B, C, T, H, W]; computed in float32.
        plan: made for the same number of steps the solver walks.
        engines, prompts: under "small" and "large", those the plan runs; any objects with the engine protocol.
        guidance_scale, guidance_scale_2: of the small and the large generator (the latter None: the same), where the
            plan sets none; 1 means no guidance, one forward instead of two.
        kernels: of the blend and the solver: "torch", "triton", or "auto" (triton on a GPU that can run it).
        residency: moves the engines between memories as the plan goes on; None: they are where they run, or load first.
        step_engine: both generators, guidance and blend in one graph, for the steps it can take (`Together`).
        on_step: called after every step with it and the new latents; may return latents to go on with, or a `Change`.
        should_stop, should_finish: asked before every step; the first ends in `Cancelled`, the second in the latents as
            they are.

    Returns:
        Clean latents, float32 [B, C, T, H, W].

    Raises:
        InputError: a generator the plan runs is missing, or has no negative embeddings while guided.
        NumericsError: a velocity is not finite; names the generator and the step.
        Cancelled: `should_stop` said so.
    """
    scales = {"small": guidance_scale, "large": guidance_scale if guidance_scale_2 is None else guidance_scale_2}
    absent = [name for name in plan.generators if name not in prompts]
    if not absent:
        generators = {n: Generator(n, engines.get(n), prompts[n], plan, scales[n]) for n in plan.generators}
        together = Together(step_engine, generators, blend_config, latents)
        alone = {n for s in plan.steps if together.inputs(s) is None for n in plan.generators if getattr(s, n)}
        absent = sorted(alone - engines.keys())
    if absent:
        raise InputError(
            f"plan {plan.name!r} runs the {absent[0]} generator; pass its engine and its prompt, or plan without it."
        )
    fused = choose_ops(kernels, latents.device).name == "triton"
    solve, watch = make_solver(solver, plan.grid, fused), Watch(generators)
    latents = latents.float()
    stays = residency is None or residency.plan.stays  # then what is here is made ready before the first step
    for step in plan.steps if stays else ():
        if together.inputs(step) is not None:
            together.prepare()
            continue
        for name in (n for n in plan.generators if getattr(step, n)):
            generators[name].context(generators[name].scale(step) != 1.0)
    for step in plan.steps:
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before step {step.index} of {len(plan)}, as asked.")
        if should_finish is not None and should_finish():
            break
        if residency is not None:
            with span("swap", step=step.index):
                residency.enter(step.index)
        if (inputs := together.inputs(step)) is not None:
            velocity, sizes = together.predict(latents, step, inputs)
            for raw, name in zip(sizes, ("small", "large"), strict=True):
                watch.add(raw, name, step)
        else:
            velocity = predict(generators, latents, step, blend_config, watch, fused)
        with span("solver", step=step.index):
            latents = solve.step(step.index, latents, velocity)
        watch.settle(step.index + (latents.device.type != "cuda"))
        if on_step is not None:
            answer = on_step(step, latents)
            change = answer if isinstance(answer, Change) else Change(answer)
            latents = latents if change.latents is None else change.latents.float()
            for name in (change.prompts or {}).keys() & generators.keys():
                generators[name].tell(change.prompts[name])
                together.contexts = {}
    watch.settle(len(plan))
    return latents
