"""What a checkpoint says of its own quantisation: ComfyUI's notes (a tensor `.comfy_quant` beside a
layer, `_quantization_metadata` in the header), and the fields of these and of
`quantization_config` (`nexus_rt.loading.quantization_config`).

Every field is used, checked, or harmless to the weights (`FIELDS`); any other is refused by its
name, since a rotation, a zero point or another axis that is passed over gives wrong weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from nexus_rt.core import documents
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.names import plain_name
from nexus_rt.models.encodings import ROTATIONS

NOTE, METADATA, CONFIG = ".comfy_quant", "_quantization_metadata", "quantization_config"
MAX_NOTE = 2**16  # bytes of a layer's note
FORMATS = {  # of ComfyUI's notes -> what the weight is stored in
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
    "int8_blockwise": torch.int8,
}
USED, CHECKED, HARMLESS = "used", "checked", "harmless"
FIELDS = {  # of each kind of note -> what becomes of them
    "layer": {
        "format": (USED, "type of the stored numbers"),
        "group_size": (USED, "side of a block that has one scale"),
        "convrot": (USED, "the columns are rotated in groups; undone"),
        "convrot_groupsize": (USED, "columns of a group, 256 where it is not there"),
        "params": (USED, "an older place of these fields"),
        "per_row": (CHECKED, "a scale a row"),
        "orig_shape": (CHECKED, "the weight's shape"),
        "symmetric": (CHECKED, "no zero points: only true"),
        "orig_dtype": (HARMLESS, "type before it was quantised"),
        "full_precision_matrix_mult": (HARMLESS, "how a product is computed"),
    },
    METADATA: {
        "layers": (USED, "notes by layer"),
        "format_version": (CHECKED, 'only "1.0"'),
    },
    "fp8": {
        "quant_method": (USED, ""),
        "weight_block_size": (USED, "rows and columns of a block that has one scale"),
        "fmt": (CHECKED, "type of the stored numbers"),
        "activation_scheme": (HARMLESS, "how activations are quantised"),
        "scale_fmt": (HARMLESS, "rounding of the scales, which are read as they are stored"),
        "modules_to_not_convert": (HARMLESS, "layers without scales"),
        "ignored_layers": (HARMLESS, "layers without scales"),
        "dequantize": (HARMLESS, "how transformers loads it"),
    },
    "compressed-tensors": {
        "quant_method": (USED, ""),
        "config_groups": (USED, "settings of layers"),
        "format": (CHECKED, "a tensor and its scales, unpacked"),
        "sparsity_config": (CHECKED, "only a dense one"),
        "transform_config": (CHECKED, "only none: these are rotations"),
        "quantization_status": (HARMLESS, ""),
        "global_compression_ratio": (HARMLESS, ""),
        "ignore": (HARMLESS, "layers without scales"),
        "kv_cache_scheme": (HARMLESS, "how keys and values are cached"),
        "version": (HARMLESS, "of the library"),
        "provider": (HARMLESS, "the library"),
    },
    "config_groups": {
        "weights": (USED, "settings of the weights"),
        "targets": (HARMLESS, "names of layers"),
        "input_activations": (HARMLESS, "how activations are quantised"),
        "output_activations": (HARMLESS, "how activations are quantised"),
        "format": (CHECKED, "a tensor and its scales, unpacked"),
    },
    "weights": {
        "type": (USED, "int or float"),
        "strategy": (USED, "one scale a tensor, channel, group or block"),
        "group_size": (USED, "columns that have one scale"),
        "block_structure": (USED, "rows and columns of a block that has one scale"),
        "num_bits": (CHECKED, "only 8"),
        "symmetric": (CHECKED, "no zero points: only true"),
        "dynamic": (CHECKED, "only false"),
        "actorder": (CHECKED, "only none: columns in another order"),
        "scale_dtype": (HARMLESS, "the scales' own type is read"),
        "zp_dtype": (HARMLESS, "of zero points, which are not there"),
        "observer": (HARMLESS, "how scales were chosen"),
        "observer_kwargs": (HARMLESS, "how scales were chosen"),
    },
}
# keys of headers that tell of a rotation outside the notes
ROTATION = re.compile(r"convrot|hadamard|quarot|spinquant|rotat", re.IGNORECASE)
OFF = ("", "0", "false", "none", "null", "no")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
FP8 = {torch.float8_e4m3fn: "fp8 e4m3", torch.float8_e5m2: "fp8 e5m2"}
REMEDY = "get the checkpoint in bf16, fp8, int8 with plain scales, or GGUF"


class _Layer(msgspec.Struct):
    """Fields of a layer's note, with their types."""

    format: str
    group_size: int | None = None
    convrot: bool | None = None
    convrot_groupsize: int | None = None
    per_row: bool | None = None
    orig_shape: list[int] | None = None
    symmetric: bool = True
    orig_dtype: str | None = None
    full_precision_matrix_mult: bool = False


