"""What LoRAs add to a transformer's parameters: low-rank products, and plain differences.

A file is read and checked whole before anything is changed; sums are made in float32 and rounded
once, into whatever the weights are kept in.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.finite import is_finite
from nexus_rt.loading.formats.safetensors import read_header
from nexus_rt.loading.formats.stored import read_tensors
from nexus_rt.loading.layouts import fused_place
from nexus_rt.loading.lora import LARGEST, Lora
from nexus_rt.loading.lora_file import (
    ENDINGS,
    SECOND,
    Key,
    Scaling,
    is_image_key,
    module_names,
    read_key,
    read_scaling,
)
from nexus_rt.method.step import EXPERTS
from nexus_rt.models.quantized import Adapter, QuantizedLinear

OTHER_KINDS = {  # parts of keys -> the adapter that has them
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_w": "LoKr",
    "hada_w": "LoHa",
    "oft_blocks": "OFT",
    "oft_r": "OFT",
    "ia3_l": "IA3",
    "glora": "GLoRA",
}


@dataclass(frozen=True)
class Change:
    """`scale * up @ down`; without a `down`, `scale * up`: a whole difference, or what a bias gets
    of a product."""

    up: Tensor
    down: Tensor | None = None
    scale: float = 1.0

    def add_to(self, total: Tensor, strength: float) -> None:
        """Add it to a parameter in float32, in place."""
        factors = [t.to(total.device).float() for t in (self.up, self.down) if t is not None]
        value = factors[0] if self.down is None else factors[0] @ factors[1]
        total.add_(value.view(total.shape), alpha=strength * self.scale)

    def bound(self) -> float:
        """What no element of it is larger than."""
        largest = lambda t: float(t.float().abs().max()) if t.numel() else 0.0
        rank = 1.0 if self.down is None else self.down.shape[0] * largest(self.down)
        return largest(self.up) * rank * abs(self.scale)

    def __bool__(self) -> bool:
        """Whether anything of it is not zero."""
        factors = [t for t in (self.up, self.down) if t is not None]
        return self.scale != 0 and all(bool(t.float().any()) for t in factors)


class Changes:
    """What LoRAs add to a transformer's parameters, all files read and checked against its shapes.

    Args:
        shapes: of the parameters, in diffusers' names.

    Raises:
        ModelError: a damaged file, keys that are none of a LoRA's or of this architecture, halves
            or shapes that do not fit, one place under two namings, numbers that are not finite, or
            a file that changes nothing.
    """

    def __init__(self, loras: Sequence[Lora], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.parts: dict[str, list[tuple[float, Change]]] = {}
        for lora in loras:
            self._add(lora)

    def __bool__(self) -> bool:
        return bool(self.parts)

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A parameter with everything added, float32 where anything is."""
        if name not in self.parts:
            return weight
        total = weight.float() if weight.dtype != torch.float32 else weight.clone()
        for strength, part in self.parts[name]:
            part.add_to(total, strength)
        return total

    def _add(self, lora: Lora) -> None:
        if (read := _read(lora)) is None:
            return
        pairs, keys = read
        if strange := sorted(pairs.keys() - self.shapes.keys()):
            raise ModelError(
                f"{lora.path} changes {len(strange)} parameters that this model has not, such as"
                f" {shorten(strange[0], 120)}; it was made for another architecture.",
                code="mismatch",
            )
        second = any(key.second for key in keys.values())
        scaling, own = read_scaling(lora.path, second), []
        for name, tensors in pairs.items():
            for part in _parts(
                tensors, self.shapes[name], keys[name], scaling, f"{lora.path}: {name}"
            ):
                own.append((name, part))
        for name, tensors in pairs.items():  # a bias of a product has its product's scale
            if "up_bias" in tensors:
                own.append(
                    (name, self._bias(name, tensors["up_bias"], pairs, keys, scaling, lora.path))
                )
        if not any(part for _, part in own):
            raise ModelError(
                f"{lora.path} changes nothing: it holds no differences, or only zeros; download it"
                " again."
            )
        for name, part in own:
            if not part.bound() * abs(lora.scale) <= LARGEST:
                raise ModelError(
                    f"{lora.path}: {name} times scale {lora.scale} is beyond float32; pass a"
                    " smaller scale, such as 0.8.",
                    code="out_of_range",
                    param="scale",
                )
            self.parts.setdefault(name, []).append((lora.scale, part))

    def _bias(
        self, name: str, bias: Tensor, pairs: dict, keys: dict, scaling: Scaling | None, path: Path
    ) -> Change:
        weight = name.removesuffix("bias") + "weight"
        if not {"down", "up"} <= pairs.get(weight, {}).keys():
            raise ModelError(
                f"{path}: {name} has a bias of a product that is not there; download the file"
                " again.",
                code="missing",
            )
        if bias.numel() != math.prod(self.shapes[name]):
            raise ModelError(
                f"{path}: {name} is {tuple(bias.shape)}, and the model's {self.shapes[name]}.",
                code="mismatch",
            )
        tensors = pairs[weight]
        return Change(
            bias,
            scale=_scale(
                tensors, keys[weight], scaling, tensors["down"].shape[0], f"{path}: {weight}"
            ),
        )


