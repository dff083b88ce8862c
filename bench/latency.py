"""The suite: plans and engines end to end and by part, each with what its speed costs in quality.

A row is a plan on an engine. Its clip is the prompt's, from one seed; its total goes from the
prompt to the mp4 file. Warm runs of all rows are taken in turn. Cold is a pipeline read from its
folder again and its first call, in this process: packages are imported by then.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_rt.bench.measure import (
    Run,
    interleaved,
    measured,
    percentile,
    step_durations,
)
from nexus_rt.bench.pictures import thumbnail
from nexus_rt.bench.quality import distance, mini_accuracy
from nexus_rt.core.devices import synchronize
from nexus_rt.core.errors import Cancelled
from nexus_rt.core.limits import Scale
from nexus_rt.core.part_files import scratch_folder
from nexus_rt.core.size import ClipSize
from nexus_rt.core.tracing import span
from nexus_rt.media.video import save_video
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.generator import Prompt
from nexus_rt.method.plan import Plan, StepCosts
from nexus_rt.method.plan_options import has_clocks
from nexus_rt.method.time_grid import TimeGrid
from nexus_rt.pipeline.costs import measure_step_costs, step_calls
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.pipeline.request import make_guidance
from nexus_rt.pipeline.settings import CallSettings

COMPONENTS = (
    "text",
    "understanding",
    "connector",
    "prepare",
    "small",
    "large",
    "blend",
    "solver",
    "swap",
    "vae",
    "encode-to-mp4",
)


@dataclass
class Clip:
    """What is generated. prompt None: `embeds` are given instead. accuracy: riddles to score each
    row with."""

    size: ClipSize
    steps: int
    seed: int = 0
    prompt: str | None = None
    embeds: dict[str, Tensor] = field(default_factory=dict)
    accuracy: int = 0

    @property
    def inputs(self) -> dict[str, Any]:
        """Prompt and size, as a call takes them."""
        return {**self.size.options, **({"prompt": self.prompt} if self.prompt else self.embeds)}

    def plan(self, pipe: NexusPipeline, plan: str) -> Plan:
        """A plan of the clip's number of steps, or of its own clocks."""
        return pipe.make_plan(plan, self.steps_of(plan))

    def steps_of(self, plan: str) -> int | None:
        """The number of steps to ask of a plan; None for one that has its own clocks."""
        return None if has_clocks(plan) else self.steps

    def noise(self, pipe: NexusPipeline) -> Tensor:
        return pipe.prepare_latents(1, self.size, torch.Generator().manual_seed(self.seed))


def prompts_of(pipe: NexusPipeline, clip: Clip) -> dict[str, Prompt]:
    """What each generator is told of a clip."""
    if clip.prompt:
        return pipe.encode(clip.prompt, single_frame=clip.size.frames == 1)
    return dict.fromkeys(pipe.engines, Prompt(*clip.embeds.values()))


def denoised(pipe: NexusPipeline, clip: Clip, plan: Plan) -> Any:
    """A clip's final latents by a plan."""
    noise = clip.noise(pipe)
    return pipe(plan=plan, latents=noise, output_type="latent", **clip.inputs).frames


def generate(
    pipe: NexusPipeline, plan: str, clip: Clip, folder: Path | None
) -> tuple[Tensor, np.ndarray | None]:
    """One clip from the prompt to an mp4 in `folder`: its latents, and its frames where there is a
    VAE. folder None: frames are not written."""
    latents = denoised(pipe, clip, clip.plan(pipe, plan))
    if pipe.vae is None:
        return latents, None
    frames = pipe.decode(latents, "np", rescue=folder)
    if folder is not None:
        with span("encode-to-mp4"):
            save_video(frames[0], folder / "clip.mp4")
    return latents, frames[0]


def read_and_generate(
    make: Callable[[], NexusPipeline], plan: str, clip: Clip, folder: Path
) -> tuple[Tensor, np.ndarray | None]:
    """A pipeline's first clip."""
    return generate(quiet(make()), plan, clip, folder)


def clean_latents(noise: Tensor, after: Tensor, grid: TimeGrid) -> Tensor:
    """Where the first step's velocity points: that step is one of Euler's in every solver here."""
    a, b = grid.sigmas[:2]
    return after - b * (after - noise) / (b - a)


def first_preview(pipe: NexusPipeline, plan: str, clip: Clip) -> float | None:
    """Milliseconds to the first picture that can be shown: the clean latents that the first step's
    velocity points at, of which the first frame is decoded."""
    if (vae := pipe.vae) is None:
        return None
    noise, walked = clip.noise(pipe), clip.plan(pipe, plan)
    done: list[float] = []

    def look(pipe: NexusPipeline, index: int, timestep: int, tensors: dict[str, Tensor]) -> dict:
        vae.decode(clean_latents(noise, tensors["latents"], walked.grid)[:, :, :1])
        synchronize(pipe.device)
        done.append(1000 * (time.perf_counter() - start))
        pipe.cancel()
        return {}

    start = time.perf_counter()
    with contextlib.suppress(Cancelled):  # as asked after the first step
        pipe(
            plan=walked,
            latents=noise,
            output_type="latent",
            callback_on_step_end=look,
            **clip.inputs,
        )
    return done[0] if done else None


@dataclass
class Engine:
    """Something that runs plans. make: reads a pipeline anew, or None where it cannot be read
    twice."""

    name: str
    pipe: NexusPipeline
    make: Callable[[], NexusPipeline] | None = None


def cost_calls(pipe: NexusPipeline, clip: Clip) -> dict[str, Callable[[], object]]:
    """A step's parts, as `nexus-rt plan` prices them."""
    return step_calls(
        pipe.engines, prompts_of(pipe, clip), clip.noise(pipe), BlendConfig(), kernels=pipe.kernels
    )


