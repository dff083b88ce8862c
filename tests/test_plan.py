"""Plans: what runs when, and what it costs."""

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nexus_rt import plan as plans
from nexus_rt.errors import InputError
from nexus_rt.plan import Segment, StepCosts, gate
from nexus_rt.plan_text import parse_plan
from nexus_rt.solver import time_grid

COSTS = StepCosts(
    small=3.0, small_guided=5.0, large=11.0, large_guided=19.0, blend=0.25, solver=0.125
)
GRID = time_grid(50, 5.0)


@st.composite
def sandwiches(draw):
    """Segments alternating small and large with bridges of 0 or more steps between them, and their
    grid."""
    first, count = draw(st.booleans()), draw(st.integers(1, 4))
    parts = []
    for i in range(count):
        own = draw(st.sampled_from([None, 1.0, 3.5]))
        parts.append(
            Segment("small" if (i % 2 == 0) == first else "large", draw(st.integers(1, 8)), own)
        )
        if i + 1 < count:
            parts.append(
                Segment("bridge", draw(st.integers(0, 6)), draw(st.sampled_from([None, 2.0])))
            )
    return parts, time_grid(sum(p.steps for p in parts), 5.0)


@given(sandwiches())
@settings(max_examples=150, deadline=None)
def test_segments_cover_the_schedule_exactly_once(case):
    parts, grid = case
    plan = plans.segments(grid, parts)
    assert [s.index for s in plan.steps] == list(range(len(grid)))
    assert [s.timestep for s in plan.steps] == list(grid.timesteps)
    position = 0
    for part in parts:
        for step in plan.steps[position : position + part.steps]:
            assert step.runs == ("both" if part.generator == "bridge" else part.generator)
            assert step.blended == (part.generator == "bridge")
        position += part.steps
    assert position == len(plan)


@given(sandwiches())
@settings(max_examples=150, deadline=None)
def test_weight_is_continuous_across_bridges(case):
    parts, grid = case
    plan = plans.segments(grid, parts)
    position = 0
    for i, part in enumerate(parts):
        if part.generator == "bridge" and part.steps:
            k = part.steps
            around = [s.w for s in plan.steps[position - 1 : position + k + 1]]
            start, end = (1.0, 0.0) if parts[i - 1].generator == "small" else (0.0, 1.0)
            assert around[0] == start and around[-1] == end
            steepest = math.pi / 2 / (k + 1)  # of a cosine ramp over k+1 intervals
            assert all(
                0 < (a - b if start else b - a) <= steepest + 1e-12 for a, b in pairwise(around)
            )
        position += part.steps


@given(sandwiches(), st.sampled_from([1.0, 5.0]), st.sampled_from([1.0, 6.0]))
@settings(max_examples=100, deadline=None)
def test_price_is_the_sum_of_what_runs(case, small_scale, large_scale):
    parts, grid = case
    plan = plans.segments(grid, parts)
    expected, forwards = 0.0, {"small": 0, "large": 0}
    for i, part in enumerate(parts):
        sides = {
            p.generator: p.guidance for p in parts[max(0, i - 1) : i + 2] if p.generator != "bridge"
        }
        running = ["small", "large"] if part.generator == "bridge" else [part.generator]
        cost = COSTS.solver + (COSTS.blend if part.generator == "bridge" else 0)
        for g in running:
            own = (
                part.guidance
                if part.generator != "bridge" or part.guidance is not None
                else sides.get(g)
            )
            scale = own if own is not None else small_scale if g == "small" else large_scale
            cost += getattr(COSTS, g if scale == 1.0 else g + "_guided")
            forwards[g] += part.steps * (1 if scale == 1.0 else 2)
        expected += part.steps * cost
    # A bridge of no steps joins its neighbours' guidance to nothing: skip those whose sides are
    # then ambiguous.
    assume(all(p.steps for p in parts))
    assert plan.price(COSTS, small_scale, large_scale) == pytest.approx(expected)
    assert plan.evaluations(small_scale, large_scale) == forwards


def test_reference_runs_both_everywhere_with_the_gate():
    plan = parse_plan("reference", GRID)
    assert all(s.small and s.large and s.blended and s.energy == "reference" for s in plan.steps)
    assert [s.w for s in plan.steps] == [gate(t) for t in GRID.timesteps]
    assert plan.price(COSTS, 6.0, 6.0) == pytest.approx(50 * (5 + 19 + 0.25 + 0.125))


@pytest.mark.parametrize("name", ["small", "large"])
def test_baselines_run_one_generator_as_it_is(name):
    plan = parse_plan(name, GRID)
    assert plan.generators == (name,) and not any(s.blended for s in plan.steps)


