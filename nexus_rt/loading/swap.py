"""LoRAs of a transformer in memory, put in, taken out and rescaled between calls.

Nothing is subtracted: what a LoRA touches is read again from the checkpoint, so that taking one out
leaves the very weights that were there, and no copy of them is kept. Beside matrices that stay as
they are stored go low-rank products instead, which are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.core.errors import ModelError
from nexus_rt.loading.finite import check_finite
from nexus_rt.loading.formats.stored import read_tensors
from nexus_rt.loading.layouts import diffusers_name, diffusers_shapes, fused_place
from nexus_rt.loading.lora import Lora
from nexus_rt.loading.lora_changes import Changes, add_beside, quantised_place
from nexus_rt.loading.packing import quantised_as
from nexus_rt.loading.tensors import find_tensors, renamed
from nexus_rt.models.quantized import QuantizedLinear, quantise
from nexus_rt.models.wan import WanTransformer


@dataclass
class LoadedFrom:
    """What a transformer was made of.

    weights: of `nexus_rt.loading.packing.WEIGHTS`. touched: parameters, in diffusers' names, that
    are not as stored.
    """

    folder: Path
    weights: str
    loras: tuple[Lora, ...] = ()
    touched: set[str] = field(default_factory=set)


@torch.no_grad()
def set_loras(model: WanTransformer, loaded: LoadedFrom, loras: Sequence[Lora]) -> None:
    """Make these the LoRAs of a model, and no others.

    Everything is read and checked before anything is changed.

    Raises:
        ModelError: a LoRA that is damaged or does not fit, or a checkpoint that is no longer where
            it was read from.
    """
    with torch.device("meta"):
        shapes = diffusers_shapes(WanTransformer(model.config))
    changes = Changes(loras, shapes)
    names = loaded.touched | changes.parts.keys()
    kept = loaded.weights == "small"
    beside = {n for n in names if kept and quantised_place(model, n) is not None}
    stored = {}
    if names - beside:
        try:
            stored = renamed(find_tensors(loaded.folder), diffusers_name)
        except ModelError as error:
            raise ModelError(
                f"LoRAs are changed by reading {loaded.folder} again, which fails: {error}",
                code=error.code,
                param=error.param,
            ) from error
    if beside:
        layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        before = [list(layer.adapters) for layer in layers]
        for layer in layers:
            layer.adapters = torch.nn.ModuleList()
        try:
            add_beside(model, changes)
        except ModelError:
            for layer, adapters in zip(layers, before, strict=True):
                layer.adapters = torch.nn.ModuleList(adapters)
            raise
    places = dict(model.named_parameters())
    loaded.touched |= set(names)  # until all is done: what fails half way is mended by the next
    for name, raw in read_tensors(((n, stored[n]) for n in names - beside), encoded=True):
        value = stored[name].decoded(raw)
        place = quantised_place(model, name)
        if place is not None:
            value = changes.apply(name, value.to(place[0].bias.device))
            check_finite(name, stored[name], value, value)
            _requantise(*place, value, loaded)
            continue
        target, rows = fused_place(name, lambda n: tuple(places[n].shape))
        part: Tensor = places[target] if rows is None else places[target][rows]
        changed = changes.apply(name, value.to(part.device)).to(part.dtype)
        check_finite(name, stored[name], changed, value)
        part.copy_(changed)
    loaded.loras, loaded.touched = tuple(loras), set(changes.parts)


def _requantise(
    layer: QuantizedLinear, first: int, last: int, weight: Tensor, loaded: LoadedFrom
) -> None:
    """New values for some rows of a layer that was quantised here."""
    rows = quantise(weight, quantised_as(loaded.weights))
    layer.raw[0].view(layer.out_features, -1)[first:last].copy_(rows.raw)
    layer.scales[0][first:last].copy_(rows.encoding.scale)  # type: ignore[union-attr]
