"""Plans: which generator runs at which step, with what weight, and what that costs.

A plan is made before the first step and does not change. `segments` is the general form; `small`,
`large` and `handoff` are shorthands of it; `reference` and `auto` follow the gate. A plan's name is
its exact text, which `nexus_rt.method.plan_text` reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

from nexus_rt.core.checks import number, whole
from nexus_rt.core.errors import InputError, choose, shorten
from nexus_rt.core.limits import (
    ENERGIES,
    GAMMA_W,
    GENERATORS,
    MAX_GAMMA_W,
    MAX_GUIDANCE,
    MAX_STEPS,
    MIN_GAMMA_W,
    SOLVERS,
    TRAIN_STEPS,
    Scale,
)
from nexus_rt.method.plan_words import (
    base_name,
    exact,
    has_clocks,
    schedule_options,
    split_words,
    with_options,
)
from nexus_rt.method.solver import (
    TimeGrid,
    check_shift,
    clock_grid,
)
from nexus_rt.method.upfb import gate

FULL, DIFFERENCE, VELOCITY = "full", "difference", "velocity"
PLANS = ("reference", "small", "large", "handoff", "auto")
UNITS = ("timestep", "fraction", "sigma")
TOLERANCE = 0.02  # of `auto`
MAX_CHANGE = 10.0  # of a velocity that is reused, relative
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


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of one step's parts at the batch, size and device of the run.

    `small`, `large`: one forward without guidance; `*_guided`: with it (a batch of two).
    """

    small: float
    small_guided: float
    large: float
    large_guided: float
    blend: float = 0.0
    solver: float = 0.0


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


def reference(grid: TimeGrid, gamma_w: float = GAMMA_W) -> Plan:
    """Both generators at every step, w from the gate, energy `reference`: the published
    schedule."""
    name = with_options("reference", _gate_option(gamma_w))
    steps = [
        Step(i, t, s, gate(t, gamma_w), True, True, "reference")
        for i, (t, s) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False))
    ]
    return Plan(name, tuple(steps), grid)


def _gate_option(gamma_w: float) -> dict[str, str]:
    """The option of a plan whose gate is another than the published."""
    number("gamma_w", gamma_w, MIN_GAMMA_W, MAX_GAMMA_W)
    return {} if gamma_w == GAMMA_W else {"gamma-w": exact(gamma_w)}


def auto(grid: TimeGrid, tolerance: float = TOLERANCE, gamma_w: float = GAMMA_W) -> Plan:
    """w from the gate, snapped to 0 below `tolerance` and to 1 above `1 - tolerance`; what has no
    share does not run."""
    number("tolerance", tolerance, -MAX_STEPS, MAX_STEPS)
    if not 0 <= tolerance < 0.5:
        raise InputError(
            f"auto's tolerance is {tolerance}; expected a weight from 0 up to (not including) 0.5.",
            code="out_of_range",
            param="tolerance",
        )
    name = with_options(f"auto={exact(tolerance)}", _gate_option(gamma_w))
    steps = []
    for i, (t, s) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False)):
        w = gate(t, gamma_w)
        w = 0.0 if w < tolerance else 1.0 if w > 1 - tolerance else w
        steps.append(Step(i, t, s, w, w > 0, w < 1, "progressive", blended=w > 0))
    return Plan(name, tuple(steps), grid)


