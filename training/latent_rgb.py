"""The previews' linear map of the mini pair's latents (`nexus_rt/serve/latent_rgb.json`): fitted on
64 clips of captions, its error printed on 32 others.

    python -m training.latent_rgb
"""

from __future__ import annotations

import json

import numpy as np
import torch

from nexus_rt import NexusPipeline
from nexus_rt.bench.shapes.world import caption, sample_scene
from nexus_rt.serve.preview import LatentRGB, fit


def clips(pipe: NexusPipeline, seed: int, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Latents and frames of captions of random scenes."""
    rng = np.random.default_rng(seed)
    prompts = [caption(sample_scene(rng)) for _ in range(count)]
    noise = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    latents = pipe(prompts, generator=noise, output_type="latent").frames
    return latents, pipe.decode(latents)


def error(made: LatentRGB, latents: torch.Tensor, frames: np.ndarray) -> float:
    """RMS difference, in [0, 1], of the middle frames from those of the clips, cell by cell."""
    total = 0.0
    for one, clip in zip(latents, frames, strict=True):
        t, h, w = one.shape[1:]
        at = round(0.5 * (t - 1))
        pixels = clip[max(0, 4 * at - 3) : 4 * at + 1].mean(axis=0)
        cells = pixels.reshape(h, 8, w, 8, 3).mean(axis=(1, 3))
        total += float(((made.frame(one) / 255 - cells) ** 2).mean())
    return (total / len(latents)) ** 0.5


def main() -> None:
    pipe = NexusPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    made = fit(*clips(pipe, 9000, 64))
    print(json.dumps({"factors": made.factors, "bias": made.bias}))
    print(f"RMS error on other clips: {error(made, *clips(pipe, 9500, 32)):.3f}")


if __name__ == "__main__":
    main()