Pairs = tuple[dict[str, dict[str, Tensor]], dict[str, Key]]


def _read(lora: Lora) -> Pairs | None:
    """Parameter in diffusers' names -> its tensors by kind, and a key of it: of the expert that the
    file is merged into, where it holds a LoRA for each; None where all of it is the other's."""
    path, second = lora.path, lora.half == EXPERTS[1]
    first_half, second_half = halves = _halves(path)
    if first_half[0] and second_half[0]:
        if lora.half is None:
            raise ModelError(
                f"{path} holds two LoRAs, under transformer. and {SECOND}: of a generator's experts"
                " for high and low noise; this generator is one transformer: pass a file with one.",
                code="unsupported",
            )
        return halves[second]
    # the file's only LoRA goes where the user says, by default to the expert that it names
    if second_half[0] and lora.half == EXPERTS[0] and lora.expert is None:
        return None
    return second_half if second_half[0] else first_half


def _halves(path: Path) -> tuple[Pairs, Pairs]:
    """What a file holds, but for `transformer_2`, and for it."""
    halves: tuple[Pairs, Pairs] = (({}, {}), ({}, {}))
    named: dict[tuple[bool, str, str], str] = {}
    unknown, image = [], 0
    for name, tensor in read_tensors(read_header(path, integers=True).items()):
        if is_image_key(name):
            image += 1
            continue
        if (key := read_key(name)) is None:
            unknown.append(name)
            continue
        place = key.second, key.parameter, key.kind
        if other := named.get(place):
            raise ModelError(
                f"{path}: {shorten(other, 120)} and {shorten(name, 120)} are one place under two"
                f" names;"
                " keep one of them.",
                code="duplicate",
            )
        named[place] = name
        pairs, keys = halves[key.second]
        if not tensor.is_floating_point() and key.kind != "alpha":
            raise ModelError(
                f"{path}: {shorten(name, 120)} holds whole numbers ({tensor.dtype}); expected a"
                f" LoRA's"
                " floats.",
                code="invalid_type",
            )
        if not is_finite(tensor):
            raise ModelError(
                f"{path}: {shorten(name, 120)} holds NaN or infinity; download the file again.",
                code="not_finite",
            )
        pairs.setdefault(key.parameter, {})[key.kind] = tensor.clone()
        keys.setdefault(key.parameter, key)
    if unknown:
        kind, name = None, sorted(unknown)[0]
        for other in unknown:
            if kind := next((k for part, k in OTHER_KINDS.items() if part in other), None):
                name = other
                break
        raise ModelError(
            f"{path}: {len(unknown)} of its keys are none of a LoRA's, such as"
            f" {shorten(name, 120)};"
            + (
                f" it is of a {kind} adapter, which is more than a low-rank sum: merge it into the"
                " weights where it was made, and pass those."
                if kind
                else f" expected names that end in {', '.join(ENDINGS)}."
            ),
            code="unsupported" if kind else "unknown_name",
        )
    if image:
        warnings.warn(
            f"{path}: {image} keys of the image branch (k_img, v_img, img_emb) are skipped; this is"
            " a text-to-video model.",
            stacklevel=2,
        )
    return halves