@dataclass(frozen=True)
class Reuse:
    """What of a generator is computed at some steps of a segment and reused between.

    every: its velocity, at every k-th step and at the last. guidance_every: its guidance
    difference, at every k-th of the guided steps that are computed. threshold: its velocity, while
    the estimated change stays below; excludes `every`.
    """

    every: int = 1
    guidance_every: int = 1
    threshold: float | None = None

    def __post_init__(self) -> None:
        whole("every", self.every, 1, MAX_STEPS)
        whole("guidance-every", self.guidance_every, 1, MAX_STEPS)
        if self.threshold is None:
            return
        number("adaptive", self.threshold, -MAX_STEPS, MAX_STEPS)
        if not 0 < self.threshold <= MAX_CHANGE:
            raise InputError(
                f"adaptive is {exact(self.threshold)}; expected the relative change that may be"
                f" estimated, above 0 and at most {MAX_CHANGE:g}, such as 0.05.",
                code="out_of_range",
                param="adaptive",
            )
        if self.every != 1:
            raise InputError(
                "every= fixes which steps are computed and adaptive= finds them; expected one of"
                " the two.",
                code="conflict",
                param="adaptive",
            )

    def compute(
        self, count: int, guided: tuple[int, int] | None = None
    ) -> list[tuple[str, float | None]]:
        """What each step of a segment of `count` computes, and its threshold. guided: first and
        last (exclusive) of the guided steps, None for all."""
        rows: list[tuple[str, float | None]] = []
        computed = 0  # of the guided steps
        for j in range(count):
            if j % self.every and j < count - 1:
                rows.append((VELOCITY, None))
                continue
            # An extrapolation needs two velocities, and the last step sets the finish.
            threshold = self.threshold if 2 <= j < count - 1 else None
            inside = guided is None or guided[0] <= j < guided[1]
            reused = inside and computed % self.guidance_every
            rows.append((DIFFERENCE if reused else FULL, threshold))
            computed += inside
        return rows


@dataclass(frozen=True)
class Segment:
    """`generator` ("small", "large" or "bridge") for a number of steps.

    guidance: a scale of its own, None for the call's. guided: first and last (exclusive) of its
    steps with guidance, None for all; the others have a scale of 1. clock: how many steps its clock
    has in all; None where the schedule is one clock for all. renoise: the sigma that it begins at,
    on re-noised latents. shift: of its clock, None for the schedule's. solver: what walks it, None
    for the call's.
    """

    generator: str
    steps: int
    guidance: float | None = None
    guided: tuple[int, int] | None = None
    reuse: Reuse = Reuse()
    clock: int | None = None
    renoise: float | None = None
    shift: float | None = None
    solver: str | None = None

    def __post_init__(self) -> None:
        choose("segment", self.generator, (*GENERATORS, "bridge"))
        whole("a segment's steps", self.steps, 0, MAX_STEPS)
        if self.guidance is not None:
            number("a segment's guidance", self.guidance, -MAX_GUIDANCE, MAX_GUIDANCE)
        if self.guided is not None:
            first, end = (whole("a guided step", i, 0, MAX_STEPS) for i in self.guided)
            if not first < end or first >= self.steps:
                raise InputError(
                    f"segment {self.generator}:{self.steps} is guided from step {first} to {end} of"
                    f" {self.steps}; expected an interval inside, such as [0:40%].",
                    code="out_of_range",
                    param="guided",
                )
            object.__setattr__(self, "guided", (first, min(end, self.steps)))
        if self.clock is not None:
            whole("clock", self.clock, 1, MAX_STEPS)
        if self.renoise is not None:
            number("renoise", self.renoise, -MAX_STEPS, MAX_STEPS)  # its range: `clock_grid`
        if self.shift is not None:
            check_shift(self.shift)
        if self.solver is not None:
            choose("solver", self.solver, SOLVERS)
        if self.generator == "bridge" and (self.reuse != Reuse() or self.guided):
            raise InputError(
                f"{shorten(self, 80)!r}: both generators run in a bridge; guidance intervals and"
                f" reuse"
                " go with small and large segments.",
                code="conflict",
                param="guided" if self.guided else "reuse",
            )

    def __str__(self) -> str:
        """As a plan's words have it."""
        text = f"{self.generator}:{self.steps}" + (f"/{self.clock}" if self.clock else "")
        if self.guidance is not None or self.guided:
            text += "@" + ("" if self.guidance is None else exact(self.guidance))
        text += f"[{self.guided[0]}:{self.guided[1]}]" if self.guided else ""
        for name, value in (
            ("every", self.reuse.every),
            ("guidance-every", self.reuse.guidance_every),
        ):
            text += f"/{name}={value}" if value != 1 else ""
        if self.reuse.threshold is not None:
            text += f"/adaptive={exact(self.reuse.threshold)}"
        text += "" if self.shift is None else f"/shift={exact(self.shift)}"
        text += "" if self.solver is None else f"/solver={self.solver}"
        return text if self.renoise is None else f"renoise={exact(self.renoise)} {text}"

    def scale(self, j: int) -> float | None:
        """The guidance scale of its step j, None for the call's."""
        inside = self.guided is None or self.guided[0] <= j < self.guided[1]
        return self.guidance if inside else 1.0


