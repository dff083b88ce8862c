"""What does a clip show? Measured from its pixels alone: shape, colour and motion of the one object
in it.

Knows the world's names and what its shapes look like, and nothing of any model, latent or prompt.
The background is read off the frame's border, the object is what differs from it; colour is its
most common hue, shape the best overlap with a filled outline of the same area, motion how far the
object's centre travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nexus_rt.bench.shapes import world

GRID = 48  # side of the square on which outlines are compared
STILL = 0.10  # of the frame's side: less travel than this is standing still


@dataclass(frozen=True)
class Seen:
    """What was found; None where no object could be told from the background."""

    shape: str | None
    colour: str | None
    motion: str | None

    def matches(self, scene: world.Scene) -> tuple[bool, bool, bool]:
        return self.shape == scene.shape, self.colour == scene.colour, self.motion == scene.motion


def object_mask(frame: np.ndarray) -> np.ndarray:
    """Pixels [H, W] of the object in a frame [H, W, 3] of values 0..1: far from the border's
    colour, and connected."""
    from scipy import ndimage

    side = frame.shape[0]
    # the background changes from row to row only: each row's colour is the median of its two ends
    # and of the whole border
    ends = np.concatenate([frame[:, :4], frame[:, -4:]], 1)
    row = np.median(ends, 1)
    t = np.arange(side) / side
    ground = np.stack([np.polyval(np.polyfit(t, row[:, c], 1), t) for c in range(3)], 1)
    distance = np.abs(frame - ground[:, None]).max(-1)
    labels, count = ndimage.label(distance > max(0.12, 0.35 * np.percentile(distance, 99)))
    if not count:
        return np.zeros(distance.shape, bool)
    sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
    mask = labels == 1 + int(np.argmax(sizes))
    return ndimage.binary_fill_holes(mask)


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Hue angle of colours [N, 3], in radians."""
    r, g, b = rgb.T
    return np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)


@lru_cache(maxsize=1)
def _outlines() -> dict[str, np.ndarray]:
    """Filled outlines on the comparison grid, all of the same area, centred on their centroid."""
    out = {}
    for shape in world.SHAPES:
        axis = (np.arange(GRID * 2) + 0.5 - GRID) / GRID * 3
        x, y = np.meshgrid(axis, axis)
        out[shape] = _normalise(
            world.signed_distance(shape, x.astype(np.float32), y.astype(np.float32), 1.0) < 0
        )
    return out


def _normalise(mask: np.ndarray) -> np.ndarray:
    """Resample a mask so that its centroid is the grid's centre and its area a fixed share of the
    grid."""
    from scipy import ndimage

    ys, xs = np.nonzero(mask)
    scale = np.sqrt(mask.sum() / (0.22 * GRID * GRID))
    axis = (np.arange(GRID) + 0.5 - GRID / 2) * scale
    y, x = np.meshgrid(axis + ys.mean(), axis + xs.mean(), indexing="ij")
    return ndimage.map_coordinates(mask.astype(np.float32), [y, x], order=1, mode="constant")


def shape_scores(mask: np.ndarray) -> dict[str, float]:
    """Overlap (intersection over union) of a mask with each shape's outline."""
    m = _normalise(mask)
    return {
        k: float(np.minimum(m, o).sum() / np.maximum(m, o).sum()) for k, o in _outlines().items()
    }


def look(frames: np.ndarray) -> Seen:
    """Say what a clip [F, H, W, 3] of values in 0..1 shows."""
    side = frames.shape[1]
    masks = [object_mask(f) for f in frames]
    objects = [i for i, m in enumerate(masks) if 0.004 <= m.mean() <= 0.5]
    if len(objects) < max(1, len(frames) // 2):
        return Seen(None, None, None)
    scores = {k: 0.0 for k in world.SHAPES}
    hues, weights = [], []
    for i in objects:
        for k, v in shape_scores(masks[i]).items():
            scores[k] += v
        rgb = frames[i][masks[i]]
        chroma = rgb.max(1) - rgb.min(1)
        hues.append(_hue(rgb)[chroma > 0.15])
        weights.append(chroma[chroma > 0.15])
    shape = max(scores, key=lambda k: scores[k])
    hue, weight = np.concatenate(hues), np.concatenate(weights)
    colour = None
    if len(hue):
        centre = np.angle((weight * np.exp(1j * hue)).sum())
        palette = {k: _hue(np.array([v]))[0] for k, v in world.COLOURS.items()}
        colour = min(palette, key=lambda k: abs(np.angle(np.exp(1j * (centre - palette[k])))))
    centres = np.array([np.mean(np.nonzero(masks[i]), 1) for i in objects])  # [n, (y, x)]
    third = max(1, len(objects) // 4)
    dy, dx = (centres[-third:].mean(0) - centres[:third].mean(0)) / side
    if max(abs(dx), abs(dy)) < STILL:
        motion = "still"
    elif abs(dx) > abs(dy):
        motion = "right" if dx > 0 else "left"
    else:
        motion = "down" if dy > 0 else "up"
    return Seen(shape, colour, motion)


def chance() -> dict[str, float]:
    """What a uniform guess scores."""
    s, c, m = 1 / len(world.SHAPES), 1 / len(world.COLOURS), 1 / len(world.MOTIONS)
    return {"shape": s, "colour": c, "motion": m, "all": s * c * m}
