"""Reading safetensors into a model: memory-mapped, sharded or not, never holding the weights twice.

A tensor is copied from the mapped file straight into its place in the model (a slice of a fused parameter), then its
pages are given back, so that resident memory stays at the model's own bytes plus one tensor.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nexus_rt.errors import ModelError
from nexus_rt.models.wan import FUSED, KEEP_FP32

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
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


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file.

    Raises:
        ModelError: the file is missing, truncated, corrupted, or holds a type this runtime does not read.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing; download the folder again.")
    try:
        with safe_open(path, "pt"):  # the library's own validation: offsets, overlaps, length
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}); it is truncated, corrupted or of another format: "
            "download or convert it again."
        ) from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ModelError(f"{path}: {name} has type {entry['dtype']}; expected one of {', '.join(DTYPES)}.")
        start, stop = entry["data_offsets"]
        tensors[name] = StoredTensor(path, 8 + size + start, 8 + size + stop, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder: one file, or the shards an index names.

    Raises:
        ModelError: no safetensors here (pickles are named), or a shard is missing.
    """
    for name in WEIGHT_NAMES:
        for variant in ("", ".fp16", ".bf16"):
            index = folder / f"{name}.safetensors.index{variant}.json"
            if index.is_file():
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                lost = [s for s in shards if not (folder / s).is_file()]
                if lost:
                    raise ModelError(f"{folder}: {index.name} names {len(shards)} shards, but {', '.join(lost)} is missing.")
                return {k: v for s in shards for k, v in read_header(folder / s).items()}
            single = folder / f"{name}{variant}.safetensors"
            if single.is_file():
                return read_header(single)
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when read; this runtime "
            "loads safetensors: convert the checkpoint first."
        )
    raise ModelError(f"{folder} holds no weights: expected {WEIGHT_NAMES[0]}.safetensors or its index of shards.")


def read_tensors(tensors: Iterable[tuple[str, StoredTensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in file order; each tensor is a view of the mapped file, valid until the next is asked for."""
    ordered = sorted(tensors, key=lambda item: (item[1].path, item[1].start))
    path, mapped = None, None
    for name, stored in ordered:
        if stored.path != path:
            path = stored.path
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = (stored.stop - stored.start) // stored.dtype.itemsize
        if count:
            yield name, torch.frombuffer(mapped, dtype=stored.dtype, count=count, offset=stored.start).view(stored.shape)
        else:
            yield name, torch.empty(stored.shape, dtype=stored.dtype)
        if hasattr(mapped, "madvise"):
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
    (r"\.norm3\.", ".norm2."),  # Wan counts its norms 1, 3, 2: the affine one before cross-attention is its third
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
]


def diffusers_name(name: str) -> str:
    """A parameter's name in diffusers' layout, given either layout's (with or without a `model.` prefix)."""
    name = re.sub(r"^(model\.diffusion_model\.|model\.|transformer\.)", "", name)
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def fused_place(name: str, shape: Callable[[str], tuple[int, ...]]) -> tuple[str, slice | None]:
    """Where diffusers' parameter `name` lies in our model: our name, and its rows there (None: all of them)."""
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
                shapes.update({name.replace(ours, part): (rows, *parameter.shape[1:]) for part in theirs})
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
                out.update({name.replace(ours, p): t for p, t in zip(theirs, tensor.chunk(len(theirs)), strict=True)})
                break
        else:
            out[name] = tensor
    return out


def fill(model: nn.Module, tensors: dict[str, StoredTensor], dtype: torch.dtype, device: torch.device) -> None:
    """Give a meta-device Wan model its memory and copy a checkpoint of either layout into it.

    Raises:
        ModelError: a parameter is missing, unknown, or of another shape.
    """
    expected = diffusers_shapes(model)
    stored = {diffusers_name(k): v for k, v in tensors.items()}
    stored = {k: v for k, v in stored.items() if "norm_added_q" not in k}  # some published files carry this unused one
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unknown:
        some = lambda names: f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"  # noqa: E731
        raise ModelError(
            f"{next(iter(tensors.values())).path.parent}: the checkpoint is not this architecture: "
            f"missing {some(missing)}, unknown {some(unknown)}; check config.json against the weights."
        )
    for name, shape in expected.items():
        got = stored[name].shape
        if got != shape:
            raise ModelError(f"{stored[name].path}: {name} has shape {got}; config.json asks for {shape}.")
    for name, parameter in list(model.named_parameters()):
        keep = torch.float32 if any(part in name for part in KEEP_FP32) else dtype
        owner, leaf = name.rpartition(".")[::2]
        place = nn.Parameter(torch.empty(parameter.shape, dtype=keep, device=device), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, place)
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_tensors(stored.items()):
            target, rows = fused_place(name, lambda n: tuple(places[n].shape))
            (places[target] if rows is None else places[target][rows]).copy_(tensor)