def segments(grid: TimeGrid, parts: Sequence[Segment], name: str | None = None) -> Plan:
    """The general plan: generators in turn, `bridge` a cosine ramp of w between its neighbours,
    both running.

    Raises:
        InputError: the segments do not cover the schedule exactly, a bridge lacks two different
            neighbours, or a segment has a clock, or a shift or renoise, which go with clocks.
    """
    for part in parts:
        if part.shift is not None:
            raise InputError(
                f"{str(part)!r} has a shift of its own, and the plan one schedule for all; give"
                " each generator a clock, such as small:4/10 large:4/shift=3.",
                code="conflict",
                param="shift",
            )
        if part.clock is not None or part.renoise is not None:
            raise InputError(
                f"{str(part)!r} has a clock or begins on re-noised latents, and the plan one"
                " schedule for all; make it with `clocked`.",
                code="conflict",
                param="renoise" if part.clock is None else "clock",
            )
    parts = [p for p in parts if p.steps > 0]
    total = sum(p.steps for p in parts)
    if total != len(grid):
        raise InputError(
            f"the segments have {total} steps, the schedule {len(grid)}; make them add up, or let"
            " one take the rest ('large:*').",
            code="mismatch",
            param="steps",
        )
    return _in_turn(grid, parts, name)


def clocked(parts: Sequence[Segment], shift: float) -> Plan:
    """A plan in which each segment walks a clock of its own (`nexus_rt.method.solver.clock_grid`);
    a segment without one walks it to the end."""
    clocks = [(p.steps, p.clock or p.steps) for p in parts]
    renoise = {i: p.renoise for i, p in enumerate(parts) if p.renoise is not None}
    grid = clock_grid(clocks, shift, renoise, [p.shift for p in parts])
    one = len(parts) == 1 and parts[0].clock is None
    return _in_turn(grid, [replace(p, clock=p.steps) for p in parts] if one else parts)


def _in_turn(grid: TimeGrid, parts: Sequence[Segment], name: str | None = None) -> Plan:
    """The plan of segments that cover a grid."""
    steps: list[Step] = []
    for k, part in enumerate(parts):
        steps += (
            _bridge(grid, parts, k, len(steps))
            if part.generator == "bridge"
            else _lone(grid, part, len(steps))
        )
    plan = Plan(name or " ".join(map(str, parts)), tuple(steps), grid)
    return plan.with_solvers({})  # where every segment has one, the plan is walked by them


def _lone(grid: TimeGrid, part: Segment, first: int) -> list[Step]:
    """The steps of one generator alone."""
    small, steps = part.generator == "small", []
    for j, (compute, threshold) in enumerate(part.reuse.compute(part.steps, part.guided)):
        i, scale = first + j, part.scale(j)
        computes = (compute, FULL) if small else (FULL, compute)
        steps.append(
            Step(
                i,
                grid.timesteps[i],
                grid.sigmas[i],
                1.0 if small else 0.0,
                small,
                not small,
                "progressive",
                scale,
                scale,
                False,
                *computes,
                threshold,
                part.renoise is not None and j == 0,
                solver=part.solver,
            )
        )
    return steps


