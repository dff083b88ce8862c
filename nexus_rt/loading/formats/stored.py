"""Where a tensor lies in a file, whichever its format, and reading it from there.

Tensors come from the mapped file one at a time, and their pages are given back, so that a
checkpoint is never in memory twice.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nexus_rt.models.encodings import Encoding

MAX_SIDE = 2**48  # elements of a side, which a tensor without any elements may state freely


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


def read_tensor(stored: StoredTensor) -> Tensor:
    """One small tensor, a copy that stays valid."""
    ((_, tensor),) = read_tensors([("", stored)])
    return tensor.clone()
