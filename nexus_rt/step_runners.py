"""What runs a step: each generator by itself, then the blend; and the check that all is
finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus_rt.devices import Reading, Readings, send
from nexus_rt.engines.experts import ExpertsEngine
from nexus_rt.engines.protocol import Diagnosable, Engine, Sharing, supports
from nexus_rt.errors import InputError, NumericsError
from nexus_rt.guidance import Guidance
from nexus_rt.plan import DIFFERENCE, VELOCITY, Plan, Step
from nexus_rt.reuse import Reused, ReuseError
from nexus_rt.tracing import span
from nexus_rt.upfb import BlendConfig, combine
from nexus_rt.velocity import Prediction, Velocity


@dataclass(frozen=True)
class Prompt:
    """A generator's prompt: embeddings [B, L, D], and those of the negative prompt (None where none
    is needed)."""

    conditional: Tensor
    unconditional: Tensor | None = None

    def batch(self, guided: bool) -> Tensor:
        """The embeddings of a step: [B, L, D], or [2 B, L, D] where it is guided, unconditional
        samples last."""
        if not guided:
            return self.conditional
        if self.unconditional is None:
            raise InputError(
                "a guided step needs negative prompt embeddings; pass them, or a guidance_scale"
                " of 1."
            )
        return torch.cat([self.conditional, self.unconditional])


@dataclass(frozen=True)
class CallbackResult:
    """What a callback goes on with: latents, and/or prompts by generator; None keeps what is."""

    latents: Tensor | None = None
    prompts: Mapping[str, Prompt] | None = None


FINITE_CHECK_LAG = 2  # steps that may be enqueued on a GPU before one is known to be finite


class FiniteCheck:
    """Whether every prediction is finite, without making a GPU wait: sums come to the host behind
    the steps that make them, and are looked at when they are there. On a CPU that is at once."""

    def __init__(self, generators: Mapping[str, Generator]) -> None:
        self.generators = generators
        self.readings = Readings()
        self.sums: deque[tuple[Reading, str, Step]] = deque()

    def add(self, raw: Tensor, name: str, step: Step) -> None:
        """Note a generator's prediction at a step."""
        self.sums.append((self.readings.start(raw.sum(dtype=torch.float32)), name, step))

    def settle(self, before: int, wait: bool = False) -> None:
        """Check the steps before an index: those whose sums are there, and in any case those that
        would be more than `FINITE_CHECK_LAG` steps late.

        wait: check all of them.

        Raises:
            NumericsError: names the generator, the step and, where its weights are at fault, the
                weights.
        """
        while self.sums and self.sums[0][2].index < before:
            total, name, step = self.sums[0]
            if not (wait or total.ready or step.index < before - FINITE_CHECK_LAG):
                return
            self.sums.popleft()
            if not math.isfinite(total.value()):
                self._refuse(name, step)

    def _refuse(self, name: str, step: Step) -> None:
        engine = self.generators[name].engine
        wider = "try a wider dtype (bfloat16 or float32) or a smaller guidance_scale."
        if not supports(engine, Diagnosable):  # exported, or another process's
            cause = f"its weights cannot be looked at here: check the checkpoint, or {wider}"
        elif bad := engine.not_finite():
            names = ", ".join(bad[:3])
            cause = f"its weights hold NaN or infinity in {names}: load an undamaged checkpoint."
        else:
            cause = f"its weights are finite: {wider}"
        raise NumericsError(
            f"the {name} generator's velocity is not finite at step {step.index} (timestep"
            f" {step.timestep}); {cause}"
        )


class Generator:
    """An engine and its prompt, which is prepared once for guided steps and once for plain ones,
    when first needed."""

    def __init__(
        self,
        name: str,
        engine: Engine | None,
        prompt: Prompt,
        guidance: Guidance,
        timesteps: Tensor,
    ) -> None:
        self.name, self.engine, self.prompt, self.guidance = name, engine, prompt, guidance
        self.timesteps = timesteps  # of all steps, on the device
        self.contexts: dict[bool, Any] = {}

    def scale(self, step: Step) -> float:
        """The guidance scale at a step; 1 is none."""
        return self.guidance.at(step, self.name)

    def context(self, step: Step, guided: bool | None = None) -> Any:
        """The prepared prompt that a step runs with; guided None: as its scale says."""
        guided = self.scale(step) != 1.0 if guided is None else guided
        if guided not in self.contexts:
            assert self.engine is not None  # `make_runner` has refused a plan without it
            with span("prepare", generator=self.name):
                self.contexts[guided] = self.engine.prepare(self.prompt.batch(guided))
        return self.contexts[guided]

    def predict(self, latents: Tensor, step: Step, guided: bool | None = None) -> Tensor:
        """The engine's raw prediction: [B, ...], or [2 B, ...] where the step is guided,
        unconditional samples last. guided False: the conditional one alone."""
        return self.share(self.compute(latents, step, guided), step)

    def share(self, raw: Tensor, step: Step) -> Tensor:
        """A prediction that may be another process's, once it is here."""
        engine, expert = self.engine, step.expert(self.name)
        if expert is not None and isinstance(engine, ExpertsEngine):
            engine = engine.experts[expert]
        return engine.share(raw) if isinstance(engine, Sharing) else raw

    def compute(self, latents: Tensor, step: Step, guided: bool | None = None) -> Tensor:
        """The prediction, or, where another process computes it, its place."""
        assert self.engine is not None
        timestep, context = self.timesteps[step.index], self.context(step, guided)
        with span(self.name, step=step.index):
            expert = step.expert(self.name)
            if expert is not None and isinstance(self.engine, ExpertsEngine):
                return self.engine.velocity_of(expert, latents, timestep, context)
            return self.engine.velocity(latents, timestep, context)


