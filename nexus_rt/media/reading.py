"""Clips read back: frames, the metadata of what made them, whether one is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from nexus_rt.core.errors import InputError, shorten


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What made an mp4 that `save_video` wrote; {} where nothing says.

    Raises:
        InputError: no such file, or no video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            text = container.metadata.get("comment", "")
    except (OSError, av.FFmpegError) as error:
        raise InputError(
            f"{path} cannot be read as a video ({shorten(error)}); make the clip again.",
            code="not_found" if isinstance(error, FileNotFoundError) else "unreadable",
            param="path",
        ) from error
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}


def read_frames(path: str | Path) -> np.ndarray:
    """Every frame of an mp4 or gif: [F, H, W, 3], uint8.

    Raises:
        InputError: no such file, or one that holds no video that can be read.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = [_rgb(frame) for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError, IndexError, ValueError, MemoryError) as error:
        raise InputError(
            f"{path} cannot be read as a video ({shorten(error)}); make the clip again.",
            code="not_found" if isinstance(error, FileNotFoundError) else "unreadable",
            param="path",
        ) from error
    if not frames:
        raise InputError(
            f"{path} holds no frames; make the clip again.", code="unreadable", param="path"
        )
    return np.stack(frames)


def is_clip(path: Path) -> bool:
    """Whether a file is there whose first frame can be read."""
    import av

    try:
        if not path.is_file() or not path.stat().st_size:
            return False
        if path.suffix == ".png":
            from PIL import Image

            with Image.open(path) as image:
                image.verify()
            return True
        with av.open(str(path)) as container:
            return next(container.decode(video=0), None) is not None
    except Exception:  # whatever a damaged file makes its reader raise
        return False


def _rgb(frame: Any) -> np.ndarray:
    """A decoded frame as RGB, by the matrix it is tagged with (swscale's own default is
    BT.601's)."""
    if frame.format.name.startswith(("rgb", "bgr", "pal", "gray", "argb", "abgr")):
        return frame.to_ndarray(format="rgb24")
    matrix = {1: "ITU709", 5: "ITU601", 6: "SMPTE170M", 7: "SMPTE240M", 4: "FCC"}.get(
        int(frame.colorspace), "DEFAULT"
    )
    full = int(frame.color_range) == 2
    rgb = frame.reformat(
        format="rgb24",
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range="JPEG" if full else "MPEG",
        dst_color_range="JPEG",
    )
    return rgb.to_ndarray()
