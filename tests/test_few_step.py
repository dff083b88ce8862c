"""Few-step generators: lists of timesteps, consistency sampling, schedules of a generator's own,
and the recipes that say them."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_rt import InputError, ModelError, NexusPipeline
from nexus_rt.cli import main
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Guidance
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.loop import sample
from nexus_rt.method.plan_scaling import scaled, with_own_steps
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.segments import segments
from nexus_rt.method.solver import make_solver
from nexus_rt.method.time_grid import clock_grid, listed_grid, shifted, time_grid
from nexus_rt.pipeline.recipes import METADATA, RECIPES, Recipe, stored_recipe, with_recipes
from nexus_rt.pipeline.request import make_plan, make_request
from nexus_rt.pipeline.settings import CallSettings, Defaults
from tests import published
from tests.needs import needs
from tests.plans import grids, in_turn
from tests.refusals import refuses

LIST = (1000, 750, 500, 250)
CALL = dict(width=48, height=32, num_frames=5, output_type="latent")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plan_of(defaults=None, plan=None, steps=None, **schedule):
    settings = CallSettings(plan=plan, num_inference_steps=steps, **schedule)
    return make_plan(settings, defaults or Defaults())


class Linear:
    """A generator whose velocity is a fixed function of latents and timestep."""

    def prepare(self, context):
        return context

    def velocity(self, latents, timestep, context):
        return 0.3 * latents + torch.sin(latents + timestep / 500)


def test_a_list_is_what_the_publishers_scheduler_walks():
    """LightX2V: 1000 shifted sigmas, of which the list picks; timesteps are 1000 sigma."""
    full = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)[:-1]
    full = 5 * full / (1 + 4 * full)
    picked = [float(full[1000 - t]) for t in LIST]
    grid = listed_grid(LIST, 5.0)
    assert grid.sigmas == pytest.approx([*picked, 0.0], abs=1e-12)
    assert grid.timesteps == pytest.approx([1000 * s for s in picked], abs=1e-9)


def test_euler_on_a_list_is_diffusers_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    grid = listed_grid(LIST, 5.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=list(grid.sigmas[:-1]))
    x = torch.randn(1, 4, 2, 3, 3, generator=seeded())
    engine, solver, theirs = Linear(), make_solver("euler", grid), x
    for i, t in enumerate(grid.timesteps):
        assert float(scheduler.timesteps[i]) == pytest.approx(t, abs=1e-3)
        theirs = scheduler.step(
            engine.velocity(theirs, torch.tensor(t), None), scheduler.timesteps[i], theirs
        ).prev_sample
        x = solver.step(i, x, engine.velocity(x, torch.tensor(t), None))
    torch.testing.assert_close(x, theirs, atol=1e-5, rtol=1e-5)


def test_lcm_is_diffusers_consistency_scheduler():
    from diffusers import FlowMatchLCMScheduler

    noise = torch.randn(1, 4, 2, 3, 3, generator=seeded())
    grid = listed_grid(LIST, 5.0)
    plan = parse_plan("large", grid)
    engine = Linear()
    got = sample(
        noise,
        plan,
        {"large": engine},
        {"large": Prompt(torch.zeros(1, 1, 1))},
        Guidance.of(1.0),
        solver="lcm",
        hooks=Hooks(noise_rng=seeded(7)),
    )
    scheduler, x, generator = FlowMatchLCMScheduler(shift=1.0), noise, seeded(7)
    scheduler.set_timesteps(sigmas=list(grid.sigmas[:-1]))
    for i, t in enumerate(grid.timesteps):
        velocity = engine.velocity(x, torch.tensor(t), None)
        x = scheduler.step(velocity, scheduler.timesteps[i], x, generator=generator).prev_sample
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


def test_lcm_against_the_formula_in_float64():
    """x_0 = x - sigma v, then (1 - sigma') x_0 + sigma' eps."""
    noise = torch.randn(1, 2, 1, 2, 2, generator=seeded())
    plan = parse_plan("large:4", time_grid(4)).walked_by("lcm")
    assert [s.renoise for s in plan.steps] == [False, True, True, True]
    engine, prompt = Linear(), {"large": Prompt(torch.zeros(1, 1, 1))}
    got = sample(
        noise,
        plan,
        {"large": engine},
        prompt,
        Guidance.of(1.0),
        solver="lcm",
        hooks=Hooks(noise_rng=seeded(3)),
    )
    x, draw = noise.double(), seeded(3)
    for i, step in enumerate(plan.steps):
        if i:
            eps = torch.randn(noise.shape, generator=draw).double()
            x = (1 - step.sigma) * x + step.sigma * eps
        x = x - step.sigma * engine.velocity(x, torch.tensor(float(step.timestep)), None)
    torch.testing.assert_close(got.double(), x, atol=1e-5, rtol=1e-5)


def test_a_segment_has_a_solver_of_its_own():
    """UniPC's history ends at the seam; Euler's steps are Euler's; its own shift keeps the seam's
    sigma."""
    plan = parse_plan("small:4/10 large:3@1/solver=euler", time_grid(1, 3.0)).walked_by("unipc")
    grid = plan.grid
    assert grid.solvers == ((4, "euler"),) and grid.restarts == ()
    table = make_solver("unipc", grid).table
    for i in (4, 5, 6):
        s, after = grid.sigmas[i], grid.sigmas[i + 1]
        assert table[i].corrector is None
        assert table[i].predictor == pytest.approx((after / s, 1 - after / s))
    assert table[1].corrector is not None and len(table[3].predictor) == 2
    assert make_solver("unipc", grid).table[:4] != make_solver("euler", grid).table[:4]
    own = parse_plan("small:4/10 large:3/shift=7", time_grid(1, 3.0)).grid
    seam = shifted(0.999 * 0.6, 3.0)
    assert own.sigmas[4] == pytest.approx(seam, abs=1e-6)
    u = seam / (7 - 6 * seam)
    assert own.sigmas[5] == pytest.approx(shifted(u * 2 / 3, 7.0), abs=1e-6)
    assert clock_grid([(4, 10), (3, 3)], 3.0) == clock_grid(
        [(4, 10), (3, 3)], 3.0, None, [3.0, 3.0]
    )


def test_lcm_in_one_segment_re_noises_after_its_steps_alone():
    plan = parse_plan("small:3/5/solver=lcm large:2", time_grid(1)).walked_by("unipc")
    assert [s.renoise for s in plan.steps] == [False, True, True, True, False]
    assert plan.grid.restarts == (1, 2, 3)
    assert [len(leg) for leg in plan.grid.legs()] == [1, 1, 1, 2]
    noise = torch.randn(1, 2, 1, 2, 2, generator=seeded())
    prompts = dict.fromkeys(("small", "large"), Prompt(torch.zeros(1, 1, 1)))
    engines = {"small": Linear(), "large": Linear()}
    out = sample(noise, plan, engines, prompts, Guidance.of(1.0), hooks=Hooks(noise_rng=seeded()))
    assert out.isfinite().all()


def test_steps_of_a_generators_own():
    grid = time_grid(50)
    words = lambda spec, small, large: with_own_steps(spec, grid, small, large)
    assert words("handoff=0.4", 10, 5) == "small:4/10 large:3"
    assert words("handoff=0.5", 20, None) == "small:10/20 large:25"
    assert words("large", None, 4) == "large:4/4"
    assert words("small:30% large:*", 10, 4) == "small:3/10 large:3"
    plan = plan_of(plan="handoff=0.4", small_steps=10, large_steps=5)
    assert len(plan) == 7 and [s.alone for s in plan.steps] == ["small"] * 4 + ["large"] * 3
    assert plan.grid == parse_plan("small:4/10 large:3", time_grid(1, 5.0)).grid
    for spec, small, large, code, param in (
        ("reference", 4, None, "unsupported", "plan"),
        ("handoff=0.4,bridge=5", 4, 4, "unsupported", "plan"),
        ("large", 4, None, "conflict", "small_steps"),
        ("small:4/10 large:4", 4, None, "conflict", "plan"),
    ):
        with refuses(code, param, InputError):
            words(spec, small, large)


def test_steps_of_a_generators_own_keep_all_else():
    for spec, small, large, name in (
        ("small:30%@4[0:40%] large:*@3/guidance-every=2", 10, 4, "small:3/10@4[0:1] large:3@3"),
        ("small:20/every=3 large:30@1/solver=euler", 10, 5, "small:4/10/every=3 large:3@1"),
        ("large:50@2/adaptive=0.07", None, 8, "large:8/8@2/adaptive=0.07"),
        ("small:25@3 small:25@5[0:10] large:*", 8, None, "small:"),
        ("handoff=0.4 energy=none large-solver=euler", 10, 5, "small:4/10 large:3 energy=none"),
    ):
        plan = plan_of(plan=spec, small_steps=small, large_steps=large)
        assert plan.name.startswith(name), plan.name
    assert plan.name == "small:4/10 large:3 energy=none large-solver=euler"
    assert {s.energy for s in plan.steps} == {"none"}
    assert [s.solver for s in plan.steps] == [None] * 4 + ["euler"] * 3
    both = plan_of(plan="small:10@3 small:15@5[0:6] large:25@1", small_steps=10)
    assert both.name == "small:2/10@3 small:3/8@5[0:1] large:25@1"
    # two segments of one generator walk the clock that it would walk in one
    one = plan_of(plan="small:25 large:25@1", small_steps=10)
    assert both.grid.sigmas == pytest.approx(one.grid.sigmas, abs=1e-6)
    with refuses("out_of_range", "small_steps", InputError):
        plan_of(plan="small:10@3 small:10@4 small:5@5 large:25", small_steps=4)


def settings_of(part):
    """All of a segment but its steps, and how its guided interval lies in them."""
    return replace(part, steps=1, guided=None, clock=None), part.guided is None


@given(grids(), st.data(), st.integers(4, 60), st.integers(4, 60))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_setting_is_lost_between_numbers_of_steps(grid, data, small, large):
    from nexus_rt.method.plan_scaling import merged
    from nexus_rt.method.plan_text import parse_segments

    cuts = sorted(data.draw(st.lists(st.integers(0, len(grid)), max_size=2)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, len(grid)], strict=True)]
    try:
        plan = segments(grid, data.draw(in_turn(sizes)))
        runs = plan.generators
        words = with_own_steps(
            plan.name, grid, small if "small" in runs else None, large if "large" in runs else None
        )
    except InputError as error:
        known = ("both generators at a step", "would have none", "a small and a large", "draws new")
        assert any(reason in str(error) for reason in known), error
        return
    before, after = merged(parse_segments(plan.name, len(grid))), parse_segments(words, None)
    assert [settings_of(p) for p in before] == [settings_of(p) for p in after]
    for old, new in zip(before, after, strict=True):
        if old.guided:
            shares = [i / old.steps for i in old.guided]
            assert all(
                abs(i / new.steps - share) <= 1.5 / new.steps  # rounded, and never empty
                for i, share in zip(new.guided, shares, strict=True)
            )
    if any(p.solver == "lcm" and (p.reuse.every > 1 or p.reuse.threshold) for p in after):
        return  # one step of it reuses nothing, and several are refused
    made = parse_plan(words, time_grid(1, 5.0))
    assert parse_plan(made.name, made.grid) == made
    for steps in (1, 3, len(made), 40):
        over = scaled(words, steps)
        assert len(parse_plan(over, time_grid(1, 5.0))) == steps
        kept = [settings_of(replace(p, shift=None, renoise=None)) for p in after]
        assert all(settings_of(p) in kept for p in parse_segments(over, None))


def test_a_recipes_steps_keep_the_plans_settings():
    pair = Defaults(plan="small:40%@4[0:50%] large:*@2/guidance-every=3")
    walked = plan_of(with_recipes(pair, {"large": Recipe(steps=10, solver="euler")}))
    assert walked.name == "small:20/50@4[0:10] large:6@2/guidance-every=3 large-solver=euler"
    assert walked.grid.shift == 5.0
    # a list is as many steps, where the recipe names no number of its own
    listed = with_recipes(Defaults(), {"large": Recipe(timesteps=LIST)})
    assert listed.large_steps == 4 and plan_of(listed).name == "small:15/50 large:3"
    # the call's shift goes before the recipe's
    shifted_pair = with_recipes(Defaults(), {"large": RECIPES["lightx2v-4step"]})
    assert plan_of(shifted_pair, "large", shift=3.0).grid.sigmas == listed_grid(LIST, 3.0).sigmas
    assert "shift" not in plan_of(shifted_pair, shift=3.0).name


def test_a_solver_that_no_step_takes_is_refused():
    settings = lambda plan, solver: CallSettings(plan=plan, solver=solver)
    walk = lambda plan, solver: make_request(settings(plan, solver), Defaults()).plan
    with refuses("conflict", "solver", InputError):
        walk("large:4/4/solver=euler", "lcm")
    assert {s.solver for s in walk("small:2/4 large:2/solver=euler", "lcm").steps} == {
        "lcm",
        "euler",
    }


def test_what_a_call_says_of_steps_is_said_once():
    for schedule, plan, steps, code, param in (
        (dict(timesteps=LIST), None, 4, "conflict", "num_inference_steps"),
        (dict(timesteps=LIST), "small:2/4 large:2", None, "conflict", "timesteps"),
        (dict(timesteps=LIST, small_steps=3), None, None, "conflict", "timesteps"),
        (dict(small_steps=3), None, 20, "conflict", "small_steps"),
        (dict(small_steps=0), None, None, "out_of_range", "small_steps"),
        (dict(timesteps=(250, 500)), "large", None, "invalid_value", "timesteps"),
        (dict(timesteps=(1200, 500)), "large", None, "invalid_value", "timesteps"),
        (dict(timesteps=()), "large", None, "invalid_value", "timesteps"),
    ):
        with refuses(code, param, InputError):
            plan_of(plan=plan, steps=steps, **schedule)
    with refuses("conflict", "as_published", InputError):
        plan_of(as_published=True, timesteps=LIST)
    with refuses("conflict", "small_steps", InputError):
        plan_of(plan=parse_plan("large", time_grid(4)), small_steps=4)
    with refuses("conflict", "solver", InputError):
        make_solver("unipc", listed_grid(LIST, 5.0))
    with refuses("conflict", "shift", InputError):
        parse_plan("small:2 large:2/shift=3", time_grid(4))
    with refuses("conflict", "solver", InputError):
        parse_plan("large:6/every=2", time_grid(6)).walked_by("lcm")
    with refuses("unknown_name", "solver", InputError):
        parse_plan("large:6/solver=eulr", time_grid(6))


def test_recipes_become_a_pairs_defaults():
    large = with_recipes(Defaults(), {"large": RECIPES["lightx2v-4step"]})
    assert (large.guidance_scale, large.guidance_scale_2) == (6.0, 1.0)
    # alone, the list itself; bridged, its share of four steps, walked by Euler
    alone = plan_of(large, "large")
    assert alone.grid.sigmas == listed_grid(LIST, 5.0).sigmas
    assert {s.solver for s in alone.steps} == {"euler"}
    bridged = plan_of(large)
    assert bridged.generators == ("small", "large")
    assert [s.solver for s in bridged.steps] == [None] * 15 + ["euler"] * 3
    request = make_request(CallSettings(), large)
    assert request.plan.grid.solvers == ((15, "euler"),) and request.guidance.large == 1.0
    # what a call says goes before it
    asked = make_request(CallSettings(plan="large", solver="lcm"), large)
    assert all(s.renoise for s in asked.plan.steps[1:])
    assert len(plan_of(large, "large", 20)) == 20
    assert len(plan_of(large, "small")) == 50
    small = with_recipes(Defaults(), {"small": RECIPES["fastwan-3step"]})
    assert (small.guidance_scale, small.guidance_scale_2) == (1.0, 6.0)
    assert plan_of(small, "small").grid.timesteps == pytest.approx((1000, 757, 522))
    paired = with_recipes(Defaults(), {"large": Recipe(plan="small:4/10 large:3", solver="euler")})
    assert len(plan_of(paired)) == 7
    shifted_plan = plan_of(with_recipes(Defaults(), {"large": Recipe(steps=4, shift=8.0)}))
    assert "large:3/shift=8" in shifted_plan.name


def test_a_recipe_is_read_from_a_header(tmp_path):
    weights = {"blocks.0.x.lora_A.weight": torch.ones(1, 1)}
    write = lambda text: published.save(weights, tmp_path / "a.safetensors", {METADATA: text})
    file = write(json.dumps({"steps": 4, "solver": "euler", "guidance_scale": 1.0}))
    assert stored_recipe([file]) == Recipe(steps=4, solver="euler", guidance_scale=1.0)
    assert stored_recipe([published.save(weights, tmp_path / "b.safetensors"), file]).steps == 4
    assert stored_recipe([published.save(weights, tmp_path / "b.safetensors")]) is None
    for text, code, param in (
        ("{", "unreadable", None),
        ('{"steps": "four"}', "invalid_type", "steps"),
        ('{"stepz": 4}', "unknown_name", "stepz"),
        ('{"solver": "heun"}', "unknown_name", "solver"),
        ('{"timesteps": [1, 2]}', "invalid_value", "timesteps"),
        ('{"steps": 0}', "out_of_range", "steps"),
    ):
        with refuses(code, param, ModelError) as refused:
            stored_recipe([write(text)])
        assert "a.safetensors" in str(refused.value)


WRONG = [
    dict(steps="4"),
    dict(steps=2.5),
    dict(steps=True),
    dict(steps=10**400),
    dict(steps=-1),
    dict(timesteps=()),
    dict(timesteps="1000,500"),
    dict(timesteps=(1000, "500")),
    dict(timesteps=(1000, math.nan)),
    dict(timesteps=(math.inf, 500)),
    dict(timesteps=(10**400, 500)),
    dict(timesteps=(1000, 1e-40)),
    dict(timesteps=(500, 500 - 1e-9)),
    dict(timesteps=(500, 900)),
    dict(timesteps=tuple(range(1001, 0, -1))),
    dict(steps=3, timesteps=LIST),
    dict(shift=0),
    dict(shift=1e-40),
    dict(shift=math.nan),
    dict(shift="5"),
    dict(guidance_scale=1e30),
    dict(guidance_scale=math.inf),
    dict(guidance_scale=[1.0]),
    dict(solver="heun"),
    dict(solver=3),
    dict(solver="\ud800"),
    dict(plan="nonsense"),
    dict(plan="large:4/shift=1e-40"),
    dict(plan="small:4/10 large:" + "9" * 5000),
    dict(plan=7),
    dict(plan="\x00"),
    dict(plan=""),
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_wrong_values_of_a_recipe_are_named(wrong):
    with pytest.raises(ModelError, match="^here: ") as caught:
        Recipe(**wrong).checked("here")
    assert caught.value.code != ModelError.code  # the value's own
    assert len(str(caught.value)) < 800 and str(caught.value).encode()


def test_a_pipeline_walks_by_recipe_and_by_list(tiny_pair):
    pipe = NexusPipeline.from_pretrained(tiny_pair, large_recipe="lightx2v-4step")
    pipe.set_progress_bar_config(disable=True)
    out = pipe("a red circle", plan="large", generator=seeded(), **CALL)
    assert len(out.plan) == 4 and out.plan.evaluations(1.0, 1.0) == {"small": 0, "large": 4}
    plain = NexusPipeline.from_pretrained(tiny_pair)
    plain.set_progress_bar_config(disable=True)
    same = plain(
        "a red circle",
        plan="large",
        timesteps=LIST,
        shift=5.0,
        solver="euler",
        guidance_scale_2=1.0,
        guidance_scale=1.0,
        generator=seeded(),
        **CALL,
    )
    assert torch.equal(out.frames, same.frames)
    with refuses("unknown_name", "recipe", InputError):
        NexusPipeline.from_pretrained(tiny_pair, large_recipe="lightx2v")
    with refuses("missing", "large", InputError):
        NexusPipeline.from_pretrained(small=tiny_pair / "small", large_recipe="lightx2v-4step")


def test_the_command_line(tiny_pair, tmp_path, capsys):
    base = ["plan", "--pair", str(tiny_pair)]
    assert main([*base, "--plan", "handoff=0.5", "--small-steps", "4", "--large-steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "small:2/4 large:2" in out
    assert main([*base, "--plan", "large", "--timesteps", "1000,500", "--solver", "lcm"]) == 0
    assert "re-noised" in capsys.readouterr().out
    assert main([*base, "--large-recipe", "lightx2v-4step", "--plan", "large"]) == 0
    assert "4 large forwards" in capsys.readouterr().out
    command = ["generate", "a red circle", "--pair", str(tiny_pair), "--plan", "large"]
    command += ["--timesteps", "1000,750,500,250", "--solver", "euler", "--quiet"]
    assert main([*command, "-o", str(tmp_path / "a.png")]) == 0


@pytest.mark.slow
@pytest.mark.export
def test_engines_keep_the_recipe(tiny_pair, tmp_path, monkeypatch):
    needs("onnx", "onnxscript", "onnxruntime")
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    command = ["export", "--pair", str(tiny_pair), "--parts", "large", "--sizes", "48x32x5"]
    out = tmp_path / "engines"
    assert main([*command, "--large-recipe", "lightx2v-4step", "-o", str(out)]) == 0
    made = NexusPipeline.from_engines(out)
    assert len(made.make_plan("large")) == 4 and made.defaults.guidance_scale_2 == 1.0
    assert made.defaults.num_inference_steps == 6  # the pair's own
