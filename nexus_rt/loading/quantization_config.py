"""`quantization_config`, as transformers, diffusers and compressed-tensors write it into
`config.json` or a safetensors header: what it says of all 8-bit weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from nexus_rt.core import documents
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.notes import CONFIG, FP8, REMEDY, Note, kind_of, known_fields

UNPACKED = ("int-quantized", "float-quantized", "naive-quantized", "dense", None)


class _Fp8(msgspec.Struct):
    quant_method: str
    weight_block_size: list[int] | None = None
    fmt: str | None = None


class _Weights(msgspec.Struct):
    type: str = "int"
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | str | None = None
    num_bits: int = 8
    symmetric: bool = True
    dynamic: bool | str = False
    actorder: bool | str | None = None


def config_note(config: Mapping[str, Any], where: str) -> Note | None:
    """What `quantization_config` says of all 8-bit weights; None where there is none.

    Raises:
        ModelError: a method or a field that is not read; names it.
    """
    value = config.get(CONFIG)
    if value is None:
        return None
    where = f"{where}: {CONFIG}"
    method = value.get("quant_method") if isinstance(value, dict) else kind_of(value)
    if method == "fp8":
        return _of_fp8(value, where)
    if method == "compressed-tensors":
        return _of_compressed(value, where)
    raise ModelError(
        f"{where} is of quant_method {shorten(json.dumps(method), 60)}, which is not read here;"
        f" expected fp8 or compressed-tensors: {REMEDY}.",
        code="unsupported",
        param="quant_method",
    )


def header_config(metadata: Mapping[str, str], where: str) -> Note | None:
    """The same of a safetensors header."""
    if CONFIG not in metadata:
        return None
    value = documents.parse(metadata[CONFIG], f"{where}: {CONFIG}")
    return config_note({CONFIG: value}, where)


def _of_fp8(value: dict[str, Any], where: str) -> Note:
    """transformers' FineGrainedFP8Config, and the same form of other publishers."""
    read = _Fp8.__struct_fields__
    known = {k: v for k, v in known_fields("fp8", value, where).items() if k in read}
    stored = documents.check(known, _Fp8, where)
    kinds = {None: tuple(FP8), "e4m3": (torch.float8_e4m3fn,), "e5m2": (torch.float8_e5m2,)}
    if stored.fmt not in kinds:
        raise ModelError(
            f"{where} sets fmt to {shorten(stored.fmt, 40)!r}; expected e4m3 or e5m2.",
            code="unsupported",
            param="fmt",
        )
    block = stored.weight_block_size
    return Note(where, kinds[stored.fmt], None if block is None else (_sides(block, where),))


def _of_compressed(value: dict[str, Any], where: str) -> Note:
    """compressed-tensors' own: 8-bit weights beside their scales, of one setting."""
    value = known_fields("compressed-tensors", value, where)
    _only(value, "format", UNPACKED, where)
    sparsity = value.get("sparsity_config") or {}
    dense = isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"
    rotations = value.get("transform_config") or {}
    plain = isinstance(rotations, dict) and not rotations.get("config_groups")
    for name, fine in (("sparsity_config", dense), ("transform_config", plain)):
        if not fine:
            raise ModelError(
                f"{where} sets {name} ({shorten(json.dumps(value[name]), 80)}), which is not"
                f" read here;"
                f" {REMEDY}.",
                code="unsupported",
                param=name,
            )
    groups = value.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError(
            f"{where} has no config_groups; get the file again.",
            code="missing",
            param="config_groups",
        )
    notes = [_of_group(group, f"{where}: {shorten(name, 60)}") for name, group in groups.items()]
    if any(
        (n.dtypes, n.blocks, n.rows) != (notes[0].dtypes, notes[0].blocks, notes[0].rows)
        for n in notes
    ):
        raise ModelError(
            f"{where} has groups of different weights, which are not read here; {REMEDY}.",
            code="unsupported",
            param="config_groups",
        )
    return notes[0]


def _of_group(value: Any, where: str) -> Note:
    group = known_fields("config_groups", value, where)
    _only(group, "format", UNPACKED, where)
    where = f"{where}: weights"
    read = _Weights.__struct_fields__
    weights = known_fields("weights", group.get("weights"), where)
    stored = documents.check({k: v for k, v in weights.items() if k in read}, _Weights, where)
    for name, values in (
        ("num_bits", (8,)),
        ("symmetric", (True,)),
        ("dynamic", (False,)),
        ("actorder", (None, False)),
        ("type", ("int", "float")),
        ("strategy", ("tensor", "channel", "group", "block")),
    ):
        _only({name: getattr(stored, name)}, name, values, where)
    blocks = None
    if stored.strategy == "block":
        sides = stored.block_structure
        if isinstance(sides, str) and re.fullmatch(r"[0-9]{1,6}x[0-9]{1,6}", sides):
            sides = [int(n) for n in sides.split("x")]
        blocks = (_sides(sides, where),)
    elif stored.strategy == "group":
        blocks = (_sides([1, stored.group_size], where),)
    kinds = (torch.int8,) if stored.type == "int" else (torch.float8_e4m3fn,)
    return Note(where, kinds, blocks, {"tensor": False, "channel": True}.get(str(stored.strategy)))


def _sides(value: Any, where: str) -> tuple[int, int]:
    """Rows and columns of a block."""
    numbers = isinstance(value, list) and len(value) == 2
    if not numbers or not all(isinstance(n, int) and n > 0 for n in value):
        raise ModelError(
            f"{where} has blocks of {shorten(json.dumps(value), 60)}; expected two whole numbers"
            f" from 1"
            " up, rows and columns.",
            code="invalid_value",
        )
    return value[0], value[1]


def _only(value: Mapping[str, Any], name: str, values: tuple[Any, ...], where: str) -> None:
    """Raise unless a field has one of some values."""
    stored = value.get(name)
    if not any(stored is v or (type(stored) is type(v) and stored == v) for v in values):
        expected = ", ".join(json.dumps(v) for v in values if v is not None)
        raise ModelError(
            f"{where} sets {name} to {shorten(json.dumps(stored), 60)}, which is not read here;"
            f" expected {expected}: {REMEDY}.",
            code="unsupported",
            param=name,
        )
