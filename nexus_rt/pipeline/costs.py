"""What a step costs here: each part of a denoising step timed on the engines, the size and the
device of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor

from nexus_rt.core.devices import synchronize
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.engine import Engine
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Prediction
from nexus_rt.method.plan import StepCosts
from nexus_rt.method.solver import make_solver, time_grid
from nexus_rt.method.upfb import combine
from nexus_rt.ops.block_ops import choose_ops


def medians_ms(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 5,
    warmup: int = 2,
    cuda: bool | torch.device = False,
) -> dict[str, float]:
    """Median milliseconds of every call, taken in turn, so that each finds the caches as the others
    leave them.

    cuda: the device to wait for; True is the current GPU.
    """
    device = cuda if isinstance(cuda, torch.device) else torch.device("cuda" if cuda else "cpu")
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if i >= warmup:
                durations[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in durations.items()}


def median_ms(
    call: Callable[[], object],
    repeats: int = 5,
    warmup: int = 2,
    cuda: bool | torch.device = False,
) -> float:
    """Median milliseconds of a call."""
    return medians_ms({"": call}, repeats, warmup, cuda)[""]


def step_calls(
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Prompt],
    latents: Tensor,
    blend_config: BlendConfig = BlendConfig(),  # noqa: B008 (frozen)
    solver: str = "unipc",
    kernels: str = "auto",
) -> dict[str, Callable[[], object]]:
    """What `StepCosts` prices, each as a call: one guided and one plain step of each engine, the
    blend and the solver, on latents [B, C, T, H, W]."""
    use_triton = choose_ops(kernels, latents.device).name == "triton"
    # by Triton, guidance is the blend's or the solver's
    finish = (lambda p: p) if use_triton else Prediction.tensor
    timestep = torch.tensor(500.0, device=latents.device)
    calls: dict[str, Callable[[], object]] = {}
    for name, engine in engines.items():
        prompt = prompts[name]
        plain = engine.prepare(prompt.conditional)
        calls[name] = partial(engine.velocity, latents, timestep, plain)
        if prompt.unconditional is not None:
            both = engine.prepare(torch.cat([prompt.conditional, prompt.unconditional]))
            guided = partial(engine.velocity, latents, timestep, both)
            calls[f"{name}_guided"] = lambda call=guided: finish(Prediction.of(call(), 5.0))  # type: ignore[misc]
    pair = Prediction(latents), Prediction(latents)
    calls["blend"] = lambda: combine(*pair, 0.5, blend_config, use_triton=use_triton)
    solve = make_solver(solver, time_grid(50), use_triton)
    for i in range(2):  # fill its history
        solve.step(i, latents, latents)
    calls["solver"] = lambda: solve.step(2, latents, latents)
    return calls


@torch.no_grad()
def measure_step_costs(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 5,
    warmup: int = 2,
    cuda: bool | torch.device = False,
) -> StepCosts:
    """Prices of `step_calls`, taken in turn. An engine that is not there costs 0."""
    nothing = {"small": 0.0, "small_guided": 0.0, "large": 0.0, "large_guided": 0.0}
    return StepCosts(**nothing | medians_ms(calls, repeats, warmup, cuda))