@dataclass(frozen=True)
class Note:
    """What a weight is stored as; None where the note leaves a thing open.

    dtypes: of the stored numbers. blocks: rows and columns that have one scale; the scales' shape
    decides between several. rows: whether there is a scale a row. rotation: columns of a rotated
    group. shape: of the weight. where: for errors.
    """

    where: str
    dtypes: tuple[torch.dtype, ...]
    blocks: tuple[tuple[int, int], ...] | None = None
    rows: bool | None = None
    rotation: int | None = None
    shape: tuple[int, ...] | None = None


def known_fields(kind: str, value: Any, where: str) -> dict[str, Any]:
    """An object whose fields are all of a kind."""
    if not isinstance(value, dict):
        raise ModelError(
            f"{where} is {kind_of(value)}; expected an object with fields such as"
            f" {next(iter(FIELDS[kind]))!r}.",
            code="invalid_type",
        )
    if unknown := [k for k in value if k not in FIELDS[kind]]:
        raise ModelError(
            f"{where} sets {shorten(unknown[0], 60)!r}"
            f" ({shorten(json.dumps(value[unknown[0]]), 60)}),"
            f" which is not read here and may change the weights; {REMEDY}.",
            code="unsupported",
            param=shorten(unknown[0], 60),
        )
    return value


def kind_of(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )


def layer_note(value: Any, where: str) -> dict[str, Any]:
    """A layer's note as one object: fields of `params` are beside the others.

    Raises:
        ModelError: a field that is not known, or set to two values.
    """
    note = dict(known_fields("layer", value, where))
    params = note.pop("params", None)
    return _united(
        note, known_fields("layer", {} if params is None else params, f"{where}'s params"), where
    )


