"""The loop alone, driven by analytic velocity fields: no model, the engine protocol only."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch

from nexus_rt.core.errors import Cancelled, InputError, NumericsError
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.finite_check import FiniteCheck
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Guidance
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.loop import denoise, sample
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.solver import make_solver
from nexus_rt.method.time_grid import time_grid
from nexus_rt.method.upfb import blend
from tests.refusals import refuses
from tests.test_upfb import oracle

B, C, T, H, W = 2, 3, 2, 6, 10
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


class Field:
    """An engine whose velocity is a formula of latents, time and prompt; it records its calls."""

    def __init__(self, rate: float, curve: float = 0.0) -> None:
        self.rate, self.curve, self.calls, self.prepared = rate, curve, [], 0

    def prepare(self, context):
        self.prepared += 1
        return context.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)  # one number a sample

    def velocity(self, latents, timestep, context):
        self.calls.append((float(timestep), len(context)))
        x = latents.repeat(len(context) // len(latents), 1, 1, 1, 1)
        return self.rate * x + self.curve * torch.sin(x + timestep / 1000) + context


def prompts(both=("small", "large")):
    prompt = Prompt(torch.full((B, 4, 8), 0.3), torch.full((B, 4, 8), -0.1))
    return dict.fromkeys(both, prompt)


def noise():
    return torch.randn(B, C, T, H, W, generator=torch.Generator().manual_seed(3))


def test_one_generator_reaches_the_exact_solution():
    """x' = a x + c has a closed form; UniPC over 200 steps of the true grid gets there."""
    plan = parse_plan("small", time_grid(200, 1.0))
    x = sample(noise(), plan, {"small": Field(0.8)}, prompts(), Guidance.of(1.0))
    s = -plan.grid.sigmas[0]
    exact = (noise() + 0.3 / 0.8) * math.exp(0.8 * s) - 0.3 / 0.8
    assert (x - exact).abs().max() <= 2e-3


@pytest.mark.parametrize(
    "kernels, solver, split",
    [
        *(
            ("torch", solver, split)
            for solver in ("euler", "unipc")
            for split in ("gaussian", "dct")
        ),
        *(
            pytest.param("triton", *rest, marks=needs_triton)
            for rest in (("unipc", "gaussian"), ("euler", "gaussian"))
        ),
        pytest.param("triton", "unipc", "dct", marks=[needs_triton, pytest.mark.exhaustive]),
    ],
)
@pytest.mark.parametrize(
    "spec", ["reference", "auto=0.1", "small:3 bridge:4 large:5", "large:4 bridge:2 small:6@1"]
)
def test_the_loop_is_plan_times_blend_times_solver(spec, split, solver, kernels):
    grid = time_grid(12, 5.0)
    plan = parse_plan(spec, grid)
    fields = {"small": Field(0.7, 0.2), "large": Field(0.4, 0.5)}
    config = BlendConfig(split=split, lowpass="butterworth")
    got = sample(
        noise(),
        plan,
        fields,
        prompts(),
        Guidance.of(4.0, 2.0),
        blend=config,
        solver=solver,
        kernels=kernels,
    )

    x, solve = noise(), make_solver(solver, grid)
    for i, step in enumerate(plan.steps):
        v = {}
        for name, scale, rate, curve in (("small", 4.0, 0.7, 0.2), ("large", 2.0, 0.4, 0.5)):
            own = getattr(step, f"guidance_{name}")
            scale = scale if own is None else own
            field = rate * x + curve * torch.sin(x + grid.timesteps[i] / 1000)
            v[name] = field + (-0.1) + scale * 0.4  # unconditional -0.1, conditional 0.3
        if step.small and step.large:
            u = blend(v["small"], v["large"], step.w, config, step.energy)
        elif spec.startswith("auto"):
            u = blend(
                v["small"] if step.small else None,
                v["large"] if step.large else None,
                step.w,
                config,
                step.energy,
            )
        else:
            u = v["small"] if step.small else v["large"]
        x = solve.step(i, x, u)
    assert torch.allclose(got, x, atol=1e-4)


def test_only_what_the_plan_says_runs_and_contexts_are_prepared_once():
    grid = time_grid(12, 5.0)
    plan = parse_plan("small:3 bridge:4 large:5@1", grid)
    fields = {"small": Field(0.7), "large": Field(0.4)}
    sample(noise(), plan, fields, prompts())
    assert [t for t, _ in fields["small"].calls] == list(map(float, grid.timesteps[:7]))
    assert [t for t, _ in fields["large"].calls] == list(map(float, grid.timesteps[3:]))
    assert {n for _, n in fields["small"].calls} == {2 * B}  # guidance as one batch of two
    assert {n for _, n in fields["large"].calls} == {B}  # no guidance: one forward
    assert fields["small"].prepared == 1 and fields["large"].prepared == 1


def test_reference_plan_runs_both_everywhere():
    plan = parse_plan("reference", time_grid(7))
    fields = {"small": Field(0.7), "large": Field(0.4)}
    sample(noise(), plan, fields, prompts())
    assert len(fields["small"].calls) == len(fields["large"].calls) == 7


