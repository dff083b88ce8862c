"""Frames as data URLs: what a page shows and a judge is sent."""

from __future__ import annotations

import base64
import io

import numpy as np

from nexus_rt.media.frames import uniform


def data_url(picture: np.ndarray, kind: str = "PNG", height: int | None = None) -> str:
    """A picture [H, W, 3], uint8 or floats in [0, 1], as a `data:` URL of a "PNG" or a "JPEG";
    `height` in pixels scales it."""
    from PIL import Image

    if picture.dtype != np.uint8:
        picture = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(picture)
    if height is not None:
        image = image.resize((max(1, round(image.width * height / image.height)), height))
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(out.getvalue()).decode()


def thumbnail(frames: np.ndarray, count: int = 4, height: int = 96, kind: str = "PNG") -> str:
    """Frames [F, H, W, 3] side by side, uniformly picked, as a data URL."""
    return data_url(np.concatenate(list(uniform(frames, count)), 1), kind, height)
