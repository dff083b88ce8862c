"""How latency grows: a guided step with frames, frame size and batch, a clip with steps, and what
fits the growth.

A step is fitted as `fixed + linear n + quadratic n^2` over the tokens n of its batch (launches;
linear layers; attention, which is quadratic in the tokens of a clip, so that over batches there is
no such term), a clip as `fixed + each steps`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nexus_rt.bench.latency import Clip, prompts_of
from nexus_rt.core.size import ClipSize
from nexus_rt.pipeline.costs import median_ms
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
    prompts, axes = prompts_of(pipe, clip), {}
    cuda = pipe.device.type == "cuda"
    timestep = torch.tensor(500.0, device=pipe.device)
    for axis, points in variants(pipe, clip).items():
        say(f"scaling over {axis}")
        for name, engine in pipe.engines.items():
            rows, left_out = [], []
            for batch, size in points:
                prompt = prompts[name]
                pair = torch.cat(
                    [
                        prompt.conditional.repeat(batch, 1, 1),
                        prompt.unconditional.repeat(batch, 1, 1),
                    ]
                )
                try:
                    context = engine.prepare(pair)
                    noise = pipe.prepare_latents(batch, size, torch.Generator().manual_seed(0))
                    call = lambda e=engine, x=noise, c=context: e.velocity(x, timestep, c)
                    ms = median_ms(call, repeats, 1, cuda)
                except torch.OutOfMemoryError:
                    left_out.append([batch, *size])
                    continue
                t, h, w = noise.shape[-3:]
                p = pipe.patch
                tokens = 2 * batch * (t // p[0]) * (h // p[1]) * (w // p[2])
                rows.append(
                    {
                        "batch": batch,
                        "frames": size.frames,
                        "height": size.height,
                        "width": size.width,
                        "tokens": tokens,
                        "ms": round(ms, 3),
                    }
                )
            powers = (0, 1) if axis == "batch" else (0, 1, 2)
            line = (
                fit([r["tokens"] for r in rows], [r["ms"] for r in rows], powers)
                if len(rows) > len(powers)
                else None
            )
            axes.setdefault(axis, {})[name] = {
                "points": rows,
                "fit": line,
                "out_of_memory": left_out,
            }
    say("scaling over steps")
    rows = []
    for count in dict.fromkeys(_near(clip.steps * s, 1, 2) for s in STEPS):
        plan = pipe.make_plan(None, count)
        call = lambda p=plan: pipe(
            plan=p, latents=clip.noise(pipe), output_type="latent", **clip.inputs
        )
        rows.append(
            {"steps": count, "ms": round(median_ms(call, max(2, repeats // 2), 1, cuda), 3)}
        )
    line = (
        fit([r["steps"] for r in rows], [r["ms"] for r in rows], (0, 1)) if len(rows) > 2 else None
    )
    name = pipe.defaults.plan if len(pipe.engines) > 1 else next(iter(pipe.engines))
    axes["steps"] = {name: {"points": rows, "fit": line, "out_of_memory": []}}
    return axes
