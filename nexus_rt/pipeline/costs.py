"""What a step costs here: each part of a denoising step timed on the engines, the size and the
device of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from nexus_rt.core.timing import CPU, medians_ms
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.engine import Engine
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Prediction
from nexus_rt.method.plan import StepCosts
from nexus_rt.method.solver import make_solver
from nexus_rt.method.time_grid import time_grid
from nexus_rt.method.upfb import combine
from nexus_rt.ops.block_ops import choose_ops


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
    runs: int = 5,
    warmup: int = 2,
    device: torch.device = CPU,
) -> StepCosts:
    """Prices of `step_calls`, taken in turn. An engine that is not there costs 0."""
    return StepCosts(**medians_ms(calls, runs, warmup, device))
