"""LoRAs merged into a transformer's weights as it is loaded: low-rank products, and plain
differences.

Merging costs nothing at a step, and an engine can be exported of it. A file is read and checked
whole before anything is changed; sums are made in float32 and rounded once, into whatever the
weights are kept in.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor, nn

from nexus_rt.core.errors import InputError, ModelError, choose, shorten, shown
from nexus_rt.loading.formats.safetensors import is_file, read_header
from nexus_rt.loading.formats.stored import read_tensors
from nexus_rt.loading.layouts import fused_place
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

PACKAGED = Path(__file__).resolve().parents[1] / "mini" / "loras"  # found by name
# as diffusers and PEFT name them
FOLDER_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
)
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
LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Lora:
    """A LoRA file, how strongly it is merged, and into which expert of a generator that has two
    ("high" or "low"; None: into both, or the only one).

    half: the expert that it is being merged into, which `loras_of` sets: a file may hold one LoRA
        for each.
    """

    path: Path
    scale: float = 1.0
    expert: str | None = None
    half: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, Path)):
            raise InputError(
                f"a LoRA's path is {shown(self.path)}; expected a file.",
                code="invalid_type",
                param="path",
            )
        object.__setattr__(self, "path", Path(self.path))
        number = isinstance(self.scale, Real) and not isinstance(self.scale, bool)
        if not number or not abs(self.scale) <= LARGEST:
            raise InputError(
                f"LoRA {shorten(self.path)}: scale {shown(self.scale)} is not finite in float32;"
                " expected a number, such as 0.8.",
                code="not_finite" if number else "invalid_type",
                param="scale",
            )
        if self.expert is not None:
            choose("expert", self.expert, EXPERTS)

    @classmethod
    def parse(cls, text: str | Path) -> Lora:
        """ "FILE", "FILE@SCALE" or "FILE@SCALE:EXPERT"; a folder is its one safetensors file, or
        the one that diffusers or PEFT would name; "few_step" is the mini pair's own.

        Raises:
            InputError: no such safetensors file, a scale that is no finite number, or an expert
                that is neither "high" nor "low".
        """
        if not isinstance(text, (str, Path)):
            raise InputError(
                f"a LoRA is {shown(text)}; expected FILE or FILE@SCALE.", code="invalid_type"
            )
        name, at, scale = str(text).rpartition("@")
        if not at or _is_there(_expanded(str(text))):
            name, scale = str(text), "1"
        scale, colon, expert = scale.partition(":")
        if colon:
            choose("expert", expert, EXPERTS)
        try:
            lora = cls(_expanded(name), float(scale), expert or None)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"LoRA {shorten(text)}: {shown(scale)} is no scale; expected FILE@SCALE, such as"
                " distill.safetensors@0.8.",
                param="scale",
            ) from None
        packaged = PACKAGED / f"{lora.path}.safetensors"
        there = _is_there(lora.path)
        path = _in_folder(lora.path) if there and lora.path.is_dir() else lora.path
        if not there and lora.path.name == str(lora.path) and is_file(packaged):
            path = packaged
        if not is_file(path) or path.suffix != ".safetensors":
            raise InputError(
                f"LoRA {shorten(path)} is not a safetensors file here; expected FILE or"
                " FILE@SCALE.",
                code="not_found",
                param="path",
            )
        return cls(path, lora.scale, lora.expert)


def _expanded(name: str) -> Path:
    """A path with its `~` replaced.

    Raises:
        InputError: the home of a user that is not known.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"LoRA {shorten(name)}: its home folder is not known ({shorten(error)}); write the"
            f" whole path.",
            code="not_found",
            param="path",
        ) from None


def _is_there(path: Path) -> bool:
    """Whether a path exists; a name that no file can have (too long, NUL) does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _in_folder(folder: Path) -> Path:
    """The LoRA file of a folder."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        several = ", ".join(f.name for f in files[:3]) or "none"
        raise InputError(
            f"LoRA {folder} is a folder with {len(files)} safetensors files ({several}); name the"
            " one to merge.",
            param="path",
        )
    return files[0]


LoraSource = str | Path | Lora | Sequence[str | Path | Lora]


def parse_loras(source: LoraSource) -> tuple[Lora, ...]:
    """One LoRA or several, each as `Lora.parse` reads it."""
    several = [source] if isinstance(source, (str, Path, Lora)) else source
    if not isinstance(several, Sequence):
        raise InputError(
            f"loras are {shown(source)}; expected a file, or a list of files or Lora(path, scale).",
            code="invalid_type",
        )
    return tuple(s if isinstance(s, Lora) else Lora.parse(s) for s in several)