@pytest.mark.parametrize("generator, index", [("small", 2), ("large", 5)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_velocity_that_is_not_finite_names_generator_and_step(generator, index, value):
    grid = time_grid(8)

    class Bad(Field):
        def velocity(self, latents, timestep, context):
            v = super().velocity(latents, timestep, context)
            if int(timestep) == grid.timesteps[index]:
                v[1, 0, 0, 0, 0] = value
            return v

    fields = {"small": Field(0.7), "large": Field(0.4), generator: Bad(0.5)}
    with pytest.raises(
        NumericsError,
        match=rf"the {generator} generator.*step {index} \(timestep {grid.timesteps[index]}\)",
    ):
        sample(noise(), parse_plan("reference", grid), fields, prompts())


def test_cancellation_stops_before_the_next_step():
    seen = []
    with refuses("cancelled", kind=Cancelled):
        sample(
            noise(),
            parse_plan("small", time_grid(8)),
            {"small": Field(0.7)},
            prompts(),
            hooks=Hooks(
                on_step=lambda s, x: seen.append(s.index), should_stop=lambda: len(seen) == 3
            ),
        )
    assert seen == [0, 1, 2]


def test_a_callback_may_replace_the_latents():
    plan = parse_plan("small", time_grid(4))
    x = sample(
        noise(),
        plan,
        {"small": Field(0.7)},
        prompts(),
        hooks=Hooks(on_step=lambda s, x: torch.zeros_like(x) if s.index == 3 else None),
    )
    assert torch.count_nonzero(x) == 0


def test_a_missing_generator_and_missing_negatives_are_named():
    with refuses("missing", "large", InputError):
        sample(noise(), parse_plan("reference", time_grid(4)), {"small": Field(0.7)}, prompts())
    unguided = {"small": Prompt(torch.ones(B, 4, 8))}
    with refuses("missing", "negative_prompt_embeds", InputError):
        sample(noise(), parse_plan("small", time_grid(4)), {"small": Field(0.7)}, unguided)
    sample(
        noise(),
        parse_plan("small", time_grid(4)),
        {"small": Field(0.7)},
        unguided,
        Guidance.of(1.0),
    )


def test_the_callers_latents_are_left_alone():
    x = noise()
    sample(
        x,
        parse_plan("reference", time_grid(4)),
        {"small": Field(0.7), "large": Field(0.4)},
        prompts(),
    )
    assert torch.equal(x, noise())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_made_to_wait_for_the_checks():
    """A step's check is read when the next step has been queued; the last one still raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch = FiniteCheck({"small": None})
        plan = parse_plan("small", time_grid(2))
        watch.add(torch.ones(4, device="cuda"), "small", plan.steps[0])
        watch.raise_if_bad(before=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(watch.sums) == 1
    watch.raise_if_bad(before=1)
    assert not watch.sums


def test_checks_are_settled_in_order_up_to_a_step():
    plan = parse_plan("small", time_grid(3))
    watch = FiniteCheck({"small": None})
    for step in plan.steps:
        watch.add(torch.full((2,), math.nan if step.index == 1 else 1.0), "small", step)
    watch.raise_if_bad(before=1)
    assert [s.index for _, _, s in watch.sums] == [1, 2]
    with refuses("not_finite", "small", NumericsError):
        watch.raise_if_bad(before=3)


@pytest.mark.parametrize("spec", ["reference", "handoff=0.4,bridge=5", "small:5 large:7", "auto"])
@pytest.mark.parametrize("split", ["gaussian", "dct"])
def test_the_loop_with_plain_functions_is_the_oracle_of_the_real_one(spec, split):
    """Two lambdas, the blend from its formula and Euler, in float64, against engines, kernels'
    interfaces and solvers in float32."""
    config = BlendConfig(split=split, lowpass="butterworth")
    plan = parse_plan(spec, time_grid(12))
    sigmas = plan.grid.sigmas
    field = lambda gain: lambda x, step: torch.sin(gain * x) + 0.3 * x + step.timestep / 1000

    def bridge(v_small, v_large, step):
        if v_small is None:
            return v_large
        if v_large is None and not (step.blended and split == "gaussian"):
            return v_small
        v_large = torch.zeros_like(v_small) if v_large is None else v_large  # w is 1
        return torch.from_numpy(oracle(v_small, v_large, step.w, config, step.energy))

    euler = lambda step, x, v: x + (sigmas[step.index + 1] - step.sigma) * v
    generators = {"small": field(0.8), "large": field(1.3)}
    wanted = denoise(noise().double(), plan, generators, bridge, euler)

    class Plain:
        def __init__(self, gain):
            self.field = field(gain)

        def prepare(self, context):
            return context

        def velocity(self, latents, timestep, context):
            return self.field(latents, SimpleNamespace(timestep=float(timestep)))

    engines = {"small": Plain(0.8), "large": Plain(1.3)}
    got = sample(noise(), plan, engines, prompts(), Guidance.of(1.0), blend=config, solver="euler")
    assert wanted.dtype == torch.float64
    assert (got.double() - wanted).norm() <= 1e-6 * wanted.norm()
