"""Latents to and from files: what is kept of a clip whose decoding failed."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus_rt.core.errors import ModelError, shorten


def save_latents(latents: Tensor, folder: str | Path | None = None) -> Path | None:
    """Save latents as safetensors under a new name in `folder`; None if that fails too."""
    from safetensors.torch import save_file

    try:
        root = Path(folder) if folder else Path(tempfile.gettempdir())
        path = root / f"nexus-rt-latents-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.safetensors"
        save_file({"latents": latents.detach().float().cpu().contiguous()}, path)
        return path
    except (
        Exception
    ):  # the caller is already reporting a failure: it must not be lost under this one
        return None


def rescue_latents(latents: Tensor, folder: str | Path | None = None) -> Path | None:
    """`save_latents` into a folder, else, where that cannot be written, into the system's temporary
    one."""
    return save_latents(latents, folder) or save_latents(latents)


def read_latents(path: str | Path) -> Tensor:
    """Latents [B, C, T, H, W], float32, that `save_latents` wrote.

    Raises:
        ModelError: another file, a damaged one, or numbers that are not finite.
    """
    try:
        return _read(Path(path))
    except ModelError as error:
        raise ModelError(
            f"{path} holds no latents ({shorten(error)}); expected a safetensors file with a tensor"
            " 'latents', as a failed decoding leaves it.",
            code=error.code,
            param=error.param,
        ) from error


def _read(path: Path) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            known = "latents" in file.keys()  # noqa: SIM118  # it is no dictionary
            shape = file.get_slice("latents").get_shape() if known else []
            latents = file.get_tensor("latents") if len(shape) == 5 and 0 not in shape else None
    except FileNotFoundError:
        raise ModelError("it is missing", code="not_found") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        reason = f"it is not a whole safetensors file: {shorten(error)}"
        raise ModelError(reason, code="damaged") from error
    if not known:
        raise ModelError("it has no tensor 'latents'", code="missing", param="latents")
    if latents is None:
        raise ModelError(
            f"its latents have shape {list(shape)}; expected [batch, channels, frames, height,"
            " width]",
            code="mismatch",
            param="latents",
        )
    if not latents.is_floating_point():
        raise ModelError(
            f"its latents are of {latents.dtype}; expected floats",
            code="unsupported",
            param="latents",
        )
    latents = latents.float()
    if not bool(latents.isfinite().all()):
        raise ModelError("its latents hold NaN or infinity", code="not_finite", param="latents")
    return latents
