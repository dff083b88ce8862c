"""Reuse against its formulas, with engines that count what they are asked for."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_rt.core.errors import InputError
from nexus_rt.core.limits import SOLVERS
from nexus_rt.engines.experts import ExpertsEngine
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Guidance
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.loop import sample
from nexus_rt.method.plan import StepCosts
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.reuse import extrapolate
from nexus_rt.method.segments import Reuse
from nexus_rt.method.time_grid import time_grid
from nexus_rt.pipeline.recipes import RECIPES, with_recipes
from nexus_rt.pipeline.request import make_guidance, make_plan
from nexus_rt.pipeline.settings import CallSettings, Defaults
from tests.plans import SOLVER, all_plans
from tests.refusals import refuses

GRID = time_grid(8, 3.0)


class Field:
    """A velocity that depends on latents, timestep and the embedding's mean: conditional and
    unconditional differ. `asked` notes the batch of every forward."""

    def __init__(self, gain=1.0):
        self.gain, self.asked, self.outputs = gain, [], []

    def prepare(self, embeds):
        return embeds.mean((1, 2))

    def velocity(self, latents, timestep, context):
        self.asked.append((int(timestep), len(context)))
        x = torch.cat([latents] * (len(context) // len(latents)))
        bent = torch.sin(x * self.gain) + 0.3 * context.view(-1, 1, 1, 1, 1) * torch.cos(x)
        return bent + float(timestep) / 1000


def prompt(seed=0):
    g = torch.Generator().manual_seed(seed)
    return Prompt(torch.randn(1, 3, 4, generator=g) + 1, torch.randn(1, 3, 4, generator=g) - 1)


def noise():
    return torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(5))


def run(spec, engine=None, guidance=3.0, grid=GRID, **options):
    engine = engine or Field()
    out = sample(
        noise(),
        parse_plan(spec, grid),
        {"large": engine, "small": engine},
        {"large": prompt(), "small": prompt()},
        Guidance.of(guidance),
        solver=options.pop("solver", "euler"),
        kernels="torch",
        **options,
    )
    return out, engine


def oracle(count, every, guidance_every, guidance=3.0):
    """The same walk in float64, from DESIGN's formulas alone."""
    x, sigmas = noise().double(), GRID.sigmas
    c, u = (float(e.double().mean()) for e in (prompt().conditional, prompt().unconditional))
    past, d, computed = [], None, 0
    for i in range(count):
        if i % every == 0 or i == count - 1:
            f = lambda m: torch.sin(x) + 0.3 * m * torch.cos(x) + GRID.timesteps[i] / 1000  # noqa: B023
            v_c = f(c)
            if computed % guidance_every == 0:
                d = v_c - f(u)
            v = v_c + (guidance - 1) * d
            past = [(sigmas[i], v), *past[:1]]
            computed += 1
        elif len(past) == 1:
            v = past[0][1]
        else:
            (s1, v1), (s0, v0) = past
            v = v1 + 0.5 * (sigmas[i] - s1) / (s1 - s0) * (v1 - v0)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x


@pytest.mark.parametrize("every", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("guidance_every", [1, 2, 3])
def test_it_is_the_formula_and_runs_what_the_plan_counts(every, guidance_every):
    spec = f"large:8/every={every}/guidance-every={guidance_every}"
    out, engine = run(spec)
    assert torch.allclose(out.double(), oracle(8, every, guidance_every), atol=2e-5)
    plan = parse_plan(spec, GRID)
    assert sum(batch for _, batch in engine.asked) == plan.evaluations(3.0, 3.0)["large"]
    assert engine.asked[-1][0] == GRID.timesteps[-1]  # the last step is computed


def test_half_linear():
    v1, v0 = torch.randn(2, 3, 4, 5).unbind(0)
    got = extrapolate(0.4, (0.6, v1), (0.9, v0))
    assert torch.allclose(got, v1 + 0.5 * (0.4 - 0.6) / (0.6 - 0.9) * (v1 - v0), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6))
def test_what_is_computed_begins_and_ends_a_segment(count, every, guidance_every):
    rows = [c for c, _ in Reuse(every, guidance_every).compute(count)]
    assert rows[0] == "full" and rows[-1] != "velocity"
    computed = [c for c in rows if c != "velocity"]
    assert [c == "full" for c in computed] == [
        i % guidance_every == 0 for i in range(len(computed))
    ]
    assert all(rows[j] != "velocity" for j in range(0, count, every))


