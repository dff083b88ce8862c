"""What tensors a file or folder holds and where they lie: safetensors, sharded or not, GGUF, and
pickles that are read without running them.

Nothing is read but headers and the scales of 8-bit weights. Tensors come from the mapped file one
at a time, and their pages are given back, so that a checkpoint is never in memory twice.
"""

from __future__ import annotations

import mmap
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus_rt.core import documents
from nexus_rt.core.documents import parse
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading import names, scales
from nexus_rt.loading.formats import gguf as gguf_file
from nexus_rt.loading.formats import pickles
from nexus_rt.loading.scales import Header
from nexus_rt.loading.source import weights_of
from nexus_rt.models.encodings import Encoding

MAX_DIMENSIONS = 16  # torch has 64; no parameter of a model has more than 5
MAX_SIDE = 2**48  # elements of a side, which a tensor without any elements may state freely
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
WAN_CLASSES = ("WanTransformer3DModel", "WanModel")  # of a transformer's config.json
WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    dtype: of what lies there, bytes where `encoding` turns them into numbers. shape: of the tensor.
    value: the tensor itself, of a pickle.
    """

    path: Path
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: Encoding | None = None
    value: Tensor | None = None

    def decoded(self, raw: Tensor) -> Tensor:
        """What lies in the file as numbers."""
        return raw if self.encoding is None else self.encoding.decode(raw, self.shape)

    def raw(self, mapped: mmap.mmap) -> Tensor:
        """What lies in the mapped file: the bytes of GGUF's blocks in a row, else the numbers in
        the tensor's shape."""
        count = (self.stop - self.start) // self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(mapped, dtype=self.dtype, count=count, offset=self.start)
        blocks = self.encoding is not None and self.dtype == torch.uint8
        return flat if blocks else flat.view(self.shape)


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


def _shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
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


def weight_files(source: Path) -> list[Path]:
    """The files that hold a model's weights: a file itself; of a folder the published names, an
    index and its shards, or the only file of a kind that is read.

    Raises:
        ModelError: none, only pickles (which have to be named), or several of which none is
            published under that name.
    """
    if source.is_file():
        return [source]
    for name in WEIGHT_NAMES:
        for variant in ("", ".fp16", ".bf16"):
            for file in (f"{name}.safetensors.index{variant}.json", f"{name}{variant}.safetensors"):
                if (source / file).is_file():
                    return [source / file]
    several = weights_of(source)
    if len(several) > 1:
        raise ModelError(
            f"{source} holds {len(several)} files of weights"
            f" ({shorten(', '.join(p.name for p in several[:3]))}, ...) and no index; name the"
            f" one to"
            f" read: {several[0]}."
        )
    if several:
        return several
    pickled = sorted(p.name for e in PICKLES for p in source.glob(f"*{e}"))
    if pickled:
        raise ModelError(
            f"{source} holds only pickled weights ({', '.join(pickled[:3])}), which can run code"
            " when read; name the file, which is then read without running it, or convert the"
            " checkpoint first (`nexus-rt convert`).",
            code="unsafe",
        )
    raise ModelError(
        f"{source} holds no weights: expected {WEIGHT_NAMES[0]}.safetensors or its index of"
        " shards.",
        code="missing" if source.exists() else "not_found",
    )


def find_tensors(source: Path) -> dict[str, StoredTensor]:
    """Every weight of a model's file or folder, 8-bit ones with their scales.

    Raises:
        ModelError: no weights here (pickles are named), a shard is missing, a tensor is there
            twice, or a quantisation that is not read; names it.
    """
    file = weight_files(source)[0]
    if file.suffix == ".gguf":
        return _unwrapped(
            {
                name: StoredTensor(file, t.start, t.stop, t.dtype, t.shape, t.encoding)
                for name, t in gguf_file.read(file).items()
            }
        )
    files = [] if file.suffix in PICKLES else [file]
    if file.name.endswith(".json"):
        tensors = _shards(source, file)
        files = sorted({t.path for t in tensors.values()})
    else:
        tensors = read_header(file, integers=True) if files else _pickled(file)
    headers = [Header(str(f), read_metadata(f)) for f in files]
    return scales.pair(_unwrapped(tensors), [*headers, *_config(source)], _small)


