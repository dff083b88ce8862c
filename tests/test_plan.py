"""Plans: what runs when, and what it costs."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nexus_rt.core.errors import InputError, NexusError
from nexus_rt.method.plan import StepCosts
from nexus_rt.method.plan_options import exact
from nexus_rt.method.plan_text import check_plan, parse_plan
from nexus_rt.method.segments import Reuse, Segment, segments
from nexus_rt.method.solver import make_solver
from nexus_rt.method.time_grid import time_grid
from nexus_rt.method.upfb import gate
from nexus_rt.pipeline.request import make_plan
from nexus_rt.pipeline.settings import CallSettings, Defaults
from tests.more import cases
from tests.plans import all_plans
from tests.refusals import refuses

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
    plan = segments(grid, parts)
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
    plan = segments(grid, parts)
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
    plan = segments(grid, parts)
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
    with refuses("out_of_range", "handoff", InputError):
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
    "spec, code, param",
    [
        ("handof=0.3", "unknown_name", "plan"),
        ("medium", "unknown_name", "plan"),
        ("smal:10 large:40", "unknown_name", "segment"),
        ("small:10 large:30", "mismatch", "steps"),
        ("small:10 bridge:5 small:35", "invalid_value", "bridge"),
        ("bridge:5 large:45", "invalid_value", "bridge"),
        ("small:* large:*", "duplicate", "steps"),
        ("small:ten large:40", "unreadable", "segment"),
        ("auto=0.7", "out_of_range", "tolerance"),
        ("auto=x", "invalid_type", "tolerance"),
        ("handoff", "missing", "handoff"),
        ("handoff=0.001", "invalid_value", "handoff"),
        ("handoff=0.3,brige=2", "unknown_name", "handoff option"),
        ("handoff=0.3,bridge=2.5", "invalid_type", "bridge"),
        ("handoff=0.9,bridge=10", "out_of_range", "bridge"),
        ("handoff=step:3", "unknown_name", "handoff unit"),
        ("reference=2", "invalid_value", "plan"),
    ],
)
def test_bad_plans_are_refused(spec, code, param):
    with refuses(code, param, InputError):
        parse_plan(spec, GRID)


@pytest.mark.parametrize(
    "spec, name",
    [("handof=0.3", "handoff"), ("smal:10 large:40", "small"), ("handoff=0.3,brige=2", "bridge")],
)
def test_the_nearest_name_is_suggested(spec, name):
    with pytest.raises(InputError, match=f"did you mean '{name}'"):
        parse_plan(spec, GRID)


def test_energy_reference_needs_both_generators():
    with refuses("conflict", "energy", InputError):
        parse_plan("handoff=0.3", GRID).with_energy("reference")
    assert all(
        s.energy == "progressive"
        for s in parse_plan("reference", GRID).with_energy("progressive").steps
    )
    with pytest.raises(InputError, match="did you mean 'progressive'"):
        parse_plan("reference", GRID).with_energy("progresive")


def test_a_plan_made_for_another_grid_is_refused():
    with refuses("mismatch", "plan", InputError):
        parse_plan(parse_plan("large", GRID), time_grid(20))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_short_schedules_still_plan(n):
    for spec in ("reference", "small", "large", "auto=0.02", "handoff=0.7"):
        assert len(parse_plan(spec, time_grid(n))) == n


@cases(60, 400, all_plans())
def test_a_plan_has_one_exact_text(plan):
    assert parse_plan(plan.name, plan.grid) == plan
    back = parse_plan(plan.text, time_grid(7, 2.0))
    assert back == plan and back.grid.shift == plan.grid.shift
    assert (back.text, back.identity) == (plan.text, plan.identity)
    assert check_plan(plan.text) == plan.text
    # as a call takes it, whatever the pair's own schedule
    pair = Defaults(num_inference_steps=9, shift=3.0)
    assert make_plan(CallSettings(plan=plan.text), pair) == plan


@cases(40, 150, all_plans(), all_plans())
def test_plans_that_differ_in_a_step_differ_in_text(one, other):
    same = one.steps == other.steps and one.grid == other.grid
    assert (one.identity == other.identity) == same
    assert same or one.text != other.text
    if one.grid == other.grid:
        assert same or one.name != other.name


@pytest.mark.parametrize(
    "one, other",
    [
        ("handoff=0.3", "handoff=0.3,bridge=0"),
        ("handoff=sigma:0.9", "handoff=0.9,bridge=4"),
        ("handoff=850", "handoff=850.5,bridge=0"),
        ("auto=0.02", "auto=0.0200001"),
        ("auto=0.02", "auto=0.02 gamma-w=0.3000001"),
        ("reference", "reference energy=none"),
        ("small:10 large:40@3.0000001", "small:10 large:40@3"),
        ("small:10 large:40/adaptive=0.050000001", "small:10 large:40/adaptive=0.05"),
        ("small:4/10 large:4/shift=3.00000001", "small:4/10 large:4/shift=3"),
        ("small:4 renoise=0.7500001 large:4", "small:4 renoise=0.75 large:4"),
        ("large shift=3", "large"),
        ("large solver=euler", "large"),
        ("large:50/solver=lcm", "large:50/solver=euler"),
        ("large large-boundary=0.9", "large large-boundary=0.8"),
        ("large steps=50 shift=5 timesteps=float64", "large steps=20"),
        ("large sigmas=0.9,0.5,0", "large sigmas=0.9,0.500001,0"),
    ],
)
def test_two_plans_have_two_texts(one, other):
    first, second = parse_plan(one, GRID), parse_plan(other, GRID)
    assert first.text != second.text
    assert (first.identity == second.identity) == (first.steps == second.steps)


def test_a_text_of_another_spelling_is_the_same_plan():
    for spec, name in (
        (" handoff=fraction:0.30 ", "handoff=0.3,bridge=5"),
        ("handoff=9.0e2,bridge=0", "handoff=900,bridge=0"),
        ("small:20%  bridge:10% large:*@1.50", "small:10 bridge:5 large:35@1.5"),
        ("auto gamma-w=0.30", "auto=0.02"),
        ("reference energy=reference", "reference"),
        ("large:50@2[0:100%]/every=1", "large:50@2[0:50]"),
    ):
        assert parse_plan(spec, GRID).name == name
    assert parse_plan("reference", GRID).text == "reference steps=50 shift=5"
    assert parse_plan("small:4/10 large:4", GRID).text == "small:4/10 large:4 shift=5"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_numbers_word_is_the_number(value):
    assert float(exact(value)) == value and not exact(value).endswith(".0")


@pytest.mark.parametrize(
    "spec, code, param",
    [
        ("large:*/10", "conflict", "steps"),
        ("small:10 large:*/4@2", "conflict", "steps"),
        ("small:30%/10 large:*", "conflict", "steps"),
        ("small:4/10 large:4 steps=8", "conflict", "steps"),
        ("large energy=loud", "unknown_name", "energy"),
        ("handoff=0.3 gamma-w=0.5", "conflict", "gamma-w"),
        ("large small-solver=euler", "conflict", "small-solver"),
        ("large:50/solver=lcm solver=euler", "conflict", "solver"),
        ("small large-boundary=0.5", "conflict", "large-boundary"),
        ("large large-boundary=1.5", "out_of_range", "large-boundary"),
        ("large energy=none energy=none", "duplicate", "energy"),
        ("handoff=0.3,bridge=1,bridge=2", "duplicate", "bridge"),
        ("steps=50 large", "invalid_value", "plan"),
        ("large timesteps=900,500", "invalid_value", "timesteps"),
        ("large sigmas=0.5,0.9,0", "invalid_value", "sigmas"),
        ("large sigmas=0.9", "invalid_value", "sigmas"),
        ("large sigmas=0.9,0.5,0 timesteps=900", "mismatch", "timesteps"),
        ("large sigmas=0.9,0.5,0 timesteps=900,1001", "out_of_range", "timesteps"),
        ("large sigmas=0.9,0.89999999999,0", "duplicate", "sigmas"),
        ("large sigmas=0.9,0.5,0 steps=2", "conflict", "steps"),
        ("", "missing", "plan"),
        (7, "invalid_type", "plan"),
    ],
)
def test_what_a_text_cannot_say_is_refused_by_name(spec, code, param):
    with refuses(code, param, InputError):
        parse_plan(spec, GRID)


ODD = [
    "9" * 5000,
    "1e400",
    "-1",
    "1e-40",
    "1e30",
    "0",
    "nan",
    "inf",
    "1_0",
    "\u0663",
    "\ud800",
    "\x00",
    "",
]
FORMS = [
    "handoff={}",
    "handoff=sigma:{}",
    "handoff=0.3,bridge={}",
    "auto={}",
    "auto=0.02 gamma-w={}",
    "small:{} large:*",
    "small:{}% large:*",
    "small:4/{} large:4",
    "small:4/10 large:4/shift={}",
    "small:4/10 large:4 shift={}",
    "small:4 renoise={} large:4",
    "large:50@{}",
    "large:50@3[0:{}]",
    "large:50@3[{}%:100%]",
    "large:50/every={}",
    "large:50/guidance-every={}",
    "large:50/adaptive={}",
    "large:50/solver={}",
    "large large-boundary={}",
    "large steps={}",
    "large sigmas=0.9,{},0",
    "large sigmas=0.9,0 timesteps={}",
    "{}",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_absurd_values_are_refused_or_finite(form, value):
    """No value overflows, makes two levels of noise one, or is read as another number."""
    try:
        plan = parse_plan(form.format(value), GRID)
    except NexusError as error:
        assert len(str(error)) < 800 and str(error).encode()
        return
    assert parse_plan(plan.text, GRID) == plan
    levels = np.array(plan.grid.sigmas, np.float32)
    assert np.isfinite(levels).all()
    for leg in plan.grid.legs():
        assert (np.diff(np.array(leg.sigmas, np.float32)) < 0).all()
        make_solver("euler", leg)
        if leg.sigmas[0] < 1:
            table = make_solver("unipc", leg).table
            scalars = [x for s in table for x in (*(s.corrector or ()), *s.predictor)]
            assert np.isfinite(np.array(scalars, np.float32)).all()
    for step in plan.steps:
        scales = [step.scale(g, 1.0) for g in ("small", "large")]
        assert np.isfinite([step.w, step.timestep, *scales]).all() and max(scales) <= 1000


@pytest.mark.parametrize("form", ["small:4/10 large:4/shift={}", "large shift={}"])
@pytest.mark.parametrize("value", ["1e-40", "1e-4", "1e9", "0"])
def test_a_shift_in_a_plan_has_a_range(form, value):
    with refuses("out_of_range", "shift", InputError):
        parse_plan(form.format(value), GRID)


def test_segments_are_checked_where_they_are_made():
    for wrong, code, param in (
        (dict(generator="medium", steps=3), "unknown_name", "segment"),
        (dict(generator="large", steps=2.5), "invalid_type", "a segment's steps"),
        (
            dict(generator="large", steps=3, guidance=math.nan),
            "out_of_range",
            "a segment's guidance",
        ),
        (dict(generator="large", steps=3, guidance=1e30), "out_of_range", "a segment's guidance"),
        (dict(generator="large", steps=3, guided=(3, 5)), "out_of_range", "guided"),
        (dict(generator="large", steps=3, shift=1e-40), "out_of_range", "shift"),
        (dict(generator="large", steps=3, solver="heun"), "unknown_name", "solver"),
        (dict(generator="bridge", steps=3, reuse=Reuse(2)), "conflict", "reuse"),
        (dict(generator="bridge", steps=3, guided=(0, 2)), "conflict", "guided"),
    ):
        with refuses(code, param, InputError):
            Segment(**wrong)
    for wrong, code, param in (
        (dict(every=0), "out_of_range", "every"),
        (dict(guidance_every=0), "out_of_range", "guidance-every"),
        (dict(threshold=math.nan), "out_of_range", "adaptive"),
        (dict(threshold=0.0), "out_of_range", "adaptive"),
        (dict(every=2, threshold=0.1), "conflict", "adaptive"),
    ):
        with refuses(code, param, InputError):
            Reuse(**wrong)
    for own in (dict(clock=9), dict(renoise=0.5), dict(shift=3.0)):
        with refuses("conflict", next(iter(own)), InputError):
            segments(time_grid(4), [Segment("large", 4, **own)])


def test_a_call_and_a_plans_text_say_one_thing():
    text = parse_plan("handoff=0.4 energy=none", time_grid(20, 3.0)).text
    pair = Defaults()
    make = lambda plan, **own: make_plan(CallSettings(plan=plan, **own), pair)
    assert make(text, num_inference_steps=20, shift=3.0, energy="none").text == text
    for own, param in (
        (dict(num_inference_steps=30), "num_inference_steps"),
        (dict(shift=5.0), "shift"),
        (dict(energy="progressive"), "energy"),
        (dict(timesteps=(900, 500)), "timesteps"),
        (dict(small_steps=4), "plan"),
    ):
        with refuses("conflict", param, InputError):
            make(text, **own)
    with refuses("conflict", "gamma_w", InputError):
        make("auto gamma-w=0.5", gamma_w=0.3)
    with refuses("conflict", "num_inference_steps", InputError):
        make("large sigmas=0.9,0.5,0", num_inference_steps=5)


def test_a_plan_of_one_pairs_experts_is_not_anothers():
    plan = parse_plan("large", GRID).with_experts({"large": 0.875})
    assert plan.name == "large large-boundary=0.875" and plan.with_experts({"large": 0.875}) == plan
    for boundaries, code in (({"large": 0.9}, "mismatch"), ({}, "unsupported")):
        with refuses(code, "large-boundary", InputError):
            plan.with_experts(boundaries)
    for share in (-0.1, 1.5, math.nan):
        with refuses("out_of_range", "the large generator's boundary", InputError):
            parse_plan("large", GRID).with_experts({"large": share})