class SeparateGenerators:
    """Each generator that a step runs by itself, then the blend."""

    def __init__(
        self,
        plan: Plan,
        generators: Mapping[str, Generator],
        config: BlendConfig,
        fused: bool,
        errors: list[ReuseError] | None = None,
    ) -> None:
        self.plan, self.generators, self.config, self.fused = plan, generators, config, fused
        self.reused = {
            name: Reused(generator, plan, errors)
            for name, generator in generators.items()
            if any(step.reuses(name) for step in plan.steps)
        }

    def running(self, step: Step) -> list[Generator]:
        """The generators of a step, in the order small, large."""
        return [self.generators[name] for name in self.plan.generators if getattr(step, name)]

    def prepare(self, step: Step) -> None:
        """Prepare the prompts that a step runs with."""
        for generator in self.running(step):
            compute = step.compute(generator.name)
            if compute != VELOCITY:
                generator.context(step, False if compute == DIFFERENCE else None)

    def velocity(self, latents: Tensor, step: Step, finite: FiniteCheck) -> Velocity:
        """A step's velocity: guided where its generators are, blended where it blends."""
        predictions: dict[str, Prediction] = {}
        running = self.running(step)
        # all that this process computes, before it waits for another
        raws = {g.name: g.compute(latents, step) for g in running if g.name not in self.reused}
        for generator in running:
            name = generator.name
            if name in self.reused:
                predictions[name] = self.reused[name].predict(latents, step, finite)
                continue
            raw = generator.share(raws[name], step)
            finite.add(raw, name, step)
            predictions[name] = Prediction.of(raw, generator.scale(step))
        if not step.blended:
            (lone,) = predictions.values()
            return Velocity(lone)
        with span("blend", step=step.index):
            small, large = predictions.get("small"), predictions.get("large")
            return combine(small, large, step.w, self.config, step.energy, self.fused)


class Runner:
    """A plan's steps."""

    def __init__(self, plan: Plan, separate: SeparateGenerators) -> None:
        self.plan, self.separate, self.generators = plan, separate, separate.generators

    def prepare(self) -> None:
        """Prepare every prompt that the plan will need."""
        for step in self.plan.steps:
            self.separate.prepare(step)

    def velocity(self, latents: Tensor, step: Step, finite: FiniteCheck) -> Velocity:
        """A step's velocity, its predictions noted for the check."""
        return self.separate.velocity(latents, step, finite)

    def change_prompts(self, prompts: Mapping[str, Prompt]) -> None:
        """Other prompts from the next step on."""
        for name in prompts.keys() & self.generators.keys():
            self.generators[name].prompt = prompts[name]
            self.generators[name].contexts = {}


def make_runner(
    plan: Plan,
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Prompt],
    guidance: Guidance,
    config: BlendConfig,
    latents: Tensor,
    fused: bool,
    errors: list[ReuseError] | None = None,
) -> Runner:
    """What runs a plan's steps. errors: where those of reused steps are added, by computing them as
    well.

    Raises:
        InputError: a generator that the plan runs has no engine, no prompt, or no negative prompt
            where it is guided.
    """
    generators: dict[str, Generator] = {}
    timesteps = send(torch.tensor([float(step.timestep) for step in plan.steps]), latents.device)
    for name in plan.generators:
        if name not in prompts:
            raise _absent(plan, name)
        generators[name] = Generator(name, engines.get(name), prompts[name], guidance, timesteps)
        scales = [guidance.at(step, name) for step in plan.steps if getattr(step, name)]
        if prompts[name].unconditional is None and any(s != 1.0 for s in scales):
            raise InputError(
                f"the {name} generator is guided (scale {max(s for s in scales if s != 1.0):g}) but"
                " has no negative prompt embeddings; pass them, or a guidance_scale of 1."
            )
    separate = SeparateGenerators(plan, generators, config, fused, errors)
    for step in plan.steps:
        for generator in separate.running(step):
            if generator.engine is None:
                raise _absent(plan, generator.name)
    return Runner(plan, separate)


def _absent(plan: Plan, name: str) -> InputError:
    return InputError(
        f"plan {plan.name!r} runs the {name} generator; pass its engine and its prompt, or plan"
        " without it."
    )
