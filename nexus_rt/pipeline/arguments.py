"""Checks of the arguments that a pipeline is loaded with, before any model is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.amounts import parse_bytes
from nexus_rt.core.checks import switch
from nexus_rt.core.devices import as_device, as_dtype
from nexus_rt.core.errors import InputError, choose, shown
from nexus_rt.core.paths import as_path
from nexus_rt.loading.lora import Lora, parse_loras
from nexus_rt.ops.attention import ATTENTION_NAMES
from nexus_rt.ops.block_ops import KERNELS


def check_source(name: str, value: Any) -> None:
    """Raise unless a model's source is a path or a hub id, or, of a generator, two of them."""
    pair = name in ("small", "large") and isinstance(value, (tuple, list))
    for one in value if pair else (value,):
        if one is not None and not isinstance(one, (str, Path)):
            raise InputError(
                f"{name} is {shown(one)}; expected a folder, a file or a hub id.",
                code="invalid_type",
                param=name,
            )
        if isinstance(one, str) and not one.strip():
            raise InputError(f"{name} is empty; expected a folder, a file or a hub id.", param=name)
        for part in str(one).split(",") if one is not None else ():
            as_path(name, part)


def read_loras(name: str, source: Any) -> tuple[Lora, ...]:
    """The LoRAs of one of a call's arguments."""
    several = source if isinstance(source, (list, tuple)) else (source,)
    for one in several:
        if not isinstance(one, (str, Path, Lora)):
            raise InputError(
                f"{name} holds {shown(one)}; expected FILE or FILE@SCALE, or a list of them.",
                code="invalid_type",
                param=name,
            )
    return parse_loras(several)


def check_options(
    device: str | torch.device | None,
    torch_dtype: torch.dtype | None,
    keep_encoders: bool,
    kernels: str,
    attention: str,
    vae_tiling: bool | str,
    vram: str | int | None,
    cuda_graphs: bool,
) -> torch.device | None:
    """The device, if one is named, once all settings that both loaders have are valid.

    Raises:
        InputError: one of them is not.
    """
    if torch_dtype is not None:
        as_dtype("torch_dtype", torch_dtype)
    switch("keep_encoders", keep_encoders)
    switch("cuda_graphs", cuda_graphs)
    choose("kernels", kernels, KERNELS)
    choose("attention", attention, ATTENTION_NAMES)
    if not isinstance(vae_tiling, bool) and not (
        isinstance(vae_tiling, str) and vae_tiling == "auto"
    ):
        raise InputError(
            f"vae_tiling is {shown(vae_tiling)}; expected True, False or 'auto'.",
            param="vae_tiling",
        )
    if vram is not None:
        parse_bytes(vram)
    return None if device is None else as_device("device", device)
