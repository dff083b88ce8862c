"""Hypothesis strategies of plans in all their forms, over all kinds of schedules."""

from dataclasses import replace

from hypothesis import strategies as st

from nexus_rt.core.errors import InputError
from nexus_rt.core.limits import SOLVERS
from nexus_rt.method.named_plans import UNITS, auto, handoff, reference
from nexus_rt.method.segments import Reuse, Segment, clocked, segments
from nexus_rt.method.time_grid import TimeGrid, listed_grid, time_grid

NONE = st.none()
SHIFTS = st.floats(0.5, 12.0)
SOLVER = st.sampled_from(sorted(SOLVERS))
GENERATOR = st.sampled_from(["small", "large"])


@st.composite
def grids(draw, most=24):
    """Wan's schedule, the published one, a list of timesteps, and one that a caller made."""
    kind, steps = draw(st.integers(0, 3)), draw(st.integers(1, most))
    if kind == 0:
        return time_grid(steps, draw(SHIFTS))
    if kind == 1:
        return time_grid(draw(st.integers(1, 300)), draw(SHIFTS), float64_timesteps=True)
    thousandths = st.integers(10, 990)
    apart = draw(st.lists(thousandths, min_size=steps, max_size=steps, unique=True))
    levels = [n / 1000 + draw(st.floats(0, 1e-4)) for n in sorted(apart, reverse=True)]
    try:
        if kind == 2:
            return listed_grid([1000 * s for s in levels], draw(SHIFTS))
    except InputError:
        return time_grid(steps)
    whole = draw(st.booleans())
    timesteps = tuple(int(1000 * s) if whole else 999 * s for s in levels)
    return TimeGrid((*levels, 0.0), timesteps, draw(st.none() | SHIFTS))


@st.composite
def reuses(draw):
    every, guidance_every = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return Reuse(1, guidance_every, draw(st.floats(1e-6, 10.0)))
    return Reuse(every, guidance_every)


@st.composite
def parts(draw, steps, clocks=False, generator=GENERATOR):
    """A small or large segment."""
    guided = None
    if steps and draw(st.booleans()):
        first = draw(st.integers(0, steps - 1))
        guided = (first, draw(st.integers(first + 1, steps + 2)))
    return Segment(
        draw(generator),
        steps,
        draw(NONE | st.just(1.0) | st.floats(-20.0, 20.0)),
        guided,
        draw(st.just(Reuse()) | reuses()),
        shift=draw(NONE | SHIFTS) if clocks else None,
        solver=draw(NONE | SOLVER),
    )


@st.composite
def bridges(draw, steps):
    return Segment("bridge", steps, draw(NONE | st.floats(0.5, 9.0)), solver=draw(NONE | SOLVER))


@st.composite
def in_turn(draw, sizes, clocks=False):
    """Segments of these sizes; a bridge where it stands between two different generators."""
    made = []
    for i, size in enumerate(sizes):
        between = 0 < i < len(sizes) - 1 and made[-1].generator != "bridge"
        if between and draw(st.integers(0, 3)) == 0:
            made.append(draw(bridges(size)))
            continue
        other = {"small": "large", "large": "small"}
        after = made and made[-1].generator == "bridge"
        generator = st.just(other[made[-2].generator]) if after else GENERATOR
        made.append(draw(parts(size, clocks, generator)))
    return made


@st.composite
def bases(draw):
    """A plan before a call has set anything for all its steps."""
    form = draw(st.sampled_from(["reference", "auto", "handoff", "segments", "clocks", "alone"]))
    if form == "clocks":
        sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
        made = []
        for i, part in enumerate(draw(in_turn(sizes, True))):
            ends = i + 1 == len(sizes)
            made.append(
                replace(
                    part,
                    clock=None if ends and draw(st.booleans()) else part.steps,
                )
            )
        for i in range(len(sizes) - 1):
            if draw(st.booleans()):
                made[i + 1] = replace(made[i + 1], renoise=draw(st.floats(0.01, 0.99)))
            else:
                clock = made[i].steps + draw(st.integers(1, 9))
                made[i] = replace(made[i], clock=clock)
        return clocked(made, draw(SHIFTS))
    grid = draw(grids())
    gamma_w = draw(st.just(0.3) | st.floats(0.01, 3.0))
    if form == "reference":
        return reference(grid, gamma_w)
    if form == "auto":
        return auto(grid, draw(st.just(0.02) | st.floats(0.0, 0.499)), gamma_w)
    if form == "handoff":
        unit = draw(st.sampled_from(UNITS))
        places = {"timestep": grid.timesteps, "sigma": grid.sigmas[:-1], "fraction": (0.3,)}
        at = draw(st.sampled_from(places[unit]) | st.floats(0.0, 1000 if unit == "timestep" else 1))
        return handoff(grid, at, unit, draw(NONE | st.integers(0, 5)))
    if form == "alone":
        return segments(grid, [Segment(draw(GENERATOR), len(grid))])
    cuts = draw(st.lists(st.integers(0, len(grid)), max_size=3).map(sorted))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, len(grid)], strict=True)]
    return segments(grid, draw(in_turn(sizes)))


@st.composite
def changed(draw, base=bases()):  # noqa: B008 (a strategy)
    """A plan, with what calls and models set for all of its steps."""
    plan = draw(base)
    if draw(st.booleans()):
        plan = plan.with_energy(draw(st.sampled_from(["progressive", "reference", "none"])))
    own = draw(st.dictionaries(GENERATOR, SOLVER, max_size=2))
    plan = plan.with_solvers(own)
    if draw(st.booleans()):
        plan = plan.with_experts(draw(st.dictionaries(GENERATOR, st.floats(0.0, 1.0))))
    return plan.walked_by(draw(SOLVER)) if draw(st.booleans()) else plan


@st.composite
def all_plans(draw, base=None):
    """A plan of any form that can be made at all."""
    try:
        return draw(changed(base) if base is not None else changed())
    except InputError:
        return reference(time_grid(draw(st.integers(1, 9))))
