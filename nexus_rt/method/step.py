"""A step of a plan: what runs in it, with what weight and under what guidance."""

from __future__ import annotations

from dataclasses import dataclass

from nexus_rt.core.limits import TRAIN_STEPS, Scale

FULL, DIFFERENCE, VELOCITY = "full", "difference", "velocity"
EXPERTS = ("high", "low")  # of a generator that has two: for high noise, and for low


def expert_at(timestep: float, boundary: float) -> str:
    """The expert of a timestep: "high" from the share `boundary` of the training timesteps up."""
    return EXPERTS[timestep < boundary * TRAIN_STEPS]


def engine_name(generator: str, expert: str | None) -> str:
    """The name of the engine that runs a generator's expert, such as "large:high"."""
    return f"{generator}:{expert}" if expert else generator


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    w: the small generator's weight. small, large: which generators run. energy: how the blend's RMS
        is set.
    guidance_small, guidance_large: this step's own guidance scale, None for the call's.
    blended: False where a lone generator's velocity is used as it is.
    compute_small, compute_large: "full", or what is reused: "difference" (the guidance difference,
        so that only the conditional forward runs) or "velocity" (nothing runs; see
        `nexus_rt.method.reuse`).
    threshold: the lone generator's velocity is reused while its estimated relative change stays
        below this; None where the step is computed as written.
    renoise: the step begins on re-noised latents, `(1 - sigma) x + sigma eps`.
    expert_small, expert_large: which expert runs, "high" or "low", of a generator that has them.
    solver: what walks the step; None for the call's.
    """

    index: int
    timestep: float
    sigma: float
    w: float
    small: bool
    large: bool
    energy: str = "progressive"
    guidance_small: float | None = None
    guidance_large: float | None = None
    blended: bool = True
    compute_small: str = FULL
    compute_large: str = FULL
    threshold: float | None = None
    renoise: bool = False
    expert_small: str | None = None
    expert_large: str | None = None
    solver: str | None = None

    def scale(self, generator: str, default: Scale) -> float:
        """The guidance scale of "small" or "large": this step's own, else the call's, of which a
        generator of experts may have one each."""
        own = self.guidance_small if generator == "small" else self.guidance_large
        if own is not None:
            return float(own)
        if isinstance(default, tuple):
            return float(default[EXPERTS.index(self.expert(generator) or EXPERTS[0])])
        return float(default)

    @property
    def alone(self) -> str | None:
        """The generator that runs by itself; None where both do."""
        return None if self.small and self.large else "small" if self.small else "large"

    def expert(self, generator: str) -> str | None:
        """The expert of "small" or "large" that runs; None where the generator has none."""
        return self.expert_small if generator == "small" else self.expert_large

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines that run, in the order small, large; experts as in
        "large:high"."""
        return tuple(engine_name(g, self.expert(g)) for g in ("small", "large") if getattr(self, g))

    def compute(self, generator: str) -> str:
        """What is computed of "small" or "large"."""
        return self.compute_small if generator == "small" else self.compute_large

    def extrapolates(self, generator: str) -> bool:
        """Whether it may extrapolate a generator's velocity from earlier ones."""
        lone = getattr(self, generator) and self.threshold is not None
        return lone or self.compute(generator) == VELOCITY

    def reuses(self, generator: str) -> bool:
        """Whether it may reuse what a generator computed before."""
        return self.extrapolates(generator) or self.compute(generator) == DIFFERENCE

    def forwards(self, generator: str, scale: float) -> int:
        """Forward passes of a generator at this guidance scale; a step with a threshold counts as
        computed."""
        if not getattr(self, generator) or self.compute(generator) == VELOCITY:
            return 0
        return 1 if scale == 1.0 or self.compute(generator) == DIFFERENCE else 2

    @property
    def runs(self) -> str:
        """What runs, for reading: "small", "large" or "both"; experts by their names."""
        both = self.small and self.large and not (self.expert_small or self.expert_large)
        return "both" if both else "+".join(self.engines)
