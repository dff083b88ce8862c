"""Reading safetensors into a model: memory-mapped, sharded or not, never holding the weights twice.

A tensor is copied from the mapped file straight into its place in the model (a slice of a fused
parameter), then its pages are given back, so that resident memory stays at the model's own bytes
plus one tensor.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nexus_rt import documents
from nexus_rt.documents import parse
from nexus_rt.errors import ModelError, cut
from nexus_rt.models.wan import FUSED, KEEP_FP32

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
WEIGHT_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    path: Path
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins."""
    if not path.is_file():
        raise ModelError(f"{path} is missing; download the folder again.")
    try:
        # the library's own validation: offsets, overlaps, shapes against bytes, length
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({cut(error)}); it is truncated, corrupted or"
            " of another format: download or convert it again."
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
    """The tensors of a safetensors file.

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
                f"{path}: {cut(name, 120)} has type {entry['dtype']}; expected one of"
                f" {', '.join(known)}."
            )
        start, stop = entry["data_offsets"]
        tensors[name] = StoredTensor(
            path, begin + start, begin + stop, known[entry["dtype"]], tuple(entry["shape"])
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
        raise ModelError(f"{index} names no tensor; {remedy}.")
    if outside := [s for s in where.values() if not re.fullmatch(r"[^/\\\0]+\.safetensors", s)]:
        raise ModelError(
            f"{index} names {cut(outside[0], 120)!r}; expected names of safetensors files in its"
            " folder."
        )
    shards = sorted(set(where.values()))
    if lost := [s for s in shards if not (folder / s).is_file()]:
        raise ModelError(
            f"{folder}: {index.name} names {len(shards)} shards, but {cut(', '.join(lost))} is"
            " missing."
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, stored in read_header(folder / shard).items():
            if name in tensors:
                raise ModelError(
                    f"{folder}: {cut(name, 120)} is in {tensors[name].path.name} and in {shard};"
                    f" {remedy}."
                )
            tensors[name] = stored
    for name, shard in where.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise ModelError(
                f"{folder}: {shard} lacks {cut(name, 120)}, which {index.name} says it holds;"
                f" {remedy}."
            )
    return tensors


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder: one file, or the shards an index names.

    Raises:
        ModelError: no safetensors here (pickles are named), a shard is missing, or a tensor is
            there twice.
    """
    for name in WEIGHT_NAMES:
        for variant in ("", ".fp16", ".bf16"):
            index = folder / f"{name}.safetensors.index{variant}.json"
            if index.is_file():
                return _shards(folder, index)
            single = folder / f"{name}{variant}.safetensors"
            if single.is_file():
                return read_header(single)
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code"
            " when read; this runtime loads safetensors: convert the checkpoint first."
        )
    raise ModelError(
        f"{folder} holds no weights: expected {WEIGHT_NAMES[0]}.safetensors or its index of shards."
    )