def middle(costs: list[StepCosts]) -> StepCosts:
    """The median of each price over several measurements."""
    return StepCosts(
        **{k: median(getattr(c, k) for c in costs) for k in StepCosts.__dataclass_fields__}
    )


def scales_of(pipe: NexusPipeline) -> tuple[Scale, Scale]:
    """The pair's own guidance scales, of the small and of the large generator."""
    own = make_guidance(CallSettings(), pipe.defaults)
    return own.small, own.large


def swap_ratio(plan: Plan, durations: list[float]) -> float | None:
    """The first step after the small generator's last, over the median of those that run the large
    alone."""
    alone = [s.index for s in plan.steps if s.large and not s.small]
    if len(alone) < 3 or alone[0] == 0:
        return None
    return durations[alone[0]] / median(durations[i] for i in alone[1:])


def row_of(name: str, plan: Plan, engine: str, clip: Clip, runs: list[Run]) -> dict[str, Any]:
    """The timing columns of a row. Step and component times are medians over the runs."""
    totals = [float(f"{r.total_ms:.5g}") for r in runs]
    steps = [median(v) for v in zip(*(step_durations(r.trace) for r in runs), strict=True)]
    parts = [r.trace.totals() for r in runs]
    device, energy = (
        [r.peak_device for r in runs if r.peak_device],
        [r.energy for r in runs if r.energy is not None],
    )
    host = [r.peak_host for r in runs if r.peak_host]
    ratio = swap_ratio(plan, steps)
    return {
        "plan": name,
        "engine": engine,
        "size": list(clip.size),
        "steps": len(plan),
        "total_duration_ms": median(totals),
        "total_p95_ms": float(f"{percentile(totals, 0.95):.5g}"),
        "total_runs_ms": totals,
        "denoise_ms": round(sum(steps), 3),
        "denoise_steps_ms": [
            {"step": i, "duration_ms": round(ms, 3), "runs": plan.steps[i].runs}
            for i, ms in enumerate(steps)
        ],
        "components_ms": {
            c: round(median(p.get(c, 0.0) for p in parts), 3)
            for c in COMPONENTS
            if any(c in p for p in parts)
        },
        "swap_ratio": None if ratio is None else round(ratio, 3),
        "peak_host_bytes": max(host) if host else None,
        "peak_device_bytes": max(device) if device else None,
        "energy_joules": median(energy) if energy else None,
    }


def suite(
    engines: list[Engine],
    plans: list[str],
    clip: Clip,
    runs: int = 5,
    warmup: int = 2,
    traces: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    pictures: bool = True,
) -> dict[str, Any]:
    """Measure every plan on every engine; the first engine, in PyTorch, gives the reference clip
    and the prices.

    Returns:
        {"rows", "costs", "baseline"}: rows as in a results file; the plan that quality is measured
        against.
    """
    base, rows, all_costs = engines[0].pipe, [], []
    with scratch_folder("nexus-rt-bench") as folder:
        both = len(base.engines) > 1
        baseline = "reference" if both else next(iter(base.engines))
        say(f"the reference clip: {baseline} on {engines[0].name}")
        wanted = generate(base, baseline, clip, folder)
        parts = cost_calls(base, clip)
        measure_step_costs(parts, 1, 1)
        price = lambda: all_costs.append(measure_step_costs(parts, 3, 0, base.device))
        calls = {
            (e.name, p): partial(generate, e.pipe, p, clip, folder) for e in engines for p in plans
        }
        cold: dict[str, float | None] = {}
        for e in engines:
            say(f"{e.name}: cold")
            cold[e.name] = None
            if e.make is not None:
                first = partial(read_and_generate, e.make, plans[0], clip, folder)
                cold[e.name] = measured(first, base.device).total_ms
        say(f"{len(calls)} rows, {warmup} + {runs} runs of each in turn")
        timed = interleaved(calls, base.device, runs, warmup, price)
        for e in engines:
            for name in plans:
                say(f"{name} on {e.name}: quality")
                done, plan = timed[e.name, name], clip.plan(e.pipe, name)
                row = row_of(name, plan, e.name, clip, done)
                row["cold_ms"] = cold[e.name] if name == plans[0] else None
                row["first_preview_ms"] = first_preview(e.pipe, name, clip)
                latents, frames = done[-1].result
                row["quality"] = distance(latents, frames, *wanted)
                if clip.accuracy:
                    row["quality"] |= mini_accuracy(
                        e.pipe, clip.accuracy, plan=plan, **clip.size.options
                    )
                row["thumbnail"] = thumbnail(frames) if pictures and frames is not None else None
                if traces is not None:
                    traces.mkdir(parents=True, exist_ok=True)
                    safe = "".join(
                        c if c.isalnum() or c in "=.-" else "_" for c in f"{e.name}-{name}"
                    )
                    row["trace"] = str(done[-1].trace.save(traces / f"{safe}.json"))
                rows.append(row)
    costs = middle(all_costs)
    for row in rows:
        if row["engine"] == engines[0].name:
            plan = clip.plan(base, row["plan"])
            row |= prediction(plan, costs, scales_of(base), row["denoise_ms"])
    return {
        "rows": rows,
        "costs": {k: round(v, 4) for k, v in vars(costs).items()},
        "baseline": baseline,
    }


def prediction(
    plan: Plan, costs: StepCosts, scales: tuple[Scale, Scale], measured_ms: float
) -> dict[str, float]:
    """The price of a plan's denoising and how far it is from what was measured, as a share of the
    latter."""
    price = plan.price(costs, *scales)
    return {"predicted_ms": round(price, 3), "prediction_error": round(price / measured_ms - 1, 4)}


def quiet(pipe: NexusPipeline) -> NexusPipeline:
    """A pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
