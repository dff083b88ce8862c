"""safetensors files: their headers, the indexes of sharded checkpoints, and writing both."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus_rt.core import documents
from nexus_rt.core.documents import parse
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.core.paths import failed_file
from nexus_rt.loading.formats.stored import MAX_SIDE, StoredTensor

MAX_DIMENSIONS = 16  # torch has 64; no parameter of a model has more than 5
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
SHARD_BYTES = 2 * 10**9


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins."""
    if not is_file(path):
        raise ModelError(
            f"{shorten(path)} is missing; download the folder again.", code="not_found"
        )
    try:
        # the library's own validation: offsets, overlaps, shapes against bytes, length
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({shorten(error)}); it is truncated,"
            f" corrupted or"
            " of another format: download or convert it again.",
            code="damaged",
        ) from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return (
            parse(
                file.read(size), f"{path}: the header", remedy="download or convert the file again"
            ),
            8 + size,
        )


def read_header(path: Path, integers: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, as they are stored.

    Args:
        integers: whole numbers too, which are no weights of ours but a LoRA's alpha may be.

    Raises:
        ModelError: the file is missing, truncated, corrupted, holds a name twice, or a type this
            runtime does not read.
    """
    header, begin = _header(path)
    known = DTYPES | (INTEGERS if integers else {})
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in known:
            raise ModelError(
                f"{path}: {shorten(name, 120)} has type {entry['dtype']}; expected one of"
                f" {', '.join(known)}.",
                code="unsupported",
            )
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if len(shape) > MAX_DIMENSIONS or any(n > MAX_SIDE for n in shape):
            raise ModelError(
                f"{path}: {shorten(name, 120)} has shape {shorten(shape, 80)}; expected at most"
                f" {MAX_DIMENSIONS} sides of at most {MAX_SIDE} elements.",
                code="too_large",
            )
        tensors[name] = StoredTensor(
            path, begin + start, begin + stop, known[entry["dtype"]], shape
        )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The strings under `__metadata__` of a safetensors file; errors as `read_header`."""
    return _header(path)[0].get("__metadata__") or {}


class Index(msgspec.Struct):
    """`*.index.json`: which shard holds which tensor."""

    weight_map: dict[str, str]


def read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    """The tensors of an index's shards, each where the index says."""
    remedy = "download the folder again"
    where = documents.read(index, Index, remedy=remedy).weight_map
    if not where:
        raise ModelError(f"{index} names no tensor; {remedy}.", code="missing")
    if outside := [s for s in where.values() if not re.fullmatch(r"[^/\\\0]+\.safetensors", s)]:
        raise ModelError(
            f"{index} names {shorten(outside[0], 120)!r}; expected names of safetensors files in"
            f" its"
            " folder.",
            code="unsafe",
        )
    shards = sorted(set(where.values()))
    if lost := [s for s in shards if not (folder / s).is_file()]:
        raise ModelError(
            f"{folder}: {index.name} names {len(shards)} shards, but {shorten(', '.join(lost))} is"
            " missing.",
            code="not_found",
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, stored in read_header(folder / shard, integers=True).items():
            if name in tensors:
                raise ModelError(
                    f"{folder}: {shorten(name, 120)} is in {tensors[name].path.name} and in"
                    f" {shard};"
                    f" {remedy}.",
                    code="duplicate",
                )
            tensors[name] = stored
    for name, shard in where.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise ModelError(
                f"{folder}: {shard} lacks {shorten(name, 120)}, which {index.name} says it holds;"
                f" {remedy}.",
                code="missing",
            )
    return tensors


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have (too long, NUL) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def write_shards(
    folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES
) -> None:
    """Write tensors as safetensors, in files of at most about `limit` bytes with an index where
    there are several."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        try:
            save_file(shard, folder / f"part-{len(names)}.safetensors", {"format": "pt"})
        except SafetensorError as error:  # its writer raises this for a full disk too
            full = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
            raise ModelError(
                failed_file(str(folder), OSError(full, shorten(error))), code="not_writable"
            ) from error
        names.append(list(shard))
        shard, size = {}, 0

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > limit:
            flush()
        shard[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    count = len(names)
    weight_map: dict[str, str] = {}
    for i, own in enumerate(names):
        file = (
            f"{stem}.safetensors"
            if count == 1
            else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        )
        os.replace(folder / f"part-{i}.safetensors", folder / file)
        weight_map |= dict.fromkeys(own, file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
