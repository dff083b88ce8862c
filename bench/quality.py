"""What a speed costs: how far a clip is from the reference plan's on the same seed, and what it
shows.

PSNR: -10 log10 of the mean squared error of frames in [0, 1]. SSIM: the structural similarity of
luminance (Wang et al. 2004: gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03), mean over
pixels and frames. Latent error: the norm of the difference of final latents over the reference's
norm. Accuracy: of the mini pair's riddles, the share whose shape, colour and motion a checker reads
from the pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels between frames in [0, 1]; infinite where they are equal."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of frames [..., H, W, 3] in [0, 1], at least 11 x 11: 1 where they are
    equal."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    x, y = (torch.as_tensor(v, dtype=torch.float64).flatten(0, -4) @ weights for v in (a, b))
    taps = torch.exp(
        -((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * SIGMA**2)
    )
    taps /= taps.sum()

    def blur(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v[:, None], taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = K1**2, K2**2
    return float(
        ((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean()
    )


def latent_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of `wanted`."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def distance(
    latents: Tensor, frames: np.ndarray | None, wanted: Tensor, wanted_frames: np.ndarray | None
) -> dict[str, Any]:
    """Quality columns of a clip against the reference's; psnr_db is None where the frames are the
    same bits."""
    metrics: dict[str, Any] = {"latent_error": latent_error(latents, wanted)}
    if frames is not None and wanted_frames is not None:
        value = psnr(frames, wanted_frames)
        large = min(frames.shape[-3:-1]) >= WINDOW
        metrics |= {
            "psnr_db": None if math.isinf(value) else value,
            "identical": math.isinf(value),
            "ssim": ssim(frames, wanted_frames) if large else None,
        }
    return metrics


def mini_accuracy(pipe: Any, count: int, batch: int = 6, **options: Any) -> dict[str, Any]:
    """Share of `count` riddles that a pipeline of the mini pair shows, each from a seed of its own.

    Returns:
        {"right", "count", "accuracy"}; options go to the pipeline's call.
    """
    from nexus_rt.bench.shapes.checker import look
    from nexus_rt.bench.shapes.riddles import make_prompts

    prompts, right = make_prompts("riddles", 1, count), 0
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        seeds = [torch.Generator().manual_seed(s) for s in range(count)[part]]
        frames = pipe([p.text for p in prompts[part]], generator=seeds, **options).frames
        right += sum(
            all(look(clip).matches(p.scene)) for clip, p in zip(frames, prompts[part], strict=True)
        )
    return {"right": right, "count": count, "accuracy": right / count}
