"""Frames to mp4, gif or a png contact sheet; a file appears under its name only when complete."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nexus_rt.core.cpu import instruction_sets
from nexus_rt.core.errors import InputError, NexusError, choose, shorten, shown
from nexus_rt.core.part_files import part_file
from nexus_rt.core.paths import as_path
from nexus_rt.core.versions import versions

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".mp4", ".gif", ".png")
FPS = 16  # Wan's frame rate
RATE = re.compile(r"[0-9]{1,12}(?:\.[0-9]{0,20}|/[0-9]{1,12})?|\.[0-9]{1,20}")


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


def frame_rate(fps: Any, name: str = "fps") -> Fraction:
    """Frames per second as a fraction: a number, a Fraction, or text such as "30000/1001"; 23.976
    and its like are the NTSC rates they stand for (24000/1001).

    Raises:
        InputError: no number, or outside 1/10 to 1000.
    """
    try:
        if isinstance(fps, str):  # of "1e999999999" Fraction makes all the digits
            rate = Fraction(fps) if RATE.fullmatch(fps.strip(" ")) else Fraction(0)
        elif isinstance(fps, (int, Fraction)):
            rate = Fraction(fps)
        else:
            rate = Fraction(float(fps))
    except Exception:  # whatever an object's __float__ raises
        rate = Fraction(0)
    if isinstance(fps, bool) or not Fraction(1, 10) <= rate <= 1000:
        words = shorten(fps, 60) if isinstance(fps, str) else shown(fps, 60)
        raise InputError(
            f"{name} is {words}; expected frames per second from 0.1 to 1000, such as 16 or"
            " 30000/1001.",
            code="out_of_range",
            param=name,
        )
    ntsc = Fraction(round(rate * Fraction(1001, 1000)) * 1000, 1001)
    if rate.denominator != 1 and abs(rate - ntsc) < Fraction(1, 1000):
        return ntsc
    return rate.limit_denominator(10_000)


def _array(frames: Any) -> np.ndarray:
    """Frames as a NumPy array, which has no bfloat16."""
    if isinstance(frames, (list, tuple)) and frames and hasattr(frames[0], "convert"):
        return np.stack([np.asarray(image.convert("RGB")) for image in frames])
    if hasattr(frames, "detach"):
        frames = frames.detach().cpu()
        return (frames.float() if frames.is_floating_point() else frames).numpy()
    return np.asarray(frames)


def to_uint8(frames: Any, truncate: bool = False) -> np.ndarray:
    """Frames as uint8: [F, H, W, 3] of uint8, whole numbers 0 to 255, or floats in [0, 1]; arrays,
    tensors, or a list of PIL images. truncate: floats are cut instead of rounded, as the published
    scripts do.

    Raises:
        InputError: another shape or type, NaN, or values outside the range.
    """
    if not isinstance(truncate, bool):
        raise InputError(
            f"truncate is {shown(truncate)}; expected True or False.",
            code="invalid_type",
            param="truncate",
        )
    try:
        frames = _array(frames)
    except Exception as error:  # whatever another's array or image raises
        raise InputError(
            f"frames are {shown(frames)}, which are no array ({shorten(error, 120)}); expected"
            f" [frames,"
            " height, width, 3].",
            code="invalid_type",
            param="frames",
        ) from error
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise InputError(
            f"frames have shape {frames.shape}; expected [frames, height, width, 3].",
            code="mismatch",
            param="frames",
        )
    if frames.dtype == np.uint8:
        return frames
    expected = "expected uint8, whole numbers from 0 to 255, or floats from 0 to 1"
    low, high = frames.min(), frames.max()
    if frames.dtype.kind == "i" or frames.dtype in (np.uint32, np.uint64):
        if low < 0 or high > 255:
            raise InputError(
                f"frames are {frames.dtype} from {low} to {high}; {expected}.",
                code="out_of_range",
                param="frames",
            )
        return frames.astype(np.uint8)
    if frames.dtype.kind != "f":
        raise InputError(
            f"frames are {frames.dtype}; {expected}: scale them first.",
            code="invalid_type",
            param="frames",
        )
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(
            f"frames hold NaN or infinity; {expected}.", code="not_finite", param="frames"
        )
    if low < -0.5 or high > 1.5:
        raise InputError(
            f"frames are {frames.dtype} from {low:g} to {high:g}; {expected}: divide by 255 first.",
            code="out_of_range",
            param="frames",
        )
    scaled = np.clip(frames.astype(np.float32, copy=False), 0, 1) * 255
    return (scaled if truncate else scaled.round()).astype(np.uint8)


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


def uniform(frames: np.ndarray, count: int) -> np.ndarray:
    """`count` frames uniformly from first to last; all of them where there are fewer."""
    return frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)]


def as_output(video: Tensor, output_type: str, truncate: bool = False) -> Any:
    """Frames [B, F, 3, H, W] in [0, 1] as "pt" (as they are), "np" [B, F, H, W, 3], or "pil" (a
    list of images a clip)."""
    if output_type == "pt":
        return video
    array = video.permute(0, 1, 3, 4, 2).cpu().numpy()
    if output_type == "np":
        return array
    from PIL import Image

    return [[Image.fromarray(frame) for frame in to_uint8(clip, truncate)] for clip in array]


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
        stream.options = {"crf": "14", "preset": "fast", "threads": "1", **_steady()}
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


def _steady() -> dict[str, str]:
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


def contact_sheet(frames: np.ndarray) -> np.ndarray:
    """Up to 16 frames [F, H, W, 3] of a clip in one picture, eight a row."""
    picked = uniform(frames, 16)
    columns = min(8, len(picked))
    rows = -(-len(picked) // columns)
    sheet = np.zeros((rows * columns, *picked.shape[1:]), np.uint8)
    sheet[: len(picked)] = picked
    height, width = picked.shape[1:3]
    return (
        sheet.reshape(rows, columns, height, width, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * height, columns * width, 3)
    )


def _contact_sheet(frames: np.ndarray, path: Path, rate: Fraction, comment: str) -> None:
    from PIL import Image

    Image.fromarray(contact_sheet(frames)).save(path, format="PNG")