def loras_of(
    generator: str, experts: Collection[str], loras: Sequence[Lora]
) -> dict[str, list[Lora]]:
    """What is merged into each transformer of a generator: by expert, or under "" where it is one.

    Raises:
        InputError: a LoRA for an expert of a generator that has none.
    """
    for lora in loras:
        if lora.expert is not None and lora.expert not in experts:
            raise InputError(
                f"LoRA {lora.path} is for the {lora.expert}-noise expert, and the {generator}"
                f" generator is one transformer; leave :{lora.expert} out.",
                code="unsupported",
                param="expert",
            )
    return {
        name: [replace(a, half=name or None) for a in loras if a.expert in (None, name)]
        for name in experts
    }


def loras_hash(loras: Mapping[str, Sequence[Lora]]) -> str | None:
    """A hash of what is merged into which generator: contents, scales and order. None where nothing
    is."""
    if not any(loras.values()):
        return None
    content = {}
    for name, files in loras.items():
        content[name] = [
            (
                hashlib.sha256(_content(lora.path)).hexdigest(),
                lora.scale,
                *((lora.expert,) if lora.expert else ()),
            )
            for lora in files
        ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(path: Path) -> bytes:
    """Everything that decides a LoRA's meaning: the file, and the config beside it where there is
    one."""
    beside = path.with_name("adapter_config.json")
    return path.read_bytes() + (beside.read_bytes() if beside.is_file() else b"")


@dataclass(frozen=True)
class _Product:
    """`scale * up @ down`, or what a bias gets of it (down None)."""

    up: Tensor
    down: Tensor | None
    scale: float


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
        self.parts: dict[str, list[tuple[float, Tensor | _Product]]] = {}
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
            if isinstance(part, Tensor):
                total.add_(part.to(weight.device).float().view(total.shape), alpha=strength)
            elif part.down is None:
                total.add_(
                    part.up.to(weight.device).float().view(total.shape), alpha=strength * part.scale
                )
            else:
                up, down = (t.to(weight.device).float() for t in (part.up, part.down))
                total.add_((up @ down).view(total.shape), alpha=strength * part.scale)
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
        if not any(_nonzero(part) for _, part in own):
            raise ModelError(
                f"{lora.path} changes nothing: it holds no differences, or only zeros; download it"
                " again."
            )
        for name, part in own:
            if not _within(part, lora.scale):
                raise ModelError(
                    f"{lora.path}: {name} times scale {lora.scale} is beyond float32; pass a"
                    " smaller scale, such as 0.8.",
                    code="out_of_range",
                    param="scale",
                )
            self.parts.setdefault(name, []).append((lora.scale, part))

    def _bias(
        self, name: str, bias: Tensor, pairs: dict, keys: dict, scaling: Scaling | None, path: Path
    ) -> _Product:
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
        return _Product(
            bias,
            None,
            _scale(tensors, keys[weight], scaling, tensors["down"].shape[0], f"{path}: {weight}"),
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
        if not bool(tensor.float().isfinite().all()):
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


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _parts(
    tensors: dict[str, Tensor],
    shape: tuple[int, ...],
    key: Key,
    scaling: Scaling | None,
    where: str,
) -> list[Tensor | _Product]:
    """What a parameter of `shape` gets; where: for errors."""
    parts: list[Tensor | _Product] = []
    if "add" in tensors:
        if _squeezed(tensors["add"].shape) != _squeezed(shape):
            raise ModelError(
                f"{where} is {tuple(tensors['add'].shape)}, and the model's {shape}.",
                code="mismatch",
            )
        parts.append(tensors["add"])
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
        scale = _scale(tensors, key, scaling, rank, where)
        if (
            float(up.float().abs().max()) * float(down.float().abs().max()) * rank * abs(scale)
            > LARGEST
        ):
            raise ModelError(
                f"{where}: the product of its halves is beyond float32; download the file again.",
                code="out_of_range",
            )
        parts.append(_Product(up, down, scale))
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


def _within(part: Tensor | _Product, strength: float) -> bool:
    """Whether no element of a difference at a strength is beyond float32."""
    largest = lambda t: float(t.float().abs().max()) if t.numel() else 0.0
    if isinstance(part, Tensor):
        return largest(part) * abs(strength) <= LARGEST
    rank = 1 if part.down is None else part.down.shape[0] * largest(part.down)
    return largest(part.up) * rank * abs(part.scale) * abs(strength) <= LARGEST


def _nonzero(part: Tensor | _Product) -> bool:
    if isinstance(part, Tensor):
        return bool(part.float().any())
    return (
        part.scale != 0
        and bool(part.up.float().any())
        and (part.down is None or bool(part.down.float().any()))
    )


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
            if isinstance(part, Tensor) or part.down is None:
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
