"""Frames to mp4, gif or a png contact sheet; a file appears under its name only when complete."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nexus_rt.errors import InputError, choose

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".mp4", ".gif", ".png")
FPS = 16  # Wan's frame rate


def check_output(path: str | Path) -> Path:
    """Find out before the first step whether a video can be written here.

    Raises:
        InputError: unknown suffix, missing folder, or a place that cannot be written.
    """
    path = Path(path)
    choose("output suffix", path.suffix.lower(), SUFFIXES)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name ending in {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} does not exist; make the folder first, or write somewhere else.")
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose a place you may write to.") from error
    return path


def _part(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")


def save_video(frames: np.ndarray, path: str | Path, fps: int = FPS) -> Path:
    """Write one clip.

    Args:
        frames: [F, H, W, 3], uint8, or floats in [0, 1].
        path: `.mp4` (H.264), `.gif`, or `.png` (a contact sheet of up to 16 frames).

    Raises:
        InputError: the path cannot be written, or frames of another shape.
    """
    path = check_output(path)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise InputError(f"frames have shape {frames.shape}; expected [frames, height, width, 3].")
    if frames.dtype != np.uint8:
        frames = (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)
    writers: dict[str, Callable] = {".mp4": _mp4, ".gif": _gif, ".png": _contact_sheet}
    part = _part(path)
    try:
        writers[path.suffix.lower()](frames, part, fps)
        os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path} could not be written ({error}); free some space or write somewhere else.") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def uniform(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` frames uniformly from first to last; all of them where there are fewer."""
    return frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]


def as_output(video: Tensor, output_type: str) -> Any:
    """Frames [B, F, 3, H, W] in [0, 1] as "pt" (as they are), "np" [B, F, H, W, 3], or "pil" (a list of images a clip)."""
    if output_type == "pt":
        return video
    array = video.permute(0, 1, 3, 4, 2).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    return [[Image.fromarray((f * 255).round().astype("uint8")) for f in clip] for clip in array]


def read_frames(path: str | Path) -> np.ndarray:
    """Every frame of an mp4 or gif: [F, H, W, 3], uint8.

    Raises:
        InputError: no such file, or one that holds no video that can be read.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise InputError(f"{path} cannot be read as a video ({error}); make the clip again.") from error
    if not frames:
        raise InputError(f"{path} holds no frames; make the clip again.")
    return np.stack(frames)


def _mp4(frames: np.ndarray, path: Path, fps: int) -> None:
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "14", "preset": "fast"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())


def _gif(frames: np.ndarray, path: Path, fps: int) -> None:
    from PIL import Image

    images = [Image.fromarray(f) for f in frames]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)


def _contact_sheet(frames: np.ndarray, path: Path, fps: int) -> None:
    from PIL import Image

    picked = uniform(frames, 16)
    columns = min(8, len(picked))
    rows = -(-len(picked) // columns)
    sheet = np.zeros((rows * columns, *picked.shape[1:]), np.uint8)
    sheet[: len(picked)] = picked
    height, width = picked.shape[1:3]
    sheet = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    Image.fromarray(sheet).save(path, format="PNG")
