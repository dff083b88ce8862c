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

import torch
from torch import Tensor

from nexus_rt.method.generator import Generator, Pending
from nexus_rt.method.guidance import Prediction
from nexus_rt.method.plan import Plan
from nexus_rt.method.step import DIFFERENCE, FULL, VELOCITY, Step


@dataclass(frozen=True)
class ReuseDeviation:
    """How far a reused velocity lies from the computed one: relative L2 of the guided velocity."""

    step: int
    generator: str
    reused: str
    deviation: float


def extrapolate(sigma: float, last: tuple[float, Tensor], before: tuple[float, Tensor]) -> Tensor:
    """Half-linear extrapolation to `sigma` from (sigma_1, v_1) and the older (sigma_0, v_0)."""
    (sigma_1, v_1), (sigma_0, v_0) = last, before
    return torch.lerp(v_1, v_0, -0.5 * (sigma - sigma_1) / (sigma_1 - sigma_0))


class Reused:
    """A generator during one call, caching its last velocities for reuse.

    The state begins anew wherever the generator did not run at the step before. Re-noised latents
    lie on another path, so that velocities before them are of no use; the guidance difference,
    which is the prompt's, stays for the steps that the plan says.

    Args:
        plan: says whether velocities are extrapolated, and so kept.
        deviations: if given, each reused prediction is also computed, and the difference appended.
            The latents go on from the reused one.
    """

    def __init__(
        self, generator: Generator, plan: Plan, deviations: list[ReuseDeviation] | None = None
    ) -> None:
        self.generator, self.deviations = generator, deviations
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

    def __call__(self, latents: Tensor, step: Step) -> Pending:
        """Begin the generator's prediction at a step, computed or reused."""
        if self.ran != step.index - 1:
            self._forget()
        if self.ran != step.index - 1 or step.renoise:
            self._forget_velocities()
        self.ran = step.index
        compute = self._decide(latents, step)
        self.previous = latents
        raw = None
        if compute != VELOCITY:
            guided = self.generator.guided(step) and compute != DIFFERENCE
            raw = self.generator.compute(latents, step, guided)
        return Pending(lambda: self._finish(latents, step, compute, raw))

    def _finish(self, latents: Tensor, step: Step, compute: str, raw: Tensor | None) -> Prediction:
        """The prediction; what later steps reuse of it is kept."""
        generator, scale = self.generator, self.generator.scale(step)
        if raw is None:
            v = self.computed[0][1]
            if len(self.computed) > 1:
                v = extrapolate(step.sigma, *self.computed)
            prediction = Prediction(v)
        elif compute == DIFFERENCE:
            assert self.difference is not None
            v_c = generator.gather(raw, step).float().contiguous()
            prediction = Prediction(v_c, v_c - self.difference, scale)
        else:
            prediction = Prediction.of(generator.gather(raw, step), scale)
            if prediction.unconditional is not None:
                self.difference = prediction.conditional.float() - prediction.unconditional.float()
                self.stale = False
        if self.deviations is not None and compute != FULL:
            exact = generator(latents, step).result().tensor()
            deviation = float((prediction.tensor() - exact).norm() / exact.norm())
            self.deviations.append(ReuseDeviation(step.index, generator.name, compute, deviation))
        if self.extrapolates and compute != VELOCITY:
            # An engine may write its next prediction where this one lies: keep a copy.
            own = prediction.tensor()
            own = own.clone() if own.data_ptr() == prediction.conditional.data_ptr() else own
            self.computed = [(step.sigma, own), *self.computed[:1]]
            self.inputs = [latents, *self.inputs[:1]]
            self.change = 0.0
        return prediction

    def _decide(self, latents: Tensor, step: Step) -> str:
        """What to compute: the plan's word, unless what it would reuse is not there or has changed
        too much."""
        compute, guided = step.compute(self.generator.name), self.generator.guided(step)
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
