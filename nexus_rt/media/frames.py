"""Frames as arrays: eight bits, types of output, a choice of them, a contact sheet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nexus_rt.core.errors import InputError, shorten, shown

if TYPE_CHECKING:
    from torch import Tensor


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
