"""What a clip is worth beside what it shows: how finely it is drawn, and how steadily.

All of it is measured from pixels, against true renderings of the same kind; nothing here knows a
model. Frames are [F, H, W, 3] in 0..1.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from nexus_rt.bench.shapes import world
from nexus_rt.bench.shapes.checker import object_mask
from nexus_rt.bench.shapes.spectrum import radial_power, spectrum, wilson

__all__ = ["consistency", "radial_power", "spectrum", "texture", "texture_similarity", "wilson"]
RINGS, SECTORS = 10, 4  # of the texture's spectrum
PROTOTYPES = 24  # true renderings behind each texture's typical spectrum


def texture(frame: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Amplitude [RINGS * SECTORS] of the object's luminance by frequency and direction, its colour
    and size divided out.

    The object's own outline is taken off first (the mask's mean inside it), so that what is left is
    shading and texture. None where the object is too small to have one.
    """
    from scipy import ndimage

    inner = ndimage.binary_erosion(mask, iterations=2)
    if inner.sum() < 60:
        return None
    grey = frame.mean(-1)
    mean = grey[inner].mean()
    rest = np.where(inner, grey / (mean + 1e-6) - 1, 0)
    power = np.abs(np.fft.fft2(rest)) ** 2 / inner.sum()
    f = np.fft.fftfreq(len(grey))
    radius, angle = np.hypot(f[:, None], f[None]), np.arctan2(f[:, None], f[None]) % np.pi
    ring = np.minimum((radius / 0.5 * RINGS).astype(int), RINGS - 1)
    sector = (angle / np.pi * SECTORS + 0.5).astype(int) % SECTORS
    cells = (ring * SECTORS + sector).ravel()
    return np.sqrt(np.bincount(cells, power.ravel(), RINGS * SECTORS))


@lru_cache(maxsize=1)
def _typical() -> dict[str, np.ndarray]:
    """Mean texture amplitude of true renderings, by texture."""
    out = {}
    for name in world.TEXTURES:
        rng = np.random.default_rng(99)
        pick = lambda values: str(rng.choice(list(values)))  # noqa: B023
        kinds = [
            world.Scene(
                pick(world.SHAPES), pick(world.COLOURS), name, "still", pick(world.BACKGROUNDS)
            )
            for _ in range(PROTOTYPES)
        ]
        frames = [(world.render(s, rng, 1)[0].transpose(1, 2, 0) + 1) / 2 for s in kinds]
        textures = [texture(f, object_mask(f)) for f in frames]
        out[name] = np.mean([t for t in textures if t is not None], 0)
    return out


def texture_similarity(frames: np.ndarray, name: str, every: int = 5) -> float:
    """How like the prompted texture a clip's object looks: 1 is a true rendering's typical
    spectrum, 0 shares nothing.

    One less the Bray-Curtis distance of the amplitudes; 0 for a frame without an object.
    """
    wanted, scores = _typical()[name], []
    for frame in frames[::every]:
        mask = object_mask(frame)
        got = texture(frame, mask) if 0.004 <= mask.mean() <= 0.5 else None
        scores.append(0.0 if got is None else 1 - np.abs(got - wanted).sum() / (got + wanted).sum())
    return float(np.mean(scores))


def consistency(frames: np.ndarray, step: int = 2) -> float:
    """How much the object stays itself as it moves: the mean correlation of its pixels with those
    two frames later, moved along with its centre; 0 where an object is lost."""
    from scipy import ndimage

    masks = [object_mask(f) for f in frames[::step]]
    kept, scores = frames[::step], []
    for a, b, m, n in zip(kept, kept[1:], masks, masks[1:], strict=False):
        if not (0.004 <= m.mean() <= 0.5 and 0.004 <= n.mean() <= 0.5):
            scores.append(0.0)
            continue
        move = np.mean(np.nonzero(m), 1) - np.mean(np.nonzero(n), 1)
        back = ndimage.shift(b, (*move, 0), order=1, mode="nearest")
        x, y = a[m] - a[m].mean(0), back[m] - back[m].mean(0)
        scores.append(float((x * y).sum() / (np.sqrt((x**2).sum() * (y**2).sum()) + 1e-9)))
    return float(np.mean(scores))