def _config(source: Path) -> list[Header]:
    """The config of a folder, or beside a file where it is a Wan transformer's, which a loader
    reads too."""
    path = source / "config.json" if source.is_dir() else source.with_name("config.json")
    config = documents.read_object(path) if path.is_file() else {}
    if not source.is_dir() and config.get("_class_name") not in WAN_CLASSES:
        return []
    return [Header(str(path), config=config)]


def fitted(
    tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """Tensors of GGUF files in a model's shapes where only sizes of 1 differ, which converters
    that go through ggml drop or add; all else as it is."""
    out = dict(tensors)
    ones = lambda sides: [n for n in sides if n != 1]
    for name, stored in tensors.items():
        shape = tuple(shapes.get(name, stored.shape))
        if stored.path.suffix == ".gguf" and ones(shape) == ones(stored.shape):
            out[name] = replace(stored, shape=shape)
    return out


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have (too long, NUL) is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _unwrapped(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint without the attributes of wrappers in its names, and without the counters of
    training runs."""
    counters = [k for k, t in tensors.items() if names.is_counter(k, t.shape)]
    if counters:
        path = tensors[counters[0]].path
        warnings.warn(
            f"{path}: left out {names.some(counters)}: counters of a training run, which no model"
            " computes with.",
            stacklevel=3,
        )
    weights = {k: t for k, t in tensors.items() if k not in counters}
    return renamed(weights, names.plain_name)


def renamed(
    tensors: Mapping[str, StoredTensor], name: Callable[[str], str]
) -> dict[str, StoredTensor]:
    """A checkpoint under a model's own names.

    Raises:
        ModelError: two keys are one parameter (as `x` and `model.x` are).
    """
    out: dict[str, StoredTensor] = {}
    keys: dict[str, str] = {}
    for key, stored in tensors.items():
        if (new := name(key)) in out:
            raise ModelError(
                f"{stored.path}: {shorten(keys[new], 120)} and {shorten(key, 120)} are one"
                f" parameter,"
                " stored twice; save the checkpoint again with one of them.",
                code="duplicate",
            )
        out[new], keys[new] = stored, key
    return out


def _small(stored: StoredTensor) -> Tensor:
    """A scale or a note of a few bytes."""
    ((_, tensor),) = read_tensors([("", stored)])
    return tensor.clone()


def _pickled(file: Path) -> dict[str, StoredTensor]:
    """A pickle's tensors, read without running it."""
    state = pickles.read_state(file, "model", "module", "state_dict", "model_state_dict")
    warnings.warn(
        f"{file} is a pickle, which is read without running it; `nexus-rt convert wan {file} DIR`"
        " makes safetensors, which are loaded sooner and in less memory.",
        stacklevel=2,
    )
    return {
        name: StoredTensor(file, 0, t.nbytes, t.dtype, tuple(t.shape), None, t)
        for name, t in state.items()
    }


def read_tensors(
    tensors: Iterable[tuple[str, StoredTensor]], encoded: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in file order; each tensor may be a view of the mapped file, valid until
    the next is asked for.

    encoded: what an encoding is of comes as it is stored, else as float32.
    """
    ordered = sorted(tensors, key=lambda item: (item[1].path, item[1].start))
    path, mapped = None, None
    for name, stored in ordered:
        if stored.value is not None:
            yield name, stored.value if encoded else stored.decoded(stored.value)
            continue
        if stored.path != path or mapped is None:
            path = stored.path
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        raw = stored.raw(mapped)
        yield name, raw if encoded else stored.decoded(raw)
        del raw
        if hasattr(mapped, "madvise"):
            first = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
            if stored.stop > first:
                mapped.madvise(mmap.MADV_DONTNEED, first, stored.stop - first)
