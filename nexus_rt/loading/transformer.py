"""A folder in diffusers' or Wan's own layout, or a single file, to a transformer on a device."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.errors import ModelError, choose, shown
from nexus_rt.core.limits import MAX_SEQUENCE_LENGTH
from nexus_rt.core.log import chose
from nexus_rt.core.process import computes
from nexus_rt.loading.architecture import check_variant, wan_config
from nexus_rt.loading.checkpoint import fill
from nexus_rt.loading.config import WAN_CLASSES, config_of, read_json, warn_unread
from nexus_rt.loading.formats.stored import StoredTensor
from nexus_rt.loading.layouts import diffusers_name, diffusers_shapes
from nexus_rt.loading.locate import transformer_folder, weights_of
from nexus_rt.loading.lora import Lora
from nexus_rt.loading.lora_changes import Changes, add_beside
from nexus_rt.loading.packing import Packing, check_weights, formats_of
from nexus_rt.loading.swap import LoadedFrom
from nexus_rt.loading.tensors import find_tensors, renamed
from nexus_rt.models.wan import WanTransformer
from nexus_rt.models.wan_config import WanConfig
from nexus_rt.ops.attention import ATTENTION_NAMES
from nexus_rt.ops.block_ops import choose_ops

# fields of Wan's own configs -> the values that are computed here
FIXED: dict[str, tuple[Any, ...]] = {
    "window_size": ([-1, -1],),
    "text_len": (MAX_SEQUENCE_LENGTH,),
}
FIELDS = {  # of `config.json`, diffusers' and Wan's own
    *(f.name for f in fields(WanConfig)),
    *("qk_norm", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len"),
    *("model_type", "dim", "num_heads", "in_dim", "out_dim"),
    *FIXED,
}


def config_file(source: Path) -> Path | None:
    """The `config.json` of a transformer's folder, or beside its file where it is a Wan's; None
    where the weights alone say what they are."""
    path = config_of(source)
    empty = path is None and source.is_dir() and not weights_of(source)
    return source / "config.json" if empty else path


def load_config(source: Path, tensors: Mapping[str, StoredTensor] | None = None) -> WanConfig:
    """The architecture of a transformer's folder or file: its `config.json`, or what its tensors'
    shapes say (`tensors`: those of `find_tensors`, where they are known).

    Raises:
        ModelError: another architecture, or a model of another task.
    """
    path = config_file(source)
    if path is None:
        stored = renamed(find_tensors(source) if tensors is None else tensors, diffusers_name)
        return wan_config({name: t.shape for name, t in stored.items()}, source)
    config = read_json(path)
    name = config.get("_class_name", "WanModel")
    if name not in WAN_CLASSES:
        raise ModelError(
            f"{source} holds a {name}; expected a WanTransformer3DModel (or Wan's own WanModel).",
            code="unsupported",
            param="_class_name",
        )
    _check_fields(config, path)
    return WanConfig.from_dict(config)


def _check_fields(config: Mapping[str, Any], path: Path) -> None:
    """Refuse what a config sets beside the architecture and is not computed here; warn of fields
    that are not known.

    Raises:
        ModelError: local attention, or another length of texts.
    """
    for field, values in FIXED.items():
        value = config.get(field)
        if value is not None and value not in values:
            raise ModelError(
                f"{path} sets {field}={shown(value)}; only {values[0]!r} is computed here:"
                " get a checkpoint of Wan's own architecture.",
                code="unsupported",
                param=field,
            )
    warn_unread(config, FIELDS, path)


def stored_dtype(source: Path) -> torch.dtype:
    """The dtype that most of a transformer's weights are stored in; bfloat16 for those of 8 bits
    and fewer."""
    counts: dict[torch.dtype, int] = {}
    for tensor in find_tensors(transformer_folder(source)).values():
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
            " weights.",
            code="mismatch",
            param="num_layers",
        )


def empty_transformer(source: Path) -> tuple[WanTransformer, dict[str, StoredTensor]]:
    """A transformer of a folder or file on the meta device, its depth checked against the weights;
    and these.

    Raises:
        ModelError: another architecture or task, or weights with many fewer blocks.
    """
    # what a config says of another architecture goes before its weights
    config = load_config(source) if config_file(source) is not None else None
    tensors = find_tensors(source)
    if config is None:
        config = load_config(source, tensors)
    check_variant(tensors, source)
    _check_depth(config, tensors, source)
    with torch.device("meta"):
        return WanTransformer(config), tensors


def load_transformer(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    kernels: str = "auto",
    attention: str = "auto",
    loras: Sequence[Lora] = (),
    weights: str = "dense",
) -> WanTransformer:
    """Load a Wan T2V transformer from a folder in diffusers' or Wan's own layout, or a single file.

    Peak memory is the model in `dtype` plus one stored tensor (and a LoRA's file). `kernels`,
    `attention`: see `WanTransformer.use_kernels`; `loras` are added to the stored weights in
    float32, and the sum rounded to `dtype` once. `weights`: "dense", or how the blocks' matrices
    are kept in fewer bits (`nexus_rt.loading.packing.WEIGHTS`).

    Raises:
        InputError: kernels that cannot run on the device; raised before anything is read.
        ModelError: not a model folder, another architecture, a missing shard, a damaged file,
            pickles only, a LoRA that does not fit.
    """
    computes()
    choose_ops(kernels, torch.device(device))
    choose("attention backend", attention, ATTENTION_NAMES)
    check_weights(weights)
    folder = transformer_folder(Path(folder))
    model, tensors = empty_transformer(folder)
    changes = Changes(loras, diffusers_shapes(model))
    change = changes.apply if changes else None
    packing = None if weights == "dense" else Packing(weights, folder, change)
    fill(model, tensors, dtype, torch.device(device), change, packing)
    if changes and weights == "small":
        add_beside(model, changes)
    model.loaded_from = LoadedFrom(folder, weights, tuple(loras), set(changes.parts))
    kept = ", ".join(f"{n} {name}" for name, n in formats_of(model).items())
    chose(f"weights of {folder.name}", weights, kept)
    return model.use_kernels(kernels, attention).eval()
