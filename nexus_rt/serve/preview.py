"""Previews: latents to a small picture by a linear map, cheap enough for every step.

A latent cell is about a colour, so that a matrix [C, 3] and a bias show what a clip will be. The
maps of known latent spaces are shipped (`latent_rgb.json`): Wan 2.1's is the one that ComfyUI
publishes (comfy/latent_formats.py, `Wan21.latent_rgb_factors`), the mini pair's is fitted here
(`python -m training.latent_rgb`). For another space the map is fitted to a clip of its own.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_rt.core import documents
from nexus_rt.core.devices import send
from nexus_rt.core.errors import InputError

MAPS = Path(__file__).with_name("latent_rgb.json")


@dataclass(frozen=True)
class LatentRGB:
    """`rgb = latent @ factors + bias` in [-1, 1]. factors: [C, 3]; bias: [3]."""

    factors: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    def frames(self, latents: Tensor, at: float = 0.5) -> Tensor:
        """One frame [B, h, w, 3], uint8, of each of clean latents [B, C, T, h, w], on their device;
        at: where in the clip, 0 to 1."""
        picked = latents[:, :, round(at * (latents.shape[2] - 1))].float()
        factors = send(torch.tensor([*self.factors, self.bias]), picked.device)
        rgb = torch.einsum("bchw,cr->bhwr", picked, factors[:-1]) + factors[-1]
        return ((rgb.nan_to_num().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fit(latents: Tensor, frames: np.ndarray, temporal: int = 4) -> LatentRGB:
    """The map that makes the frames of clips of their latents with the least squared error.

    Args:
        latents: [B, C, T, h, w]. frames: [B, F, H, W, 3] in [0, 1]; temporal: frames a latent
            frame after the first.

    Raises:
        InputError: frames that are not these latents'.
    """
    batch, channels, length, height, width = latents.shape
    if frames.shape[:2] != (batch, temporal * (length - 1) + 1) or frames.shape[2] % height:
        raise InputError(
            f"frames have shape {frames.shape}; expected those of latents {tuple(latents.shape)}.",
            code="mismatch",
            param="frames",
        )
    space = frames.shape[2] // height
    cells = frames.reshape(batch, -1, height, space, width, space, 3).mean(axis=(3, 5))
    later = cells[:, 1:].reshape(batch, length - 1, temporal, height, width, 3).mean(axis=2)
    targets = np.concatenate([cells[:, :1], later], axis=1).reshape(-1, 3) * 2 - 1
    inputs = latents.double().cpu().permute(0, 2, 3, 4, 1).reshape(-1, channels).numpy()
    # a little ridge: a still clip does not say what all channels do
    design = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    ridge = 1e-4 * len(inputs) * np.eye(channels + 1)
    ridge[-1, -1] = 0.0
    solved = np.linalg.solve(design.T @ design + ridge, design.T @ targets)
    rows = [tuple(round(float(v), 4) for v in row) for row in solved]
    return LatentRGB(tuple(rows[:-1]), rows[-1])


def shipped(space: dict[str, Any]) -> LatentRGB | None:
    """The map of a VAE's latent space (`Decoder.space`), or None where none is shipped."""
    mean = [round(float(v), 4) for v in space.get("latents_mean") or ()]
    for known in documents.parse(MAPS.read_bytes(), str(MAPS)):
        if known["latents_mean"] == mean:
            return LatentRGB(tuple(map(tuple, known["factors"])), tuple(known["bias"]))
    return None


def clean(before: Tensor, after: Tensor, sigma: float, following: float) -> Tensor:
    """The clean latents that a step from noise level `sigma` to `following` pointed at.

    Along a straight path `x = (1 - s) x0 + s eps` the step's own velocity is `(after - before) /
    (following - sigma)`, and `x0 = after - following * velocity`.
    """
    if following == 0 or sigma == following:
        return after
    return after - following * (after - before) / (following - sigma)


def picture(frame: np.ndarray) -> bytes:
    """A preview frame [h, w, 3] as JPEG, at the latents' resolution: whoever shows it enlarges."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, format="JPEG", quality=90)
    return stream.getvalue()
