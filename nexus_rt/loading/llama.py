"""A Llama's folder in transformers' layout to its backbone on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.documents import check
from nexus_rt.core.errors import ModelError
from nexus_rt.loading.formats.stored import StoredTensor
from nexus_rt.loading.pretrained import fill_whole
from nexus_rt.models.llama import LlamaBackbone, LlamaConfig


def load_llama(
    folder: Path, config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> LlamaBackbone:
    """The backbone from a folder of transformers' layout, given its `config.json` (see
    `is_native`).

    Raises:
        ModelError: an impossible config, weights that are missing, foreign or of other shapes.
    """
    checked = check(
        config, LlamaConfig, str(folder / "config.json"), remedy="download the folder again"
    )
    checked.rope  # noqa: B018  # refused now, not at the first prompt
    with torch.device("meta"):
        model = LlamaBackbone(checked)
    return fill_whole(model, folder, "understanding model", dtype, device, _bare).eval()


def _bare(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The names without the prefix that a model with a head stores."""
    named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise ModelError(
            "some weights are stored twice, with and without the prefix 'model.'; download the"
            " folder again.",
            code="duplicate",
        )
    return named
