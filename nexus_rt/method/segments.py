"""Plans of segments, the general form: generators in turn, with bridges between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nexus_rt.core.checks import number, whole
from nexus_rt.core.errors import InputError, choose, shorten
from nexus_rt.core.limits import GENERATORS, MAX_GUIDANCE, MAX_STEPS, SOLVERS
from nexus_rt.method.plan import Plan
from nexus_rt.method.plan_options import exact
from nexus_rt.method.step import DIFFERENCE, FULL, VELOCITY, Step
from nexus_rt.method.time_grid import TimeGrid, check_shift, clock_grid

MAX_CHANGE = 10.0  # of a velocity that is reused, relative


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
    """A plan in which each segment walks a clock of its own (`time_grid.clock_grid`); a segment
    without one walks it to the end."""
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
