"""A plan: which generator runs at which step, and what that costs.

A plan is made before the first step and does not change. `nexus_rt.method.named_plans` and
`nexus_rt.method.segments` make plans; a plan's name is its exact text, which
`nexus_rt.method.plan_text` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

from nexus_rt.core.checks import number
from nexus_rt.core.errors import InputError, choose, shorten
from nexus_rt.core.limits import ENERGIES, GENERATORS, SOLVERS, Scale
from nexus_rt.method.plan_options import (
    base_name,
    exact,
    has_clocks,
    schedule_options,
    split_words,
    with_options,
)
from nexus_rt.method.step import DIFFERENCE, FULL, VELOCITY, Step, expert_at
from nexus_rt.method.time_grid import TimeGrid


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of one step's parts at the batch, size and device of the run.

    `small`, `large`: one forward without guidance; `*_guided`: with it (a batch of two); 0 of a
    generator that is not there.
    """

    small: float = 0.0
    small_guided: float = 0.0
    large: float = 0.0
    large_guided: float = 0.0
    blend: float = 0.0
    solver: float = 0.0

    @classmethod
    def of_forwards(cls, forwards: Mapping[str, float]) -> StepCosts:
        """The prices of one forward of each generator alone; a guided step is two of them."""
        guided = {f"{name}_guided": 2 * ms for name, ms in forwards.items()}
        return cls(**forwards, **guided)


