"""Writing converted checkpoints: safetensors in shards, and the account of what became of every
key."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.core.paths import failed_file

SHARD_BYTES = 2 * 10**9


@dataclass
class Report:
    """What became of every key, by source file."""

    used: dict[str, int] = field(default_factory=dict)
    overridden: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    # source -> what was absent, or which form it had
    notes: dict[str, str] = field(default_factory=dict)

    def add(
        self, source: str, used: int, overridden: Iterable[str] = (), unused: Iterable[str] = ()
    ) -> None:
        self.used[source] = used
        for kept, names in ((self.overridden, overridden), (self.unused, unused)):
            if listed := sorted(names):
                kept[source] = listed

    def __str__(self) -> str:
        lines = []
        for source, count in self.used.items():
            over, left = self.overridden.get(source, []), self.unused.get(source, [])
            extra = [f"{len(over)} overridden by the whole model's"] if over else []
            extra += (
                [f"{len(left)} unused ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})"]
                if left
                else []
            )
            lines.append(f"{source}: {count} used" + "".join(f", {e}" for e in extra))
        lines += [f"{source}: {note}" for source, note in self.notes.items()]
        return "\n".join(lines)


def write_shards(
    folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES
) -> None:
    """Write tensors as safetensors, in files of at most about `limit` bytes with an index where
    there are several."""
    from safetensors import SafetensorError
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


def check_shapes(
    source: Path, got: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    """Raise unless every wanted tensor is there with its shape."""
    lost = sorted(wanted.keys() - got.keys())
    if lost:
        absent = "" if source.exists() else " is missing, and what is there"
        raise ModelError(
            f"{source}{absent} lacks {len(lost)} tensors ({', '.join(lost[:3])}); get the published"
            " files again.",
            code="missing" if source.exists() else "not_found",
        )
    for name, shape in wanted.items():
        if got[name] != tuple(shape):
            raise ModelError(
                f"{source}: {name} has shape {got[name]}; expected {tuple(shape)}.", code="mismatch"
            )


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
