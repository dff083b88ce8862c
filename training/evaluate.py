"""How often does a plan show what its prompt asks for? Generates prompts through the mini pair and checks the pixels.

    python -m training.evaluate --count 240 --plans small large reference handoff=0.3 --json training/results.json

Reports shape, colour, motion and all three with 95% (Wilson) intervals, for prompts whose (shape, colour, motion) was
in the training captions and for those held out of them; the checker's score on true renderings and what chance
would score stand beside them. `fidelity` is the distance of the clips' radial power spectrum to that of true
renderings of the same scenes (mean absolute difference of log10 power; 0 is identical).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from nexus_rt import NexusPipeline
from training import world
from training.checker import chance, look


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share."""
    if not count:
        return 0.0, 1.0
    z, p = 1.96, right / count
    middle, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def spectrum(frames: np.ndarray) -> np.ndarray:
    """Radial power spectrum [bins] of the luminance of frames [N, H, W, 3], log10."""
    grey = frames.mean(-1)
    power = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))) ** 2
    f = np.fft.fftfreq(grey.shape[1])
    radius = np.hypot(f[:, None], f[None]) * grey.shape[1]
    bins = np.clip(radius.astype(int), 1, grey.shape[1] // 2) - 1
    total = np.bincount(bins.ravel(), power.mean(0).ravel())
    return np.log10(total / np.bincount(bins.ravel()) + 1e-9)


def score(seen: list, scenes: list[world.Scene]) -> dict:
    """Shares right of shape, colour, motion and all three, with the interval of the last."""
    hits = np.array([s.matches(scene) for s, scene in zip(seen, scenes, strict=True)]).reshape(-1, 3)
    everything = int(hits.all(1).sum())
    low, high = wilson(everything, len(hits))
    names = ("shape", "colour", "motion")
    return {
        "prompts": len(hits), **{n: round(float(hits[:, i].mean()), 4) if len(hits) else None for i, n in enumerate(names)},
        "all": round(everything / max(1, len(hits)), 4), "interval": [round(low, 4), round(high, 4)],
    }  # fmt: skip


def evaluate(pipe: NexusPipeline, plans: list[str], count: int, seed: int, batch: int, guidance: float | None) -> dict:
    rng = np.random.default_rng(seed)
    scenes = [world.sample_scene(rng, training=False) for _ in range(count)]
    d = pipe.defaults
    true = np.stack([(world.render(s, rng, d.num_frames, d.height).transpose(0, 2, 3, 1) + 1) / 2 for s in scenes])
    target = spectrum(true[:, ::4].reshape(-1, *true.shape[2:]))
    rows = {"true renderings": {**score([look(v) for v in true], scenes), "fidelity": 0.0}}
    for plan in plans:
        seen, clips, start = [], [], time.time()
        for i in range(0, count, batch):
            part = scenes[i : i + batch]
            noise = [torch.Generator().manual_seed(seed * 100003 + i + k) for k in range(len(part))]
            out = pipe([world.caption(s) for s in part], plan=plan, generator=noise, guidance_scale=guidance)
            seen += [look(v) for v in out.frames]
            clips.append(out.frames[:, ::4])
        frames = np.concatenate(clips)
        fidelity = float(np.abs(spectrum(frames.reshape(-1, *frames.shape[2:])) - target).mean())
        held = [world.held_out(s) for s in scenes]
        scale = d.guidance_scale if guidance is None else guidance
        rows[plan] = {
            **score(seen, scenes), "fidelity": round(fidelity, 4),
            "held_out": score(*[[x for x, h in zip(xs, held, strict=True) if h] for xs in (seen, scenes)]),
            "forwards": pipe.make_plan(plan).evaluations(scale, scale),
            "seconds_a_clip": round((time.time() - start) / count, 2),
        }  # fmt: skip
        print(plan, json.dumps(rows[plan]), flush=True)
    return {"prompts": count, "seed": seed, "chance": {k: round(v, 4) for k, v in chance().items()}, "plans": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--pair", type=Path, help="a pair folder (default: the mini pair)")
    parser.add_argument("--plans", nargs="+", default=["small", "large", "reference", "handoff=0.3"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pipe = NexusPipeline.from_pretrained(args.pair)
    pipe.set_progress_bar_config(disable=True)
    result = evaluate(pipe, args.plans, args.count, args.seed, args.batch, args.guidance)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
