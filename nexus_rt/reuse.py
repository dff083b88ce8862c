"""Reuse of what a generator computed at earlier steps: its velocity, extrapolated, or its guidance
difference.

Half-linear extrapolation from the last two computed velocities,
`v(sigma) = v_1 + 1/2 (sigma - sigma_1) / (sigma_1 - sigma_0) (v_1 - v_0)`, and the guidance
difference `d = v_c - v_u` kept for some steps, `v = v_c + (g - 1) d`. Which step computes what is
the plan's (`Step.compute`), or is decided as it runs by EasyCache's rule (arXiv 2507.02860): the
velocity is reused while its estimated relative change since it was last computed,
`sum |v_1 - v_0| / |x_1 - x_0| |x_i - x_(i-1)| / |v_1|`, stays below `Step.threshold`. TeaCache
(2411.19108) and MagCache (2506.09045) are the neighbours; they need a fit for each model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nexus_rt.plan import DIFFERENCE, FULL, VELOCITY, Plan, Step
from nexus_rt.velocity import Prediction

if TYPE_CHECKING:
    from nexus_rt.step_runners import FiniteCheck, Generator


@dataclass(frozen=True)
class ReuseError:
    """What reuse cost at a step: the relative L2 error of the generator's guided velocity."""

    step: int
    generator: str
    reused: str
    error: float


def extrapolate(sigma: float, last: tuple[float, Tensor], before: tuple[float, Tensor]) -> Tensor:
    """Half-linear extrapolation to `sigma` from (sigma_1, v_1) and the older (sigma_0, v_0)."""
    (sigma_1, v_1), (sigma_0, v_0) = last, before
    return torch.lerp(v_1, v_0, -0.5 * (sigma - sigma_1) / (sigma_1 - sigma_0))


class Reused:
    """A generator at work for one call, with what of its last steps can be reused.

    The state begins anew wherever the generator did not run at the step before. Re-noised latents
    lie on another path, so that velocities before them are of no use; the guidance difference,
    which is the prompt's, stays for the steps that the plan says.

    Args:
        plan: says whether velocities are extrapolated, and so kept.
        errors: where parity is measured; every reused step is then computed as well, and the error
            added. The latents go on from the reused velocity.
    """

    def __init__(
        self, generator: Generator, plan: Plan, errors: list[ReuseError] | None = None
    ) -> None:
        self.generator, self.errors = generator, errors
        self.extrapolates = any(step.extrapolates(generator.name) for step in plan.steps)
        self.ran: int | None = None
        self._forget()
        self._forget_velocities()

    def _forget(self) -> None:
        self.difference: Tensor | None = None
        self.stale = True  # the difference, since the step that was to renew it was skipped

    def _forget_velocities(self) -> None:
        self.computed: list[tuple[float, Tensor]] = []  # (sigma, guided velocity), newest first
        self.inputs: list[Tensor] = []  # latents of the two last computed steps, newest first
        self.previous: Tensor | None = None
        self.change = 0.0

    def predict(self, latents: Tensor, step: Step, finite: FiniteCheck) -> Prediction:
        """The generator's prediction at a step, computed or reused."""
        name = self.generator.name
        if self.ran != step.index - 1:
            self._forget()
        if self.ran != step.index - 1 or step.renoise:
            self._forget_velocities()
        self.ran = step.index
        compute = self._decide(latents, step)
        self.previous = latents
        if compute == VELOCITY:
            v = self.computed[0][1]
            if len(self.computed) > 1:
                v = extrapolate(step.sigma, *self.computed)
            prediction = Prediction(v)
        elif compute == DIFFERENCE:
            raw = self.generator.predict(latents, step, guided=False)
            finite.add(raw, name, step)
            assert self.difference is not None
            v_c = raw.float().contiguous()
            prediction = Prediction(v_c, v_c - self.difference, self.generator.scale(step))
        else:
            prediction = self._full(latents, step, finite)
            if prediction.unconditional is not None:
                self.difference = prediction.conditional.float() - prediction.unconditional.float()
                self.stale = False
        if self.errors is not None and compute != FULL:
            exact = self._full(latents, step, finite).tensor()
            error = float((prediction.tensor() - exact).norm() / exact.norm())
            self.errors.append(ReuseError(step.index, name, compute, error))
        if self.extrapolates and compute != VELOCITY:
            # An engine may write its next prediction where this one lies: keep a copy.
            own = prediction.tensor()
            own = own.clone() if own.data_ptr() == prediction.conditional.data_ptr() else own
            self.computed = [(step.sigma, own), *self.computed[:1]]
            self.inputs = [latents, *self.inputs[:1]]
            self.change = 0.0
        return prediction

    def _full(self, latents: Tensor, step: Step, finite: FiniteCheck) -> Prediction:
        raw = self.generator.predict(latents, step)
        finite.add(raw, self.generator.name, step)
        return Prediction.of(raw, self.generator.scale(step))

    def _decide(self, latents: Tensor, step: Step) -> str:
        """What to compute: the plan's word, unless what it would reuse is not there or has changed
        too much."""
        compute, guided = step.compute(self.generator.name), self.generator.scale(step) != 1.0
        if step.threshold is not None and len(self.computed) > 1:
            assert self.previous is not None
            (_, v_1), (_, v_0) = self.computed
            rate = (v_1 - v_0).norm() / (self.inputs[0] - self.inputs[1]).norm()
            moved = (latents - self.previous).norm()
            self.change += float(rate * moved / v_1.norm())  # on a GPU, a synchronisation a step
            if self.change < step.threshold:
                self.stale = self.stale or compute == FULL
                return VELOCITY
        if compute == VELOCITY:
            return VELOCITY if self.computed else FULL
        if compute == DIFFERENCE and (not guided or self.difference is None or self.stale):
            return FULL
        return compute