def test_nothing_is_left_for_the_next_call_or_another_segment():
    engine = Field()
    first, _ = run("large:8/every=3", engine)
    again, _ = run("large:8/every=3", engine)
    assert torch.equal(first, again)
    # A small segment between: the large generator's history before it is not used after it.
    out, _ = run("large:2/every=2 small:2 large:4/every=2", Field(), guidance=1.0)
    plan = parse_plan("large:2/every=2 small:2 large:4/every=2", GRID)
    computes = [s.compute("large") for s in plan.steps if s.large]
    assert computes == ["full", "full", "full", "velocity", "full", "full"]
    x, past = noise().double(), []
    c = float(prompt().conditional.double().mean())
    for i, step in enumerate(plan.steps):
        if i in (2, 3, 4):
            past = []
        if step.large and step.compute("large") == "velocity":
            v = past[0] if len(past) == 1 else None
        else:
            v = torch.sin(x) + 0.3 * c * torch.cos(x) + step.timestep / 1000
        past = [v, *past[:1]]
        x = x + (GRID.sigmas[i + 1] - GRID.sigmas[i]) * v
    assert torch.allclose(out.double(), x, atol=2e-5)


def test_an_engine_that_writes_over_its_last_output_is_copied():
    class Static(Field):
        """As a CUDA graph's replay: every output lies in one buffer."""

        def velocity(self, latents, timestep, context):
            v = super().velocity(latents, timestep, context)
            if not hasattr(self, "buffer") or self.buffer.shape != v.shape:
                self.buffer = torch.empty_like(v)
            return self.buffer.copy_(v)

    for guidance in (1.0, 3.0):
        for spec in ("large:8/every=3", "large:8/every=2/guidance-every=2", "large:8/adaptive=0.5"):
            assert torch.equal(run(spec, Static(), guidance)[0], run(spec, Field(), guidance)[0]), (
                spec
            )


def test_adaptive_reuse_follows_its_threshold():
    exact, engine = run("large:8", Field())
    most = len(engine.asked)
    counts, deviations = [], []
    for threshold in (1e-6, 0.02, 0.2, 10):
        out, engine = run(f"large:8/adaptive={threshold}", Field())
        counts.append(len(engine.asked))
        deviations.append(float((out - exact).norm() / exact.norm()))
    assert counts[0] == most and deviations[0] < 1e-6
    assert counts == sorted(counts, reverse=True) and counts[-1] == 3  # two, and the last
    assert deviations == sorted(deviations) and deviations[-1] > deviations[0]


def test_parity_measures_every_reused_step_and_changes_nothing():
    spec, deviations = "large:8/every=2/guidance-every=2", []
    out, _ = run(spec)
    same, _ = run(spec, Field(), hooks=Hooks(reuse_deviations=deviations))
    assert torch.equal(out, same)
    plan = parse_plan(spec, GRID)
    reused = [(s.index, s.compute("large")) for s in plan.steps if s.compute("large") != "full"]
    assert [(e.step, e.reused) for e in deviations] == reused and {
        e.generator for e in deviations
    } == {"large"}
    assert all(0 < e.deviation < 1 for e in deviations)
    # Nearer in time is nearer in value: every second step is reused better than every fourth.
    worse: list = []
    run("large:8/every=4", Field(), hooks=Hooks(reuse_deviations=worse))
    mean = lambda rows: sum(e.deviation for e in rows) / len(rows)
    assert mean([e for e in deviations if e.reused == "velocity"]) < mean(worse)


def test_a_constant_field_is_reused_without_error():
    class Constant(Field):
        def velocity(self, latents, timestep, context):
            v = super().velocity(torch.zeros_like(latents), torch.tensor(0.0), context)
            return v

    exact, _ = run("large:8", Constant())
    deviations: list = []
    out, _ = run(
        "large:8/every=4/guidance-every=3", Constant(), hooks=Hooks(reuse_deviations=deviations)
    )
    assert torch.allclose(out, exact, atol=1e-6) and all(e.deviation < 1e-6 for e in deviations)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_bridges_run_beside_reuse(solver):
    out, engine = run("small:3/every=2 bridge:2 large:3/guidance-every=2", Field(), solver=solver)
    assert torch.isfinite(out).all()
    assert sum(b for _, b in engine.asked) == 2 * 2 + 2 * 4 + (2 + 1 + 2)


@pytest.mark.parametrize(
    "spec, code, param",
    [
        ("large:8/every=0", "out_of_range", "every"),
        ("large:8/every=2/every=3", "duplicate", "every"),
        ("large:8/every=2/adaptive=0.1", "conflict", "adaptive"),
        ("large:8/adaptive=0", "out_of_range", "adaptive"),
        ("large:8/adaptive=nan", "invalid_type", "adaptive"),
        ("large:8/evry=2", "unknown_name", "option of a segment"),
        ("large:8/every=two", "invalid_type", "every"),
        ("small:3 bridge:2/every=2 large:3", "conflict", "reuse"),
        ("large:8@3[4:2]", "out_of_range", "guided"),
        ("large:8@3[9:12]", "out_of_range", "guided"),
        ("large:8@3[0:", "unreadable", "segment"),
    ],
)
def test_wrong_words_are_refused(spec, code, param):
    with refuses(code, param, InputError):
        parse_plan(spec, GRID)