@dataclass(frozen=True)
class Plan:
    """A named sequence of steps, one for each entry of its time grid.

    name: the plan's exact text over a schedule: `parse_plan(plan.name, plan.grid) == plan`.
    """

    name: str
    steps: tuple[Step, ...]
    grid: TimeGrid

    @property
    def text(self) -> str:
        """The plan's exact text with its schedule: `parse_plan(plan.text, grid) == plan` for any
        grid."""
        schedule = schedule_options(self.grid, has_clocks(self.name))
        return with_options(self.name, schedule)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of all that the plan does, whatever its words: every step, and every noise
        level."""
        plain = lambda v: float(v) if isinstance(v, (int, float)) else v  # 1000 is 1000.0
        rows = [[plain(v) for v in vars(step).values()] for step in self.steps]
        levels = [plain(sigma) for sigma in self.grid.sigmas]
        return sha256(repr((levels, self.grid.restarts, rows)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def generators(self) -> tuple[str, ...]:
        """The generators that run at all, in the order small, large."""
        return tuple(g for g in ("small", "large") if any(getattr(s, g) for s in self.steps))

    @property
    def adaptive(self) -> bool:
        """Whether what is computed is decided as the plan runs; counts and prices are then the
        most there can be."""
        return any(s.threshold is not None for s in self.steps)

    def with_energy(self, energy: str | None) -> Plan:
        """The same plan under another energy rule.

        Raises:
            InputError: `reference` asked of a plan in which a generator is left out of a step.
        """
        if energy is None:
            return self
        choose("energy", energy, ENERGIES)
        lone = [s for s in self.steps if not (s.small and s.large)]
        if energy == "reference" and lone:
            raise InputError(
                f"energy 'reference' needs both generators at every step, but plan {self.name!r}"
                f" leaves one out at step {lone[0].index} ({len(lone)} steps in all); use energy"
                " 'progressive', or plan 'reference'.",
                code="conflict",
                param="energy",
            )
        own = "reference" if base_name(self.name) == "reference" else "progressive"
        name = with_options(self.name, {"energy": None if energy == own else energy})
        steps = tuple(replace(s, energy=energy) for s in self.steps)
        return replace(self, name=name, steps=steps)

    @cached_property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines that run at all: small before large, in the order they are first
        needed."""
        names = dict.fromkeys(name for s in self.steps for name in s.engines)
        return tuple(sorted(names, key=lambda name: not name.startswith("small")))

    def with_experts(self, boundaries: Mapping[str, float]) -> Plan:
        """The same plan of generators that have experts: which of them runs at which step.

        Args:
            boundaries: generator -> share of the training timesteps from which up "high" runs.

        Raises:
            InputError: a share outside 0..1, or another than the plan's text has.
        """
        for generator, share in boundaries.items():
            choose("generator", generator, GENERATORS)
            number(f"the {generator} generator's boundary", share, 0.0, 1.0)
        known = split_words(self.name)[1]
        for generator in GENERATORS:
            word, wanted = f"{generator}-boundary", boundaries.get(generator)
            if word in known and (wanted is None or exact(wanted) != known[word]):
                own = "has no experts" if wanted is None else f"has {exact(wanted)}"
                raise InputError(
                    f"plan {shorten(self.name, 120)!r} sets {word}={known[word]}, and the"
                    f" {generator}"
                    f" generator {own}; leave {word} out.",
                    code="unsupported" if wanted is None else "mismatch",
                    param=word,
                )
        running = {g: b for g, b in boundaries.items() if any(getattr(s, g) for s in self.steps)}
        if not running:
            return self
        steps = []
        for step in self.steps:
            small, large = (
                expert_at(step.timestep, running[g]) if g in running and getattr(step, g) else None
                for g in GENERATORS
            )
            steps.append(replace(step, expert_small=small, expert_large=large))
        words = {f"{g}-boundary": exact(b) for g, b in running.items()}
        return replace(self, name=with_options(self.name, words), steps=tuple(steps))

    def with_solvers(self, own: Mapping[str, str], rest: str | None = None) -> Plan:
        """The same plan where a generator that runs alone is walked by a solver of its own, unless
        its segment says another, and all other steps by `rest` (None: by the call's).

        Raises:
            InputError: an unknown solver, or velocities reused between latents that are re-noised.
        """
        for name in (*own.values(), *(() if rest is None else (rest,))):
            choose("solver", name, SOLVERS)
        if not own and rest is None and any(s.solver is None for s in self.steps):
            return self
        chosen = [s.solver or own.get(s.alone or "") for s in self.steps]
        alone = {s.alone for s in self.steps if s.solver is None}
        words = {f"{g}-solver": own[g] for g in GENERATORS if g in own and g in alone}
        if rest is not None and None in chosen:
            words["solver"] = rest
        steps = [replace(s, solver=n or rest) for s, n in zip(self.steps, chosen, strict=True)]
        plan = replace(self, name=with_options(self.name, words), steps=tuple(steps))
        return plan._with_restarts(rest) if all(s.solver for s in steps) else plan

    def walked_by(self, solver: str) -> Plan:
        """The same plan with the solver of each step: its own, else the call's. Where it is "lcm",
        the step ends at sigma 0 and the next begins on re-noised latents.

        Raises:
            InputError: an unknown solver, or velocities reused between latents that are re-noised.
        """
        choose("solver", solver, SOLVERS)
        names = {s.solver or solver for s in self.steps}
        if names == {solver} and (solver != "lcm" or len(self.steps) == 1):
            return self  # one solver for all, which is the call's
        return self.with_solvers({}, solver)

    def _with_restarts(self, default: str | None) -> Plan:
        """A plan whose steps all have solvers, on the grid that these walk. default: the solver
        that walks where the grid names none."""
        names = [s.solver or "" for s in self.steps]
        fresh = [i > 0 and names[i - 1] == "lcm" for i in range(len(names))]
        for step, name in zip(self.steps, names, strict=True):
            if name == "lcm" and any(step.extrapolates(g) for g in GENERATORS):
                raise InputError(
                    f"plan {shorten(self.name, 120)!r} reuses velocities at step {step.index},"
                    f" where"
                    " solver 'lcm' draws new noise at every step; leave the reuse out, or take"
                    " 'euler'.",
                    code="conflict",
                    param="solver",
                )
        before = [default, *names]
        changes = tuple((i, n) for i, n in enumerate(names) if n != before[i])
        restarts = {*self.grid.restarts, *(i for i, new in enumerate(fresh) if new)}
        steps = [
            replace(s, renoise=True) if new and not s.renoise else s
            for s, new in zip(self.steps, fresh, strict=True)
        ]
        grid = replace(self.grid, restarts=tuple(sorted(restarts)), solvers=changes)
        return replace(self, steps=tuple(steps), grid=grid)

    def forwards(self, step: Step, generator: str, default: Scale) -> int:
        """Forward passes of a generator at a step, `default` the call's guidance scale of it; a
        step with a threshold counts as computed.

        What is to be reused is computed where there is nothing to reuse yet: at the first guided
        step of an expert whose other expert runs unguided.
        """
        if step.compute(generator) == FULL or step.index not in self._computed(generator, default):
            return step.forwards(generator, step.scale(generator, default))
        return 1 if step.scale(generator, default) == 1.0 else 2

    def _computed(self, generator: str, default: Scale) -> frozenset[int]:
        """Steps that are to reuse, and have nothing to."""
        known: dict[tuple[str, Scale], frozenset[int]] = self._computed_steps
        if (generator, default) not in known:
            indices, velocity, difference = set(), False, False
            for step in self.steps:
                if not getattr(step, generator):
                    velocity = difference = False
                    continue
                velocity = velocity and not step.renoise
                guided, compute = step.scale(generator, default) != 1.0, step.compute(generator)
                absent = compute == VELOCITY and not velocity
                absent |= compute == DIFFERENCE and guided and not difference
                if absent:
                    indices.add(step.index)
                velocity = True
                difference = difference or (guided and (compute == FULL or absent))
            known[generator, default] = frozenset(indices)
        return known[generator, default]

    @cached_property
    def _computed_steps(self) -> dict[tuple[str, Scale], frozenset[int]]:
        return {}

    def evaluations(self, guidance_small: Scale, guidance_large: Scale) -> dict[str, int]:
        """Forward passes of each generator (a guided step has two)."""
        scales = {"small": guidance_small, "large": guidance_large}
        return {
            g: sum(self.forwards(step, g, scale) for step in self.steps)
            for g, scale in scales.items()
        }

    def step_price(
        self, step: Step, costs: StepCosts, guidance_small: Scale, guidance_large: Scale
    ) -> float:
        """Milliseconds of one step: the sum of what runs in it."""
        price = costs.solver + (costs.blend if step.blended else 0.0)
        for g in ("small", "large"):
            price += self.generator_price(step, g, costs, guidance_small, guidance_large)
        return price

    def generator_price(
        self,
        step: Step,
        generator: str,
        costs: StepCosts,
        guidance_small: Scale,
        guidance_large: Scale,
    ) -> float:
        """Milliseconds of one generator in one step; 0 where it does not run."""
        scale = guidance_small if generator == "small" else guidance_large
        prices = 0.0, getattr(costs, generator), getattr(costs, f"{generator}_guided")
        return prices[self.forwards(step, generator, scale)]

    def price(self, costs: StepCosts, guidance_small: Scale, guidance_large: Scale) -> float:
        """Milliseconds of the whole denoising loop."""
        return sum(self.step_price(s, costs, guidance_small, guidance_large) for s in self.steps)
