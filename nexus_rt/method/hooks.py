"""What happens around a step besides the method: cancelling, moving weights, re-noising, the check
that all is finite, the caller's callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from nexus_rt.core.errors import Cancelled, InputError
from nexus_rt.method.finite_check import FiniteCheck
from nexus_rt.method.generator import Generator, Prompt
from nexus_rt.method.latents import Generators, renoise
from nexus_rt.method.reuse import ReuseDeviation
from nexus_rt.method.step import Step


class Mover(Protocol):
    """Moves engines between memories as a plan goes on (`nexus_rt.pipeline.residency`)."""

    @property
    def stays(self) -> bool:
        """Whether every engine is there from the first step to the last."""
        ...

    def enter(self, index: int) -> None:
        """Have on the device what a step runs."""
        ...


@dataclass(frozen=True)
class CallbackResult:
    """What a callback changes from the next step on: latents, and/or prompts by generator; None
    keeps what is."""

    latents: Tensor | None = None
    prompts: Mapping[str, Prompt] | None = None


@dataclass
class Hooks:
    """What a caller has done around the steps of a plan.

    on_step: called after every step with it and the new latents; may return latents to go on with,
        or a `CallbackResult`.
    should_stop: asked before every step; True ends the loop in `Cancelled`.
    should_finish: asked before every step; True ends the loop with the latents as they are.
    noise_rng: draws the noise of a plan that re-noises.
    residency: moves engines between memories. None: nothing is moved; every engine is already on
        its device or loads itself on first use.
    reuse_deviations: if given, each reused prediction is also computed, and the difference is
        appended here. Costs the forward that reuse saves.
    """

    on_step: Callable[[Step, Tensor], Tensor | CallbackResult | None] | None = None
    should_stop: Callable[[], bool] | None = None
    should_finish: Callable[[], bool] | None = None
    noise_rng: Generators = None
    residency: Mover | None = None
    reuse_deviations: list[ReuseDeviation] | None = None
    generators: Mapping[str, Generator] = field(default_factory=dict)  # set by `sample`
    check: FiniteCheck | None = None  # set by `sample`

    @property
    def engines_stay(self) -> bool:
        """Whether every engine is there from the first step to the last."""
        return self.residency is None or self.residency.stays

    def finished(self, step: Step) -> bool:
        """Whether the loop ends before a step.

        Raises:
            Cancelled: `should_stop` said so.
        """
        if self.should_stop is not None and self.should_stop():
            raise Cancelled(f"stopped before step {step.index}, as asked.")
        return self.should_finish is not None and self.should_finish()

    def before(self, step: Step, latents: Tensor) -> Tensor:
        """The latents that a step begins from."""
        if self.residency is not None:
            self.residency.enter(step.index)
        return renoise(latents, step.sigma, self.noise_rng) if step.renoise else latents

    def after(self, step: Step, latents: Tensor) -> Tensor:
        """The latents that the next step begins from.

        Raises:
            NumericsError: a prediction was not finite.
        """
        if self.check is not None:
            self.check.raise_if_bad(before=step.index + 1)
        result = None if self.on_step is None else self.on_step(step, latents)
        if result is None:
            return latents
        change = result if isinstance(result, CallbackResult) else CallbackResult(result)
        for name, prompt in (change.prompts or {}).items():
            if name in self.generators:
                self.generators[name].change_prompt(prompt)
        if change.latents is None:
            return latents
        if change.latents.shape != latents.shape:
            raise InputError(
                f"the callback returned latents {list(change.latents.shape)}; expected"
                f" {list(latents.shape)}.",
                code="mismatch",
                param="latents",
            )
        return change.latents.float()

    def done(self) -> None:
        """After the last step.

        Raises:
            NumericsError: a prediction was not finite.
        """
        if self.check is not None:
            self.check.wait()
