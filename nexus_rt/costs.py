"""What a step costs here: each part of a denoising step timed on the engines, the size and the device of the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from nexus_rt.denoise import Prompt
from nexus_rt.engines.base import Engine
from nexus_rt.ops import choose_ops
from nexus_rt.plan import StepCosts
from nexus_rt.solver import make_solver, time_grid
from nexus_rt.upfb import BlendConfig, combine
from nexus_rt.velocity import Prediction


def median_ms(call: Callable[[], object], repeats: int = 5, warmup: int = 2, cuda: bool = False) -> float:
    """Median milliseconds of a call."""
    durations = []
    for i in range(warmup + repeats):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        if i >= warmup:
            durations.append(1000 * (time.perf_counter() - start))
    return median(durations)


@torch.no_grad()
def measure_step_costs(
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Prompt],
    latents: Tensor,
    blend_config: BlendConfig = BlendConfig(),  # noqa: B008 (frozen)
    solver: str = "unipc",
    repeats: int = 5,
    kernels: str = "auto",
) -> StepCosts:
    """Time one guided and one plain step of each engine, the blend and the solver, on latents [B, C, T, H, W].

    An engine that is not there costs 0.
    """
    cuda, fused = latents.is_cuda, choose_ops(kernels, latents.device).name == "triton"
    finish = (lambda p: p) if fused else Prediction.tensor  # fused, guidance is the blend's or the solver's
    timestep = torch.tensor(500.0, device=latents.device)
    cost = {"small": 0.0, "small_guided": 0.0, "large": 0.0, "large_guided": 0.0}
    for name, engine in engines.items():
        prompt = prompts[name]
        plain = engine.prepare(prompt.conditional)
        cost[name] = median_ms(lambda e=engine, c=plain: e.velocity(latents, timestep, c), repeats, cuda=cuda)
        if prompt.unconditional is not None:
            both = engine.prepare(torch.cat([prompt.conditional, prompt.unconditional]))
            cost[f"{name}_guided"] = median_ms(
                lambda e=engine, c=both: finish(Prediction.of(e.velocity(latents, timestep, c), 5.0)), repeats, cuda=cuda
            )
    both = Prediction(latents), Prediction(latents)
    blended = median_ms(lambda: combine(*both, 0.5, blend_config, fused=fused), repeats, cuda=cuda)
    solve = make_solver(solver, time_grid(50), fused)
    for i in range(2):  # fill its history
        solve.step(i, latents, latents)
    solved = median_ms(lambda: solve.step(2, latents, latents), repeats, cuda=cuda)
    return StepCosts(**cost, blend=blended, solver=solved)