@pytest.mark.parametrize(
    "spec, alone, bridge",
    [
        ("handoff=0.3", 15, 5),
        ("handoff=0.3,bridge=0", 15, 0),
        ("handoff=fraction:0.5,bridge=8", 25, 8),
        ("handoff=900", sum(t >= 900 for t in GRID.timesteps), 5),
        ("handoff=timestep:999,bridge=2", 1, 2),
        ("handoff=sigma:0.9,bridge=3", sum(s >= 0.9 for s in GRID.sigmas), 3),
    ],
)
def test_handoff_takes_a_timestep_a_fraction_or_a_sigma(spec, alone, bridge):
    runs = [s.runs for s in parse_plan(spec, GRID).steps]
    assert runs == ["small"] * alone + ["both"] * bridge + ["large"] * (50 - alone - bridge)


@pytest.mark.parametrize(
    "spec",
    [
        "handoff=1000",
        "handoff=5",
        "handoff=0",
        "handoff=-0.5",
        "handoff=sigma:1.2",
        "handoff=sigma:0.0",
        "handoff=fraction:1.0",
    ],
)
def test_handoff_outside_the_schedule(spec):
    with pytest.raises(InputError, match="outside the schedule"):
        parse_plan(spec, GRID)


def test_auto_snaps_and_leaves_out_what_has_no_share():
    plan = parse_plan("auto=0.2", GRID)
    for step in plan.steps:
        w = gate(step.timestep)
        assert step.w == (0.0 if w < 0.2 else 1.0 if w > 0.8 else w)
        assert (step.small, step.large) == (step.w > 0, step.w < 1)
    assert {s.runs for s in plan.steps} == {"small", "both", "large"}
    exact = parse_plan("auto=0", GRID)
    assert [s.w for s in exact.steps] == [gate(t) for t in GRID.timesteps]


@pytest.mark.parametrize(
    "spec, counts",
    [
        ("small:10 bridge:5 large:15 bridge:2 small:18", [10, 5, 15, 2, 18]),
        ("small:20% bridge:10% large:70%", [10, 5, 35]),
        ("small:33% large:67%", [16, 34]),
        ("small:10 bridge:5 large:*@1", [10, 5, 35]),
    ],
)
def test_segments_as_written(spec, counts):
    plan = parse_plan(spec, GRID)
    names = [w.split(":")[0] for w in spec.split()]
    expected = [
        n if n != "bridge" else "both" for n, c in zip(names, counts, strict=True) for _ in range(c)
    ]
    assert [s.runs for s in plan.steps] == expected


def test_own_guidance_makes_one_forward_of_two():
    plan = parse_plan("small:10 bridge:5 large:35@1", GRID)
    # the bridge's large side is unguided too
    assert plan.evaluations(6.0, 6.0) == {
        "small": 30,
        "large": 5 + 35,
    }
    assert plan.steps[12].guidance_small is None and plan.steps[12].guidance_large == 1.0


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(1, 80))
@settings(max_examples=80, deadline=None)
def test_percentages_that_add_up_cover_any_schedule(weights, n):
    total = sum(weights)
    exact = [f"{100 * w / total:.9f}" for w in weights]
    spec = " ".join(f"{'small' if i % 2 else 'large'}:{p}%" for i, p in enumerate(exact))
    assert len(parse_plan(spec, time_grid(n))) == n


@pytest.mark.parametrize(
    "spec, words",
    [
        ("handof=0.3", "did you mean 'handoff'"),
        ("medium", "unknown plan"),
        ("smal:10 large:40", "did you mean 'small'"),
        ("small:10 large:30", "40 steps, the schedule 50"),
        ("small:10 bridge:5 small:35", "between a small and a large"),
        ("bridge:5 large:45", "between a small and a large"),
        ("small:* large:*", "only one segment"),
        ("small:ten large:40", "not of the form"),
        ("auto=0.7", "tolerance"),
        ("auto=x", "expected a number"),
        ("handoff", "needs where"),
        ("handoff=0.3,brige=2", "did you mean 'bridge'"),
        ("handoff=0.3,bridge=2.5", "whole number"),
        ("handoff=0.9,bridge=10", "leaves none"),
        ("handoff=step:3", "unknown handoff unit"),
        ("reference=2", "takes no value|unknown"),
    ],
)
def test_bad_plans_say_what_is_wrong(spec, words):
    with pytest.raises(InputError, match=words):
        parse_plan(spec, GRID)


def test_energy_reference_needs_both_generators():
    with pytest.raises(InputError, match="leaves one out"):
        parse_plan("handoff=0.3", GRID).with_energy("reference")
    assert all(
        s.energy == "progressive"
        for s in parse_plan("reference", GRID).with_energy("progressive").steps
    )
    with pytest.raises(InputError, match="did you mean 'progressive'"):
        parse_plan("reference", GRID).with_energy("progresive")


def test_a_plan_made_for_another_grid_is_refused():
    with pytest.raises(InputError, match="another time grid"):
        parse_plan(parse_plan("large", GRID), time_grid(20))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_short_schedules_still_plan(n):
    for spec in ("reference", "small", "large", "auto=0.02", "handoff=0.7"):
        assert len(parse_plan(spec, time_grid(n))) == n
