"""A clock for each generator: grids from the formula, the seam, re-noising, and the words."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt.core.errors import InputError
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Guidance
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.loop import sample
from nexus_rt.method.plan_options import has_clocks
from nexus_rt.method.plan_scaling import scaled
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.solver import euler_table, make_solver, unipc_table
from nexus_rt.method.time_grid import clock_grid, time_grid
from tests.refusals import refuses

GRID = time_grid(20, 3.0)


def sigmas(shift, us):
    return [shift * u / (1 + (shift - 1) * u) for u in us]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("k, n_small, n_large", [(4, 10, 4), (6, 10, 3), (1, 2, 1), (9, 10, 7)])
def test_the_grid_is_the_formula(k, n_small, n_large, shift):
    plan = parse_plan(f"small:{k}/{n_small} large:{n_large}", time_grid(50, shift))
    seam = 0.999 * (1 - k / n_small)
    us = [0.999 * (1 - i / n_small) for i in range(k)]
    us += [seam * (1 - j / n_large) for j in range(n_large)]
    wanted = sigmas(shift, us)
    assert plan.grid.sigmas[-1] == 0 and len(plan) == k + n_large
    assert max(abs(a - b) for a, b in zip(plan.grid.sigmas, wanted, strict=False)) < 1e-6
    assert list(plan.grid.timesteps) == [int(1000 * s) for s in plan.grid.sigmas[:-1]]
    assert [s.runs for s in plan.steps] == ["small"] * k + ["large"] * n_large
    assert not any(s.blended for s in plan.steps)


def test_one_clock_is_wans_own_grid():
    for n in (1, 7, 50):
        assert clock_grid([(n, n)], 5.0) == time_grid(n, 5.0)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
def test_noise_only_falls(pairs):
    clocks = [(min(a, b), max(a, b) + 1) for a, b in pairs[:-1]] + [(pairs[-1][0],) * 2]
    grid = clock_grid(clocks, 5.0)
    assert all(a > b for a, b in zip(grid.sigmas, grid.sigmas[1:], strict=False))


def test_the_solvers_history_is_kept_across_the_seam():
    """UniPC on the joint grid is UniPC on those sigmas: the step after the seam is of order 2."""
    grid = clock_grid([(4, 10), (4, 4)], 3.0)
    table = make_solver("unipc", grid).table
    assert table == unipc_table(grid)
    assert len(table[4].predictor) == 3 and table[4].corrector is not None
    x = torch.randn(1, 2, 1, 3, 3, dtype=torch.float64)
    exact = lambda sigma: (1 - sigma) * 2.0 + sigma * x  # a straight path to 2
    solver, latents = make_solver("unipc", grid), exact(grid.sigmas[0])
    for i in range(len(grid)):
        latents = solver.step(i, latents, x - 2.0)
        assert torch.allclose(latents, exact(grid.sigmas[i + 1]), atol=1e-6)


class Teacher:
    """A generator that knows the clean latents: v = (x - clean) / sigma."""

    def __init__(self, clean):
        self.clean, self.seen = clean, []

    def prepare(self, embeds):
        return embeds

    def velocity(self, latents, timestep, context):
        self.seen.append((float(timestep), latents.clone()))
        return (latents - self.clean) / (float(timestep) / 1000)


def test_renoising_begins_a_new_leg_on_the_formula():
    grid = clock_grid([(3, 3), (2, 2)], 3.0, {1: 0.75})
    assert grid.restarts == (3,) and abs(grid.sigmas[3] - 0.75) < 1e-6
    legs = grid.legs()
    assert [len(leg) for leg in legs] == [3, 2] and legs[0].sigmas[-1] == 0
    assert make_solver("unipc", grid).table == [*unipc_table(legs[0]), *unipc_table(legs[1])]
    assert make_solver("euler", grid).table == [*euler_table(legs[0]), *euler_table(legs[1])]
    plan = parse_plan("small:3 renoise=0.75 large:2", GRID)
    assert [s.renoise for s in plan.steps] == [False] * 3 + [True, False]
    noise = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    a, b = torch.full((2, 4, 1, 4, 4), 2.0), torch.full((2, 4, 1, 4, 4), -1.0)
    small, large = Teacher(a), Teacher(b)
    prompts = dict.fromkeys(("small", "large"), Prompt(torch.zeros(2, 1, 4)))
    out = sample(
        noise,
        plan,
        {"small": small, "large": large},
        prompts,
        Guidance.of(1.0),
        solver="unipc",
        kernels="torch",
        hooks=Hooks(noise_rng=torch.Generator().manual_seed(3)),
    )
    eps = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    clean = small.seen[-1][1]  # near the small one's clip, which the integer timestep misses a bit
    assert (clean - a).abs().mean() < 2
    reached = (large.seen[0][1] - 0.75 * eps) / 0.25
    assert (reached - a).abs().max() < 0.05  # (1 - sigma) x_S + sigma eps
    assert (out - b).abs().max() < 0.05


def test_a_clips_noise_is_its_own_whatever_its_batch():
    plan = parse_plan("small:2 renoise=0.6 large:2", GRID)
    run = lambda noise, seeds: sample(
        noise,
        plan,
        {n: Teacher(torch.zeros(1)) for n in ("small", "large")},
        dict.fromkeys(("small", "large"), Prompt(torch.zeros(len(noise), 1, 4))),
        Guidance.of(1.0),
        kernels="torch",
        hooks=Hooks(noise_rng=[torch.Generator().manual_seed(s) for s in seeds]),
    )
    noise = torch.randn(2, 4, 1, 4, 4)
    both = run(noise, (4, 9))
    assert torch.allclose(both[1:], run(noise[1:], (9,)), atol=1e-6)


def test_three_segments_and_a_bridge():
    plan = parse_plan("small:4/10 bridge:2/8 large:4", GRID)
    assert [s.runs for s in plan.steps] == ["small"] * 4 + ["both"] * 2 + ["large"] * 4
    assert [round(s.w, 2) for s in plan.steps[3:7]] == [1.0, 0.75, 0.25, 0.0]
    seam = 0.999 * 0.6
    us = [seam * (1 - j / 8) for j in range(2)] + [seam * 0.75 * (1 - j / 4) for j in range(4)]
    got = plan.grid.sigmas[4:-1]
    assert max(abs(a - b) for a, b in zip(got, sigmas(3.0, us), strict=True)) < 1e-6
    assert parse_plan(plan.name, GRID) == plan  # a plan's name is its words


@pytest.mark.parametrize(
    "spec, code, param",
    [
        ("small:4/10 large:3/4", "mismatch", "clock"),
        ("small:12/10 large:4", "out_of_range", "clock"),
        ("small:10/10 large:4", "invalid_value", "clock"),
        ("small:4/10 large:*", "conflict", "steps"),
        ("small:40% renoise=0.5 large:4", "conflict", "steps"),
        ("small:4 renoise=1.5 large:4", "out_of_range", "renoise"),
        ("renoise=0.5 large:4", "invalid_value", "renoise"),
        ("small:4 renoise=0.5", "missing", "renoise"),
        ("small:4 renoise=0.5 renoise=0.4 large:2", "duplicate", "renoise"),
        ("small:4 renoise=x large:2", "invalid_type", "renoise"),
        ("small:4/0 large:4", "out_of_range", "clock"),
        ("small:4/9999999 large:4", "out_of_range", "clock"),
        ("medium:4/10 large:4", "unknown_name", "segment"),
    ],
)
def test_wrong_words_are_refused(spec, code, param):
    with refuses(code, param, InputError):
        parse_plan(spec, GRID)


@pytest.mark.parametrize("spec", ["small:4/10 large:4", "small:10 renoise=0.75 large:4@2[0:2]"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 14, 20, 50, 200])
def test_a_plan_over_another_number_of_steps(spec, steps):
    new = scaled(spec, steps)
    plan = parse_plan(new, GRID)
    assert len(plan) == steps and has_clocks(new)
    if steps >= 14:
        old = parse_plan(spec, GRID)
        share = lambda p: sum(s.small for s in p.steps) / len(p)
        assert abs(share(plan) - share(old)) < 0.05


def test_the_call_takes_its_steps_from_the_plan(tiny_pipe):
    plan = tiny_pipe.make_plan("small:2/4 large:2")
    assert len(plan) == 4 and len(tiny_pipe.make_plan("small:2/4 large:2", 4)) == 4
    with refuses("conflict", "num_inference_steps", InputError):
        tiny_pipe.make_plan("small:2/4 large:2", 9)
    out, again = (
        tiny_pipe(
            "a red circle",
            plan="small:2 renoise=0.5 large:2",
            width=48,
            height=32,
            num_frames=5,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        for _ in range(2)
    )
    assert out.plan.name == "small:2 renoise=0.5 large:2" and torch.isfinite(out.frames).all()
    assert torch.equal(out.frames, again.frames)


def test_the_command_prints_forwards(capsys):
    from nexus_rt.cli import main

    words = "small:4/10 large:4@2/guidance-every=2"
    assert main(["plan", "--plan", words, "--costs", "2,12", "--guidance", "5"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"8 small and 6 large forwards, 44\.0 ms", out)
    rows = [line.split() for line in out.splitlines() if re.match(r"\s+\d+ +\d+ ", line)]
    assert len(rows) == 8
