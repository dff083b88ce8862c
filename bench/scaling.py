"""How latency grows: a guided step with frames, frame size and batch, a clip with steps, and what
fits the growth.

A step is fitted as `fixed + linear n + quadratic n^2` over the tokens n of its batch (launches;
linear layers; attention, which is quadratic in the tokens of a clip, so that over batches there is
no such term), a clip as `fixed + each steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from nexus_rt.bench.latency import Clip, denoised, prompts_of
from nexus_rt.core.size import ClipSize
from nexus_rt.core.timing import median_ms
from nexus_rt.pipeline.pipeline import NexusPipeline

# shares of the clip's
FRAMES, SIZES = (
    (0.25, 0.5, 1.0, 2.0, 3.0, 4.0),
    (0.5, 0.75, 1.0, 1.5, 2.0, 2.5),
)
BATCHES, STEPS = (1, 2, 3, 4), (0.25, 0.5, 1.0, 1.5)


def fit(x: list[float], y: list[float], powers: tuple[int, ...]) -> dict[str, Any]:
    """Least squares of y over powers of x, relative errors weighted alike; r2 is of y itself."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    scale = a.max()
    columns = np.stack([(a / scale) ** p for p in powers], 1) / b[:, None]
    coefficients, *_ = np.linalg.lstsq(columns, np.ones(len(b)), rcond=None)
    guess = (columns * b[:, None]) @ coefficients
    rest = float(((b - guess) ** 2).sum() / ((b - b.mean()) ** 2).sum()) if len(set(y)) > 1 else 0.0
    return {
        "powers": list(powers),
        "coefficients": [float(c / scale**p) for c, p in zip(coefficients, powers, strict=True)],
        "r2": round(1 - rest, 5),
    }


def curve(
    points: list[dict[str, float]], unit: str, powers: tuple[int, ...], left_out: list[list[int]]
) -> dict[str, Any]:
    """Points and what fits them over their `unit`; no fit of as few as its coefficients."""
    x, ms = [p[unit] for p in points], [p["ms"] for p in points]
    line = fit(x, ms, powers) if len(points) > len(powers) else None
    return {"points": points, "fit": line, "out_of_memory": left_out}


def _near(value: float, unit: int, least: int) -> int:
    return max(least, round(value / unit) * unit)


def variants(pipe: NexusPipeline, clip: Clip) -> dict[str, list[tuple[int, ClipSize]]]:
    """(batch, size) of every axis, around a clip's."""
    unit_h, unit_w = (8 * p for p in pipe.patch[1:])
    width, height, own = clip.size
    frames = [4 * _near((own - 1) / 4 * f, 1, 0) + 1 for f in FRAMES]
    sizes = [(_near(width * f, unit_w, unit_w), _near(height * f, unit_h, unit_h)) for f in SIZES]
    return {
        "frames": [(1, ClipSize(width, height, f)) for f in dict.fromkeys(frames)],
        "size": [(1, ClipSize(*s, own)) for s in dict.fromkeys(sizes)],
        "batch": [(b, clip.size) for b in BATCHES],
    }


@torch.no_grad()
def scaling(
    pipe: NexusPipeline, clip: Clip, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """A guided step of every generator over each axis, and a whole denoising over numbers of steps.

    A point that runs out of memory is left out and named.
    """
    prompts = prompts_of(pipe, clip)
    axes: dict[str, dict[str, Any]] = {}
    timestep = torch.tensor(500.0, device=pipe.device)
    for axis, clips in variants(pipe, clip).items():
        say(f"scaling over {axis}")
        for name, engine in pipe.engines.items():
            points: list[dict[str, float]] = []
            left_out: list[list[int]] = []
            for batch, size in clips:
                rows_of_prompt = [
                    rows.repeat(batch, 1, 1)
                    for rows in (prompts[name].conditional, prompts[name].unconditional)
                    if rows is not None
                ]
                try:
                    context = engine.prepare(torch.cat(rows_of_prompt))
                    noise = pipe.prepare_latents(batch, size, torch.Generator().manual_seed(0))
                    call = partial(engine.velocity, noise, timestep, context)
                    ms = median_ms(call, repeats, 1, pipe.device)
                except torch.OutOfMemoryError:
                    left_out.append([batch, *size])
                    continue
                points.append(
                    {
                        "batch": batch,
                        "frames": size.frames,
                        "height": size.height,
                        "width": size.width,
                        "tokens": 2 * batch * size.tokens(pipe.patch),
                        "ms": round(ms, 3),
                    }
                )
            powers = (0, 1) if axis == "batch" else (0, 1, 2)
            axes.setdefault(axis, {})[name] = curve(points, "tokens", powers, left_out)
    say("scaling over steps")
    points = []
    for count in dict.fromkeys(_near(clip.steps * s, 1, 2) for s in STEPS):
        plan = pipe.make_plan(None, count)
        ms = median_ms(partial(denoised, pipe, clip, plan), max(2, repeats // 2), 1, pipe.device)
        points.append({"steps": count, "ms": round(ms, 3)})
    name = pipe.defaults.plan if len(pipe.engines) > 1 else next(iter(pipe.engines))
    axes["steps"] = {name: curve(points, "steps", (0, 1), [])}
    return axes