def _united(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Two notes of a layer as one.

    Raises:
        ModelError: a field has two values.
    """
    for key in one.keys() & other.keys():
        if one[key] != other[key]:
            raise ModelError(
                f"{where}: {key} is {shorten(json.dumps(one[key]), 40)} in one note and"
                f" {shorten(json.dumps(other[key]), 40)} in another; get the file again.",
                code="conflict",
                param=key,
            )
    return {**one, **other}


def header_notes(metadata: Mapping[str, str], where: str) -> dict[str, dict[str, Any]]:
    """Notes by layer of a safetensors header.

    Raises:
        ModelError: no JSON, or a field that is not known.
    """
    if METADATA not in metadata:
        return {}
    where = f"{where}: {METADATA}"
    stored = known_fields(METADATA, documents.parse(metadata[METADATA], where), where)
    version = stored.get("format_version", "1.0")
    if version != "1.0":
        raise ModelError(
            f"{where} is of format_version {shorten(json.dumps(version), 40)}; version 1.0 is read"
            " here.",
            code="unsupported",
            param="format_version",
        )
    layers = stored.get("layers", {})
    if not isinstance(layers, dict):
        raise ModelError(
            f"{where}: the layers are no object but {kind_of(layers)}; get it again.",
            code="invalid_type",
            param="layers",
        )
    return {k: layer_note(v, f"{where}: {shorten(k, 120)}") for k, v in layers.items()}


def by_layer(
    notes: Iterable[tuple[str, str, Mapping[str, Any]]], weights: Iterable[str]
) -> dict[str, Note]:
    """Notes by the weight that they are of.

    Args:
        notes: a layer's name, with or without the file's prefix; where it is, for errors; its
            fields.

    Raises:
        ModelError: a layer that is not there, a value that is not read, or two that differ.
    """
    weights, united = set(weights), dict[str, tuple[str, dict[str, Any]]]()
    for layer, where, note in notes:
        weight = _weight_of(plain_name(f"{layer}.").removesuffix("."), weights)
        if weight is None:
            raise ModelError(
                f"{where} is of a layer that is not there; get the file again.", code="missing"
            )
        before = united[weight][1] if weight in united else {}
        united[weight] = where, _united(before, note, where)
    return {weight: _read(note, where) for weight, (where, note) in united.items()}


def _weight_of(layer: str, weights: set[str]) -> str | None:
    """The weight of a layer, whose name may lack the file's prefix or have one more."""
    names = [layer, *(p + layer for p in PREFIXES)]
    names += [layer.removeprefix(p) for p in PREFIXES if layer.startswith(p)]
    return next((f"{n}.weight" for n in names if f"{n}.weight" in weights), None)


def _read(fields: Mapping[str, Any], where: str) -> Note:
    """A layer's note with its values checked."""
    kind = fields.get("format")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ModelError(
            f"{where} is quantised as {shorten(json.dumps(kind), 60)}, which is not read here;"
            f" expected"
            f" one of {', '.join(FORMATS)}.",
            code="unsupported",
            param="format",
        )
    note = documents.check(dict(fields), _Layer, where)
    if not note.symmetric:
        raise ModelError(
            f"{where} sets symmetric to false (zero points), which is not read here; {REMEDY}.",
            code="unsupported",
            param="symmetric",
        )
    group = note.group_size
    if group is not None and group < 1:
        raise ModelError(
            f"{where} sets group_size to {group}; expected 1 or more.",
            code="out_of_range",
            param="group_size",
        )
    return Note(
        where,
        (FORMATS[kind],),
        None if group is None else ((group, group), (1, group)),
        note.per_row,
        _rotation(note, where),
        None if note.orig_shape is None else tuple(note.orig_shape),
    )


def _rotation(note: _Layer, where: str) -> int | None:
    """Columns of a group that is rotated, None where none is."""
    size = note.convrot_groupsize
    if note.convrot is None and size is not None:
        raise ModelError(
            f"{where} sets convrot_groupsize and not convrot: whether its weights are rotated is"
            f" not known; {REMEDY}.",
            code="missing",
            param="convrot",
        )
    if not note.convrot:
        return None
    if note.format != "int8_tensorwise":
        raise ModelError(
            f"{where} sets convrot for {note.format}, which no publisher defines; {REMEDY}.",
            code="unsupported",
            param="convrot",
        )
    size = 256 if size is None else size
    if size not in ROTATIONS:
        raise ModelError(
            f"{where} sets convrot_groupsize to {shorten(size, 40)}; expected one of"
            f" {', '.join(map(str, ROTATIONS))}.",
            code="unsupported",
            param="convrot_groupsize",
        )
    return size


def refuse_rotation(metadata: Mapping[str, Any], where: str) -> None:
    """Raise where a header's key tells of rotated weights that no note describes."""
    for key, value in metadata.items():
        if ROTATION.search(key) and str(value).strip().lower() not in OFF:
            raise ModelError(
                f"{where}: {shorten(key, 120)!r} in its header is {shorten(value, 60)!r}, and no"
                f" note says"
                f" how its weights are rotated; {REMEDY}.",
                code="unsupported",
                param=shorten(key, 60),
            )
