"""Radial spectra of clips, and the interval of a share; frames are [N, H, W, 3] in 0..1."""

from __future__ import annotations

import math

import numpy as np


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share."""
    if not count:
        return 0.0, 1.0
    z, p = 1.96, right / count
    middle, spread = (
        p + z * z / (2 * count),
        z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count)),
    )
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def spectrum(frames: np.ndarray) -> np.ndarray:
    """Radial power spectrum [bins] of the luminance of frames [N, H, W, 3], log10."""
    return np.log10(radial_power(frames) + 1e-9)


def radial_power(frames: np.ndarray) -> np.ndarray:
    """Mean power of the luminance of frames [N, H, W, 3] in rings of spatial frequency."""
    grey = frames.mean(-1)
    power = np.abs(np.fft.fft2(grey - grey.mean((1, 2), keepdims=True))) ** 2
    rows, columns = (np.fft.fftfreq(n) for n in grey.shape[1:])
    side = min(grey.shape[1:])
    radius = np.hypot(rows[:, None], columns[None]) * side
    bins = np.clip(radius.astype(int), 1, side // 2) - 1
    return np.bincount(bins.ravel(), power.mean(0).ravel()) / np.bincount(bins.ravel())
