"""A UMT5 encoder's folder or file to the encoder on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.documents import check
from nexus_rt.core.errors import ModelError
from nexus_rt.loading.architecture import umt5_config
from nexus_rt.loading.config import check_config
from nexus_rt.loading.formats.stored import StoredTensor
from nexus_rt.loading.layouts import t5_name
from nexus_rt.loading.pretrained import fill_whole
from nexus_rt.loading.tensors import find_tensors, renamed
from nexus_rt.models.umt5 import SHARED, TIED, Umt5Config, Umt5Encoder


def umt5_settings(source: Path) -> dict[str, Any]:
    """A UMT5 encoder's `config.json`: of its folder, or what its tensors' shapes say."""
    if (source / "config.json").is_file():
        return check_config(source, "text encoder")
    stored = renamed(find_tensors(source), t5_name)
    return umt5_config({n: t.shape for n, t in stored.items()}, source)


def load_umt5(source: Path, dtype: torch.dtype, device: torch.device) -> Umt5Encoder:
    """A UMT5 encoder from a folder of transformers' layout, or from a single file in
    transformers', Wan's own or llama.cpp's names; what a whole encoder-decoder holds beside it is
    left out.

    Raises:
        ModelError: another architecture, weights that are missing, foreign or of other shapes, or
            a quantisation that is not read.
    """
    stored = umt5_settings(source)
    if stored.get("model_type", "umt5") != "umt5":
        raise ModelError(
            f"{source} holds a {str(stored['model_type'])[:80]!r}; expected a UMT5 encoder, as"
            " Wan's checkpoints have.",
            code="unsupported",
            param="model_type",
        )
    config = check(
        stored, Umt5Config, str(source / "config.json"), remedy="download the folder again"
    )
    with torch.device("meta"):
        model = Umt5Encoder(config)

    def tied(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The embedding is stored under one of two names or both; untied, the encoder reads its
        own."""
        tensors = renamed(tensors, t5_name)
        own = tensors.get(TIED)
        tensors = {k: v for k, v in tensors.items() if k != TIED}
        if own is not None and (SHARED not in tensors or not config.tie_word_embeddings):
            tensors[SHARED] = own
        return tensors

    keep = (".wo.",) if dtype == torch.float16 else ()
    return fill_whole(model, source, "text encoder", dtype, device, tied, keep).eval()
