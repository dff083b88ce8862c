"""A folder in diffusers' or Wan's own layout to a transformer on a device."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nexus_rt.attention import ATTENTION_NAMES
from nexus_rt.block_ops import choose_ops
from nexus_rt.errors import ModelError, choose
from nexus_rt.loading.checkpoint import StoredTensor, diffusers_shapes, fill, find_tensors
from nexus_rt.loading.lora import Changes, Lora
from nexus_rt.loading.source import read_json
from nexus_rt.models.wan import WanConfig, WanTransformer


def transformer_folder(folder: Path) -> Path:
    """The transformer inside a pipeline folder, or the folder itself."""
    inner = folder / "transformer"
    return inner if (inner / "config.json").is_file() else folder


def load_config(folder: Path) -> WanConfig:
    """The architecture in a transformer folder's `config.json`."""
    config = read_json(folder / "config.json")
    name = config.get("_class_name", "WanModel")
    if name not in ("WanTransformer3DModel", "WanModel"):
        raise ModelError(
            f"{folder} holds a {name}; expected a WanTransformer3DModel (or Wan's own WanModel)."
        )
    return WanConfig.from_dict(config)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most of a transformer's weights are stored in; bfloat16 for those of 8
    bits."""
    counts: dict[torch.dtype, int] = {}
    for tensor in find_tensors(transformer_folder(folder)).values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + math.prod(tensor.shape)
    dtype = max(counts, key=counts.__getitem__)
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _check_depth(config: WanConfig, tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    """Raise where the config asks for many more blocks than the weights have, before modules are
    built for it."""
    blocks = {
        int(m[1]) for name in tensors if (m := re.search(r"(?:^|\.)blocks\.(\d{1,6})\.", name))
    }
    if config.num_layers > 2 * len(blocks) + 16:
        raise ModelError(
            f"{folder}: the checkpoint is not this architecture: its weights have {len(blocks)}"
            f" blocks and config.json asks for {config.num_layers}; check config.json against the"
            " weights."
        )


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    kernels: str = "auto",
    attention: str = "auto",
    loras: Sequence[Lora] = (),
) -> WanTransformer:
    """Load a Wan T2V transformer from a folder in diffusers' or Wan's own layout.

    Peak memory is the model in `dtype` plus one stored tensor (and a LoRA's file). `kernels`,
    `attention`: see `WanTransformer.use_kernels`; `loras` are added to the stored weights in
    float32, and the sum rounded to `dtype` once.

    Raises:
        InputError: kernels that cannot run on the device; raised before anything is read.
        ModelError: not a model folder, another architecture, a missing shard, a damaged file,
            pickles only, a LoRA that does not fit.
    """
    choose_ops(kernels, torch.device(device))
    choose("attention backend", attention, ATTENTION_NAMES)
    folder = transformer_folder(Path(folder))
    config = load_config(folder)
    tensors = find_tensors(folder)
    _check_depth(config, tensors, folder)
    with torch.device("meta"):
        model = WanTransformer(config)
    changes = Changes(loras, diffusers_shapes(model))
    fill(model, tensors, dtype, torch.device(device), changes.apply if changes else None)
    return model.use_kernels(kernels, attention).eval()