def read_tensors(tensors: Iterable[tuple[str, StoredTensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in file order; each tensor is a view of the mapped file, valid until the
    next is asked for."""
    ordered = sorted(tensors, key=lambda item: (item[1].path, item[1].start))
    path, mapped = None, None
    for name, stored in ordered:
        if stored.path != path:
            path = stored.path
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = (stored.stop - stored.start) // stored.dtype.itemsize
        if count:
            yield (
                name,
                torch.frombuffer(mapped, dtype=stored.dtype, count=count, offset=stored.start).view(
                    stored.shape
                ),
            )
        else:
            yield name, torch.empty(stored.shape, dtype=stored.dtype)
        if mapped is not None and hasattr(mapped, "madvise"):
            first = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
            if stored.stop > first:
                mapped.madvise(mmap.MADV_DONTNEED, first, stored.stop - first)


ORIGINAL_NAMES = [  # Wan's own names -> diffusers', as diffusers' conversion script maps them
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (
        r"\.norm3\.",
        ".norm2.",
    ),  # Wan counts its norms 1, 3, 2: the affine one before cross-attention is its third
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
]


def diffusers_name(name: str) -> str:
    """A parameter's name in diffusers' layout, given either layout's (with or without a `model.`
    prefix)."""
    name = re.sub(r"^(model\.diffusion_model\.|model\.|transformer\.)", "", name)
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def fused_place(name: str, shape: Callable[[str], tuple[int, ...]]) -> tuple[str, slice | None]:
    """Where diffusers' parameter `name` lies in our model: our name, and its rows there (None: all
    of them)."""
    for ours, theirs in FUSED.items():
        for i, part in enumerate(theirs):
            if f".{part}." in name:
                target = name.replace(part, ours)
                rows = shape(target)[0] // len(theirs)
                return target, slice(i * rows, (i + 1) * rows)
    return name, None


def diffusers_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes our parameters have in a diffusers checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        for ours, theirs in FUSED.items():
            if f".{ours}." in name:
                rows = parameter.shape[0] // len(theirs)
                shapes.update(
                    {name.replace(ours, part): (rows, *parameter.shape[1:]) for part in theirs}
                )
                break
        else:
            shapes[name] = tuple(parameter.shape)
    return shapes


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in diffusers' names: the fused projections split (views, not copies)."""
    out = {}
    for name, tensor in state.items():
        for ours, theirs in FUSED.items():
            if f".{ours}." in name:
                out.update(
                    {
                        name.replace(ours, p): t
                        for p, t in zip(theirs, tensor.chunk(len(theirs)), strict=True)
                    }
                )
                break
        else:
            out[name] = tensor
    return out


def in_diffusers_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint of either layout under diffusers' names.

    Raises:
        ModelError: two keys are one parameter (as `x` and `model.x` are).
    """
    renamed: dict[str, StoredTensor] = {}
    keys: dict[str, str] = {}
    for key, stored in tensors.items():
        name = diffusers_name(key)
        if name in renamed:
            raise ModelError(
                f"{stored.path}: {cut(keys[name], 120)} and {cut(key, 120)} are one parameter,"
                " stored twice; save the checkpoint again with one of them."
            )
        renamed[name], keys[name] = stored, key
    return renamed


def fill(
    model: nn.Module,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    changes: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Give a meta-device Wan model its memory and copy a checkpoint of either layout into it.

    Args:
        changes: diffusers' name of a parameter and the stored tensor to what goes into the model
            instead; rounded to `dtype` once, after it.

    Raises:
        ModelError: a parameter is missing, unknown, there twice, or of another shape.
    """
    expected = diffusers_shapes(model)
    stored = in_diffusers_names(tensors)
    # some published files carry this unused one
    stored = {k: v for k, v in stored.items() if "norm_added_q" not in k}
    missing, unknown = (
        sorted(expected.keys() - stored.keys()),
        sorted(stored.keys() - expected.keys()),
    )
    if missing or unknown:
        some = lambda names: (
            f"{len(names)} ({cut(', '.join(names[:3]))}{', ...' if len(names) > 3 else ''})"
        )
        raise ModelError(
            f"{next(iter(tensors.values())).path.parent if tensors else 'the file'}: the checkpoint"
            f" is not this architecture: missing {some(missing)}, unknown {some(unknown)}; check"
            " config.json against the weights."
        )
    for name, shape in expected.items():
        got = stored[name].shape
        if got != shape:
            raise ModelError(
                f"{stored[name].path}: {name} has shape {got}; config.json asks for {shape}."
            )
    for name, parameter in list(model.named_parameters()):
        keep = torch.float32 if any(part in name for part in KEEP_FP32) else dtype
        owner, leaf = name.rpartition(".")[::2]
        place = nn.Parameter(
            torch.empty(parameter.shape, dtype=keep, device=device), requires_grad=False
        )
        setattr(model.get_submodule(owner), leaf, place)
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_tensors(stored.items()):
            target, rows = fused_place(name, lambda n: tuple(places[n].shape))
            part: Tensor = places[target] if rows is None else places[target][rows]
            part.copy_(tensor if changes is None else changes(name, tensor.to(device)))


def compare(stored: Mapping[str, StoredTensor], module: nn.Module, where: Path, what: str) -> None:
    """Raise unless a checkpoint's names and shapes are exactly a module's (which may be on the meta
    device).

    Raises:
        ModelError: names the first that are missing, unknown or of another shape.
    """
    expected = module.state_dict()
    missing, unknown = (
        sorted(expected.keys() - stored.keys()),
        sorted(stored.keys() - expected.keys()),
    )
    if missing or unknown:
        some = lambda names: cut(", ".join(names[:3])) or "none"
        raise ModelError(
            f"{where}: the weights are not this {what}'s: {len(missing)} missing ({some(missing)}),"
            f" {len(unknown)} unknown ({some(unknown)}); check config.json against the weights, or"
            " download the folder again."
        )
    for name, place in expected.items():
        if stored[name].shape != tuple(place.shape):
            raise ModelError(
                f"{where}: {name} has shape {stored[name].shape}; config.json asks for"
                f" {tuple(place.shape)}."
            )


def fill_exactly(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    keep_fp32: tuple[str, ...] = (),
) -> None:
    """Give a meta-device module that the tensors fit exactly its memory; each goes from the mapped
    file to its place.

    Args:
        keep_fp32: parts of names of tensors that stay in float32.
    """
    for name, tensor in read_tensors(stored.items()):
        owner, leaf = name.rpartition(".")[::2]
        kept = torch.float32 if any(part in name for part in keep_fp32) else dtype
        value = torch.empty(tensor.shape, dtype=kept, device=device)
        value.copy_(tensor)
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            setattr(place, leaf, nn.Parameter(value, requires_grad=False))
        else:
            place._buffers[leaf] = value
