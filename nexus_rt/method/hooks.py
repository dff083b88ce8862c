"""What happens around a step besides the method: cancelling, moving weights, re-noising, the check
that all is finite, the caller's callback."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from nexus_rt.core.devices import Reading, Readings
from nexus_rt.core.errors import Cancelled, InputError, NumericsError
from nexus_rt.method.engine import Diagnosable, supports
from nexus_rt.method.latents import Generators, renoise
from nexus_rt.method.plan import Step

if TYPE_CHECKING:
    from nexus_rt.method.generator import Generator, Prompt
    from nexus_rt.method.reuse import ReuseDeviation

MAX_UNCHECKED_STEPS = 2  # steps that may be enqueued on a GPU before one is known to be finite


class Mover(Protocol):
    """Moves engines between memories as a plan goes on (`nexus_rt.pipeline.residency`)."""

    plan: Any

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
class FiniteCheck:
    """The sums of all predictions, on their way to the host behind the steps that make them, so
    that the GPU need not wait at every step. On a CPU they are there at once.

    engines: by generator, to say what is wrong with their weights.
    """

    engines: Mapping[str, Any]
    readings: Readings = field(default_factory=Readings)
    sums: deque[tuple[Reading, str, Step]] = field(default_factory=deque)

    def add(self, raw: Tensor, name: str, step: Step) -> None:
        """Note a generator's prediction at a step."""
        self.sums.append((self.readings.start(raw.sum(dtype=torch.float32)), name, step))

    def raise_if_bad(self, before: int) -> None:
        """Raise if a prediction before a step was not finite. Looks only at sums already on the
        host, and waits for any older than `MAX_UNCHECKED_STEPS`.

        Raises:
            NumericsError: names the generator, the step and, where its weights are at fault, the
                weights.
        """
        while self.sums and self.sums[0][2].index < before:
            total, _, step = self.sums[0]
            if not (total.ready or step.index < before - MAX_UNCHECKED_STEPS):
                return
            self._settle()

    def wait(self) -> None:
        """Check all predictions.

        Raises:
            NumericsError: as `raise_if_bad`.
        """
        while self.sums:
            self._settle()

    def _settle(self) -> None:
        total, name, step = self.sums.popleft()
        if not math.isfinite(total.value()):
            self._refuse(name, step)

    def _refuse(self, name: str, step: Step) -> None:
        engine = self.engines[name]
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
            f" {step.timestep}); {cause}",
            param=name,
        )


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