def test_guidance_intervals_are_forwards_saved():
    plan = parse_plan("large:8@3[0:50%]", GRID)
    assert [s.guidance_large for s in plan.steps] == [3.0] * 4 + [1.0] * 4
    assert plan.evaluations(5, 5)["large"] == 12
    out, engine = run("large:8@3[0:50%]")
    assert [b for _, b in engine.asked] == [2] * 4 + [1] * 4
    plain = parse_plan("large:8@[2:4]", GRID)
    assert [s.scale("large", 5.0) for s in plain.steps] == [1, 1, 5, 5, 1, 1, 1, 1]
    assert torch.isfinite(out).all() and not math.isnan(float(out.sum()))


SCALES = st.sampled_from([1.0, 3.0, (1.0, 4.0), (4.0, 1.0), (2.0, 3.0)])
UNIT = StepCosts(small=1.0, small_guided=2.0, large=1.0, large_guided=2.0)


class Counting(Field):
    """An engine that notes the forwards of each expert."""

    def velocity(self, latents, timestep, context):
        self.asked.append(len(context) // len(latents))
        x = torch.cat([latents] * self.asked[-1])
        return 0.1 * torch.sin(x) + 0.1 * context.view(-1, 1, 1, 1, 1) * torch.cos(x)


def forwards(plan, solver, small, large):
    """What a walk runs of each generator, two experts each where the plan has them."""
    engines, counted = {}, {}
    for name in ("small", "large"):
        experts = {e: Counting() for e in ("high", "low")}
        counted[name] = [e.asked for e in experts.values()]
        of_experts = any(step.expert(name) for step in plan.steps)
        engines[name] = ExpertsEngine(experts, 0.5) if of_experts else experts["high"]
    sample(
        noise(),
        plan,
        engines,
        dict.fromkeys(engines, prompt()),
        Guidance.of(small, large),
        solver=solver,
        kernels="torch",
    )
    return {name: sum(map(sum, asked)) for name, asked in counted.items()}


@given(all_plans(), SOLVER, SCALES, SCALES)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_evaluations_are_the_forwards_that_run(plan, solver, small, large):
    if len(plan) > 40:
        return
    try:
        walked = plan.walked_by(solver)
        ran = forwards(walked, solver, small, large)
    except InputError as error:  # refused before a step
        assert "draws new noise" in str(error) or "UniPC has no log-SNR" in str(error)
        return
    priced = walked.evaluations(small, large)
    assert priced == plan.evaluations(small, large)
    assert walked.price(UNIT, small, large) == sum(priced.values())
    if walked.adaptive:
        assert all(ran[g] <= priced[g] for g in ran)
    else:
        assert ran == priced


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "spec, wanted",
    [
        ("large:12/guidance-every=2", 18),
        ("large:12/guidance-every=5", 15),
        ("large:12@[3:12]/guidance-every=4", 3 + 9 + 3),
        ("large:12@[3:7]/guidance-every=3", 8 + 4 + 2),
        ("large:12@1/guidance-every=2", 12),
    ],
)
def test_a_guidance_difference_is_reused_as_priced(spec, wanted, solver):
    plan = parse_plan(spec, time_grid(12, 3.0)).walked_by(solver)
    assert plan.evaluations(5.0, 5.0)["large"] == wanted
    assert forwards(plan, solver, 5.0, 5.0)["large"] == wanted


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("plan", [None, "large", "small:30% large:*@3/guidance-every=2"])
def test_evaluations_of_few_step_generators(recipe, plan):
    pair = with_recipes(Defaults(), {"large": RECIPES[recipe]})
    guidance = make_guidance(CallSettings(), pair)
    solver = RECIPES[recipe].solver
    made = make_plan(CallSettings(plan=plan), pair).walked_by(solver)
    scales = guidance.small, guidance.large
    assert forwards(made, solver, *scales) == made.evaluations(*scales)


def test_an_experts_first_guided_step_has_no_difference_to_reuse():
    plan = parse_plan("large:8/guidance-every=4", GRID).with_experts({"large": 0.6})
    high = sum(step.expert("large") == "high" for step in plan.steps)
    assert 0 < high < 8 and high % 4  # the first low step is to reuse
    scales = (1.0, 3.0)
    assert forwards(plan, "euler", 1.0, scales) == plan.evaluations(1.0, scales)
    later = [i for i in range(high + 1, 8) if i % 4 == 0]
    assert plan.evaluations(1.0, scales)["large"] == 8 + 1 + len(later)