def _bridge(grid: TimeGrid, parts: Sequence[Segment], k: int, first: int) -> list[Step]:
    """The steps of segment k, a bridge: w a cosine ramp, both generators running, each under its
    own segment's guidance unless the bridge has one."""
    part = parts[k]
    sides = [parts[j].generator if 0 <= j < len(parts) else None for j in (k - 1, k + 1)]
    if sorted(map(str, sides)) != ["large", "small"]:
        raise InputError(
            "a bridge stands between a small and a large segment, one on each side.",
            param="bridge",
        )
    before, after = parts[k - 1].scale(parts[k - 1].steps - 1), parts[k + 1].scale(0)
    small, large = (before, after) if sides[0] == "small" else (after, before)
    steps = []
    for j in range(part.steps):
        w = (1 + math.cos(math.pi * (j + 1) / (part.steps + 1))) / 2
        w = w if sides[0] == "small" else 1 - w
        i, own = first + j, part.guidance
        scales = (small, large) if own is None else (own, own)
        steps.append(
            Step(
                i,
                grid.timesteps[i],
                grid.sigmas[i],
                w,
                True,
                True,
                "progressive",
                *scales,
                renoise=part.renoise is not None and j == 0,
                solver=part.solver,
            )
        )
    return steps


def handoff(grid: TimeGrid, at: float, unit: str = "timestep", bridge: int | None = None) -> Plan:
    """The small generator alone, a cosine ramp over `bridge` steps, then the large one alone.

    Args:
        at: where the small one stops running alone: a timestep (it runs while t >= at, as
            diffusers' boundary has it), a fraction of the steps, or a sigma, as `unit` says.
        bridge: steps with both; the default is a tenth of the schedule, at most what is left.
    """
    n = len(grid)
    choose("handoff unit", unit, UNITS)
    number("handoff", at, -1e9, 1e9)
    if bridge is not None:
        whole("bridge", bridge, -MAX_STEPS, MAX_STEPS)
    if unit == "fraction":
        alone, inside = round(at * n), 0 < at < 1
    elif unit == "sigma":
        alone, inside = (
            sum(s >= at for s in grid.sigmas[:-1]),
            grid.sigmas[n - 1] < at <= grid.sigmas[0],
        )
    else:
        alone, inside = (
            sum(t >= at for t in grid.timesteps),
            grid.timesteps[-1] < at <= grid.timesteps[0],
        )
    if not inside:
        spans = {
            "fraction": "between 0 and 1 (exclusive)",
            "sigma": f"above {grid.sigmas[n - 1]:.4f} and up to {grid.sigmas[0]:.4f}",
            "timestep": f"above {grid.timesteps[-1]} and up to {grid.timesteps[0]}",
        }
        raise InputError(
            f"handoff at {unit} {exact(at)} lies outside the schedule of {n} steps; expected"
            f" {spans[unit]}, or plan 'small' or 'large'.",
            code="out_of_range",
            param="handoff",
        )
    bridge = max(0, min(max(1, round(n / 10)), n - alone - 1)) if bridge is None else bridge
    if bridge < 0 or alone + bridge > n - (bridge > 0):
        raise InputError(
            f"a bridge of {bridge} steps after {alone} small ones leaves none of the {n} for the"
            " large one.",
            code="out_of_range",
            param="bridge",
        )
    if bridge and not alone:
        raise InputError(
            f"handoff at {unit} {exact(at)} leaves the small generator no step of its own in {n};"
            " hand over later.",
            param="handoff",
        )
    parts = [
        Segment("small", alone),
        Segment("bridge", bridge),
        Segment("large", n - alone - bridge),
    ]
    where = exact(at) if unit == default_unit(at) else f"{unit}:{exact(at)}"
    return segments(grid, parts, f"handoff={where},bridge={bridge}")


def default_unit(at: float) -> str:
    """The unit of a handoff's number where its text has none."""
    return "fraction" if at < 1 else "timestep"
