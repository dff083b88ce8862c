"""Configs and names of a converted checkpoint, read off its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.devices import dtype_name
from nexus_rt.core.errors import ModelError
from nexus_rt.loading.finite import is_finite
from nexus_rt.models.connector import ConnectorConfig
from nexus_rt.models.template import Template


def unconditional_rows(value: Any, width: int, where: str) -> tuple[Tensor, str]:
    """An embedding [L, width], and which form it was stored in: a tensor, or a list or tuple of it;
    [L, D], [1, L, D], or [N, L, D], of which the published code takes the first.

    Raises:
        ModelError: any other form or width, no rows, or numbers that are not finite.
    """
    expected = (
        f"expected a tensor [L, {width}], [1, L, {width}] or [2, L, {width}], or a list of one"
    )
    form = "a tensor"
    for _ in range(4):
        if not isinstance(value, (list, tuple)):
            break
        if not value:
            raise ModelError(
                f"{where} is an empty {type(value).__name__}; {expected}.", code="missing"
            )
        form, value = f"a {type(value).__name__} of {len(value)}", value[0]
    try:
        rows = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ModelError(
            f"{where} is a {type(value).__name__}; {expected}.", code="invalid_type"
        ) from None
    form += f" {list(rows.shape)}"
    if rows.ndim == 3 and rows.shape[0] > 1:
        form += ", the first is used"
    if rows.ndim == 3 and rows.shape[0]:
        rows = rows[0]
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or rows.shape[-1] != width or not len(rows) or not rows.is_floating_point():
        kind = dtype_name(rows.dtype)
        raise ModelError(
            f"{where} does not fit the connector: it is {form} of {kind}; {expected}.",
            code="mismatch",
        )
    if not is_finite(rows):
        raise ModelError(
            f"{where} holds NaN or infinity; get the published file again.", code="not_finite"
        )
    return rows, form


def check_inside(file: Path, root: Path) -> None:
    """Raise where a link leads out of the folder that is converted (a hub cache's own links lead
    into its blobs)."""
    real, home = file.resolve(), root.resolve()
    cache = next((p.parent for p in home.parents if p.name == "snapshots"), home)
    if not real.is_relative_to(home) and not real.is_relative_to(cache / "blobs"):
        raise ModelError(
            f"{file} is a link to {real}, outside {root}; copy the file there, if it is meant to be"
            " converted.",
            code="unsafe",
        )


def connector_config(weights: dict[str, Tensor], source: Path) -> ConnectorConfig:
    """Dimensions as the weights have them; eight heads, as `nn.Transformer` has where it is not
    told."""
    try:
        head, adapter = weights["vision_head.decoder_query"], weights["adapter.decoder_query"]
        width = weights["vision_head.fc.0.weight"].shape[1]
    except KeyError as error:
        raise ModelError(
            f"{source}: the vision head or the adapter lacks {error}; get the published files"
            " again.",
            code="missing",
        ) from error
    layers = {
        int(k.split(".")[4]) for k in weights if k.startswith("adapter.adapter.encoder.layers.")
    }
    return ConnectorConfig(
        llm_hidden_size=width,
        vision_dim=head.shape[-1],
        vision_queries=head.shape[1],
        text_dim=adapter.shape[-1],
        adapter_queries=adapter.shape[1],
        num_layers=len(layers),
        template=Template(),
    )
