"""Frames to mp4, gif or a png contact sheet; a file appears under its name only when complete."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from nexus_rt.core.amounts import frame_rate
from nexus_rt.core.cpu import instruction_sets
from nexus_rt.core.errors import InputError, NexusError, choose, shorten, shown
from nexus_rt.core.part_files import part_file
from nexus_rt.core.paths import as_path
from nexus_rt.core.versions import versions
from nexus_rt.media.frames import contact_sheet, to_uint8

SUFFIXES = (".mp4", ".gif", ".png")
FPS = 16  # Wan's frame rate


def check_output(path: str | Path) -> Path:
    """Find out before the first step whether a video can be written here.

    Raises:
        InputError: unknown suffix, missing folder, or a place that cannot be written.
    """
    path = as_path("path", path)
    choose("output suffix", path.suffix.lower(), SUFFIXES)
    if path.is_dir():
        raise InputError(
            f"{path} is a folder; give a file name ending in {', '.join(SUFFIXES)}.", param="path"
        )
    if not path.parent.is_dir():
        raise InputError(
            f"{path.parent} does not exist; make the folder first, or write somewhere else.",
            code="not_found",
            param="path",
        )
    try:
        with part_file(path):
            pass
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); choose a place you may write to.",
            code="not_writable",
            param="path",
        ) from error
    return path


def save_video(
    frames: Any,
    path: str | Path,
    fps: Any = FPS,
    metadata: dict[str, Any] | None = None,
    truncate: bool = False,
) -> Path:
    """Write one clip; the same frames give the same bytes.

    Args:
        frames: [F, H, W, 3] as `to_uint8` takes them.
        path: `.mp4` (H.264, BT.709 limited range, tagged so; odd sides get a row or column more),
            `.gif` (at most 100 frames per second), or `.png` (a contact sheet of up to 16 frames).
        fps: as `frame_rate` reads it.
        metadata: what made the clip, kept in an mp4 (`read_metadata`).
        truncate: as in `to_uint8`.

    Raises:
        InputError: the path cannot be written, frames of another shape or range, a rate that cannot
            be kept, or metadata that JSON has no form for.
        NexusError: they cannot be encoded here.
    """
    path = check_output(path)
    rate, frames, comment = frame_rate(fps), to_uint8(frames, truncate), _comment(metadata)
    writers: dict[str, Callable] = {".mp4": _mp4, ".gif": _gif, ".png": _contact_sheet}
    try:
        with part_file(path) as part:
            writers[path.suffix.lower()](frames, part, rate, comment)
            os.replace(part, path)
    except NexusError:
        raise
    except OSError as error:
        raise InputError(
            f"{path} could not be written ({shorten(error)}); free some space or write somewhere"
            f" else.",
            code="not_writable",
            param="path",
        ) from error
    except Exception as error:  # FFmpeg's own have every base
        raise NexusError(
            f"{path} could not be encoded ({shorten(error)}); install av and pillow again, or write"
            " another suffix."
        ) from error
    return path


def _comment(metadata: dict[str, Any] | None) -> str:
    """Metadata as the file keeps it."""
    if metadata is not None and not isinstance(metadata, dict):
        raise InputError(
            f"metadata is {shown(metadata)}; expected a dictionary.",
            code="invalid_type",
            param="metadata",
        )
    try:
        text = json.dumps(metadata, ensure_ascii=False) if metadata else ""
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"metadata holds what JSON has no form for ({shorten(error)}); expected text, numbers,"
            " lists and dictionaries.",
            param="metadata",
        ) from error
    return text


def made_with(
    prompt: str,
    negative: str | None,
    seed: int,
    plan: str,
    options: Mapping[str, Any],
    models: str = "",
) -> dict[str, Any]:
    """What makes a clip again, as its metadata keeps it: prompt, seed, plan, options that were
    given, models, versions."""
    rest = {
        k: v if isinstance(v, (int, float, str)) else str(list(v) if isinstance(v, tuple) else v)
        for k, v in options.items()
        if v is not None and v is not False  # 0 is no guidance
    }
    known = {
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": seed,
        "plan": plan,
        "models": models,
    }
    metadata = {
        k: v
        for k, v in versions().items()
        if v and k in ("nexus-rt", "torch", "diffusers", "transformers", "triton")
    }
    return {
        **{k: v for k, v in known.items() if v not in (None, "")},
        "options": rest,
        "versions": metadata,
    }


def _mp4(frames: np.ndarray, path: Path, rate: Fraction, comment: str) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    if odd := (
        (frames.shape[1] % 2, frames.shape[2] % 2)
        if any(n % 2 for n in frames.shape[1:3])
        else None
    ):
        size = f"{frames.shape[2]}x{frames.shape[1]}"
        warnings.warn(
            f"mp4 needs even sides: {size} gets a row or column more, a copy of the last.",
            stacklevel=4,
        )
        frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        # one thread: the bytes do not depend on how many cores wrote them
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14", "preset": "fast", "threads": "1", **x264_options()}
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
        context.color_range = 1  # limited
        for image in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            yuv = rgb.reformat(
                format="yuv420p",
                src_colorspace=Colorspace.ITU709,
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation="AREA",
            )
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def x264_options() -> dict[str, str]:
    """Options that keep x264 from its AVX-512 code, which on some machines gives other bytes for
    the same frames about once in 300 clips; its AVX2 code gives the usual ones, as fast."""
    known = set(instruction_sets())
    return {"x264-params": "asm=AVX2"} if {"avx2", "avx512f"} <= known else {}


def _gif(frames: np.ndarray, path: Path, rate: Fraction, comment: str) -> None:
    """Every frame of its own, equal ones too (Pillow would join them), at the hundredths of a
    second nearest its time. Above 100 frames per second, which a GIF cannot count, frames are left
    out and the duration stays."""
    import av
    from PIL import Image

    if rate > 100:
        kept = [round(i * rate / 100) for i in range(max(1, round(len(frames) * 100 / rate)))]
        frames, shown = frames[[min(i, len(frames) - 1) for i in kept]], len(frames)
        warnings.warn(
            f"a GIF shows at most 100 frames per second: {len(frames)} of {shown} are kept.",
            stacklevel=4,
        )
        rate = Fraction(100)
    times = [round(i * 100 / rate) for i in range(len(frames) + 1)]
    with av.open(
        str(path),
        "w",
        format="gif",
        options={"loop": "0", "final_delay": str(times[-1] - times[-2])},
    ) as container:
        stream = container.add_stream("gif", rate=100)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.time_base = "pal8", Fraction(1, 100)
        for image, time in zip(frames, times, strict=False):
            indices, palette = _quantised(Image.fromarray(image))
            pair: Any = (indices, palette)  # PyAV takes them, and its annotations do not say so
            frame = av.VideoFrame.from_ndarray(pair, format="pal8")
            frame.pts, frame.time_base = time, Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _quantised(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """An image as indices [H, W] into a palette [256, 4] of alpha, red, green, blue, as FFmpeg has
    palettes."""
    small = image.quantize(256)
    colours = np.array(small.getpalette(), np.uint8).reshape(-1, 3)
    palette = np.zeros((256, 4), np.uint8)
    palette[:, 0] = 255
    palette[: len(colours), 1:] = colours
    return np.asarray(small), palette


def _contact_sheet(frames: np.ndarray, path: Path, rate: Fraction, comment: str) -> None:
    from PIL import Image

    Image.fromarray(contact_sheet(frames)).save(path, format="PNG")