def _parts(
    tensors: dict[str, Tensor],
    shape: tuple[int, ...],
    key: Key,
    scaling: Scaling | None,
    where: str,
) -> list[Change]:
    """What a parameter of `shape` gets; where: for errors."""
    parts: list[Change] = []
    if "add" in tensors:
        squeezed = lambda sides: [n for n in sides if n != 1]
        if squeezed(tensors["add"].shape) != squeezed(shape):
            raise ModelError(
                f"{where} is {tuple(tensors['add'].shape)}, and the model's {shape}.",
                code="mismatch",
            )
        parts.append(Change(tensors["add"]))
    if tensors.keys() & {"down", "up"}:
        if not {"down", "up"} <= tensors.keys():
            raise ModelError(
                f"{where}: only one half of its product is there; download the file again.",
                code="missing",
            )
        down, up = tensors["down"], tensors["up"]
        if down.ndim < 2 or up.ndim < 2:
            raise ModelError(
                f"{where} is {tuple(up.shape)} times {tuple(down.shape)}; expected two matrices.",
                code="mismatch",
            )
        down, up = down.flatten(1), up.flatten(1)
        rank = down.shape[0]
        if (
            not rank
            or up.shape[1] != rank
            or (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:]))
        ):
            raise ModelError(
                f"{where} is {tuple(up.shape)} times {tuple(down.shape)}, and the model's {shape}.",
                code="mismatch",
            )
        product = Change(up, down, _scale(tensors, key, scaling, rank, where))
        if product.bound() > LARGEST:
            raise ModelError(
                f"{where}: the product of its halves is beyond float32; download the file again.",
                code="out_of_range",
            )
        parts.append(product)
    return parts


def _scale(
    tensors: dict[str, Tensor], key: Key, scaling: Scaling | None, rank: int, where: str
) -> float:
    """A product's own factor: of its `.alpha`, else of the header or the config beside the file,
    else 1."""
    stored = None
    if "alpha" in tensors:
        if tensors["alpha"].numel() != 1:
            raise ModelError(
                f"{where}: its alpha is {tuple(tensors['alpha'].shape)}; expected one number.",
                code="mismatch",
                param="alpha",
            )
        stored = float(tensors["alpha"]) / rank
    if scaling is None:
        return 1.0 if stored is None else stored
    scale = scaling.scale(rank, *module_names(key))
    if stored is not None and not math.isclose(stored, scale, rel_tol=1e-3):
        raise ModelError(
            f"{where}: its alpha scales by {stored:g}, and {scaling.where} by {scale:g}; remove the"
            " wrong one.",
            code="conflict",
            param="alpha",
        )
    return scale


def quantised_place(model: nn.Module, name: str) -> tuple[QuantizedLinear, int, int] | None:
    """The quantised layer that holds diffusers' parameter `name`, and its rows there; None where
    the parameter is a plain one."""
    if not name.endswith(".weight"):
        return None
    layer_of = lambda target: model.get_submodule(target.removesuffix(".weight"))
    target, rows = fused_place(name, lambda n: (getattr(layer_of(n), "out_features", 0),))
    layer = layer_of(target)
    if not isinstance(layer, QuantizedLinear):
        return None
    return (layer, 0, layer.out_features) if rows is None else (layer, rows.start, rows.stop)


def add_beside(model: nn.Module, changes: Changes) -> None:
    """Add low-rank products beside quantised layers, which nothing can be merged into.

    Raises:
        ModelError: a whole matrix is to be added to one.
    """
    for name, parts in changes.parts.items():
        place = quantised_place(model, name)
        if place is None:
            continue
        layer, first, last = place
        for strength, part in parts:
            if part.down is None:
                raise ModelError(
                    f"a LoRA adds a whole matrix to {name}, which is kept in {layer.formats[0]};"
                    " only low-rank products go beside it: pass weights 'dense', 'int8' or 'fp8',"
                    " which are merged before they are quantised.",
                    code="unsupported",
                    param="weights",
                )
            there = lambda t, to=layer.bias: t.to(to.device, to.dtype)
            layer.adapters.append(
                Adapter(first, last, there(part.down), there(part.up), strength * part.scale)
            )
