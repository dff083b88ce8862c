"""A generator during one call: its prompt, prepared once, and its guided predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.devices import send
from nexus_rt.core.errors import InputError
from nexus_rt.core.tracing import span
from nexus_rt.method.engine import Engine, Experts, Sharing
from nexus_rt.method.finite_check import FiniteCheck
from nexus_rt.method.guidance import Guidance, Prediction
from nexus_rt.method.plan import Plan
from nexus_rt.method.step import DIFFERENCE, VELOCITY, Step


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
                " of 1.",
                code="missing",
                param="negative_prompt_embeds",
            )
        return torch.cat([self.conditional, self.unconditional])


@dataclass(frozen=True)
class Pending:
    """A prediction that has begun, here or in another process."""

    finish: Callable[[], Prediction]

    def result(self) -> Prediction:
        """The prediction, once it is here."""
        return self.finish()


class Generator:
    """An engine and its prompt, which is prepared once for guided steps and once for plain ones,
    when first needed.

    Calling it begins its prediction at a step, so that both generators of a step compute before
    either is waited for.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        prompt: Prompt,
        guidance: Guidance,
        timesteps: Tensor,
        check: FiniteCheck,
    ) -> None:
        self.name, self.engine, self.prompt, self.guidance = name, engine, prompt, guidance
        self.timesteps, self.check = timesteps, check  # timesteps: of all steps, on the device
        self.contexts: dict[tuple[bool, str | None], Any] = {}  # by guidance and expert

    def __call__(self, latents: Tensor, step: Step) -> Pending:
        """Begin the prediction at a step, guided where its scale says so."""
        raw = self.compute(latents, step, self.guided(step))
        return Pending(lambda: Prediction.of(self.gather(raw, step), self.scale(step)))

    def scale(self, step: Step) -> float:
        """The guidance scale at a step; 1 is none."""
        return self.guidance.at(step, self.name)

    def guided(self, step: Step) -> bool:
        """Whether the unconditional samples run too."""
        return self.scale(step) != 1.0

    def prepare(self, step: Step) -> None:
        """Prepare the prompt that a step runs with."""
        compute = step.compute(self.name)
        if compute != VELOCITY:
            self.context(step, self.guided(step) and compute != DIFFERENCE)

    def engine_of(self, step: Step) -> Engine:
        """The engine that a step runs: of a generator of experts, the one that the plan names."""
        expert = step.expert(self.name)
        if expert is not None and isinstance(self.engine, Experts):
            return self.engine.experts[expert]
        return self.engine

    def context(self, step: Step, guided: bool) -> Any:
        """The prompt as the engine of a step prepares it, for guided steps or for plain ones."""
        key = guided, step.expert(self.name)
        if key not in self.contexts:
            with span("prepare", generator=self.name):
                self.contexts[key] = self.engine_of(step).prepare(self.prompt.batch(guided))
        return self.contexts[key]

    def change_prompt(self, prompt: Prompt) -> None:
        """Another prompt from the next step on."""
        self.prompt, self.contexts = prompt, {}

    def compute(self, latents: Tensor, step: Step, guided: bool) -> Tensor:
        """Start the raw prediction: [B, ...], or [2 B, ...] where it is guided, unconditional
        samples last. If another process computes it, an empty tensor that `gather` fills."""
        timestep, context = self.timesteps[step.index], self.context(step, guided)
        with span(self.name, step=step.index):
            return self.engine_of(step).velocity(latents, timestep, context)

    def gather(self, raw: Tensor, step: Step) -> Tensor:
        """What `compute` began, once it is here; noted for the check that all is finite."""
        engine = self.engine_of(step)
        raw = engine.share(raw) if isinstance(engine, Sharing) else raw
        self.check.add(raw, self.name, step)
        return raw


def make_generators(
    plan: Plan,
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Prompt],
    guidance: Guidance,
    device: torch.device,
    check: FiniteCheck,
) -> dict[str, Generator]:
    """The generators that a plan runs, by name.

    Raises:
        InputError: one has no engine, no prompt, or no negative prompt where it is guided.
    """
    timesteps = send(torch.tensor([float(step.timestep) for step in plan.steps]), device)
    generators = {}
    for name in plan.generators:
        if name not in prompts or name not in engines:
            raise InputError(
                f"plan {plan.name!r} runs the {name} generator; pass its engine and its prompt, or"
                " plan without it.",
                code="missing",
                param=name,
            )
        scales = [guidance.at(step, name) for step in plan.steps if getattr(step, name)]
        if prompts[name].unconditional is None and any(s != 1.0 for s in scales):
            raise InputError(
                f"the {name} generator is guided (scale {max(s for s in scales if s != 1.0):g}) but"
                " has no negative prompt embeddings; pass them, or a guidance_scale of 1.",
                code="missing",
                param="negative_prompt_embeds",
            )
        generators[name] = Generator(name, engines[name], prompts[name], guidance, timesteps, check)
    return generators
