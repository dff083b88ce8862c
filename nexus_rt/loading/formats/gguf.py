"""GGUF files: which tensors they hold, and how they are stored.

The header is read here and not by the `gguf` package, whose reader goes on for as long as a
damaged length says. Types that `nexus_rt.models.encodings` does not unpack are named and refused.

ggml counts dimensions from the innermost, has four of them, and knows no difference between a size
of 1 at the outer end and none: converters that go through it store a table (1, 6, d) as (6, d), and
a convolution (o, i, t, h, w) as (o * i, t, h, w). Such shapes are whole again here.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.formats.stored import MAX_SIDE, StoredTensor
from nexus_rt.loading.notes import refuse_rotation
from nexus_rt.models.encodings import GGUF_BLOCKS

PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
TYPES = {  # ggml's numbers of its types
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
MOST_TENSORS, MOST_KEYS, MOST_NAME, MOST_DIMENSIONS = 100_000, 100_000, 1024, 8
TABLES = (".modulation", "scale_shift_table")  # Wan's, of three dimensions: (1, rows, d)
SHAPE = "comfy.gguf.orig_shape."  # of tensors that ComfyUI-GGUF's converter reshaped


class _Damaged(Exception):
    """What is wrong with a file."""

    def __init__(self, words: str, code: str = "damaged") -> None:
        super().__init__(words)
        self.code = code


class _Cursor:
    """Numbers and strings of a mapped file in order, never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _Damaged(f"it ends at byte {len(self.data)}, inside its header")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int | float:
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def count(self, most: int, what: str) -> int:
        value = int(self.number("Q"))
        if value > most:
            raise _Damaged(f"it says it has {value} {what}", "too_large")
        return value

    def text(self, most: int | None = None) -> str:
        length = self.count(len(self.data) if most is None else most, "characters in a name")
        return self.take(length).decode("utf-8", "replace")

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise _Damaged(f"it ends at byte {len(self.data)}, inside its header")
        self.at += count

    def value(self, kind: int, depth: int = 0) -> object:
        """A metadata value; of arrays only short ones of numbers are kept, the others are walked
        over: a vocabulary has as many as a file has room for."""
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            if not depth:
                return self.text()
            self.skip(self.count(len(self.data), "characters in a name"))
            return None
        if kind != ARRAY or depth > 2:
            raise _Damaged(f"a metadata value is of type {kind}")
        inner, length = int(self.number("I")), self.count(len(self.data), "elements in an array")
        if inner in SCALARS:
            form = SCALARS[inner]
            if length > MOST_DIMENSIONS:
                self.skip(length * struct.calcsize(form))
                return None
            return struct.unpack(f"<{length}{form}", self.take(length * struct.calcsize(form)))
        for _ in range(length):
            self.value(inner, depth + 1)
        return None


def read(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file by name, shapes as PyTorch counts them (rows first).

    Raises:
        ModelError: damaged, another version, or a type that is not read; names it.
    """
    try:
        with path.open("rb") as file:
            if not (size := path.stat().st_size):
                raise _Damaged("it is empty")
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _read(path, _Cursor(data), size)
    except (_Damaged, OSError, struct.error) as error:
        raise ModelError(
            f"{path} is not a whole GGUF file ({shorten(error)}); download it again.",
            code=getattr(error, "code", "unreadable"),
        ) from error


def _read(path: Path, cursor: _Cursor, size: int) -> dict[str, StoredTensor]:
    if cursor.take(4) != b"GGUF":
        raise _Damaged("it does not begin with GGUF")
    if (version := cursor.number("I")) not in (2, 3):
        raise _Damaged(f"it is of version {version}; versions 2 and 3 are read", "unsupported")
    tensors = cursor.count(MOST_TENSORS, "tensors")
    metadata: dict[str, object] = {}
    for _ in range(cursor.count(MOST_KEYS, "metadata keys")):
        key = cursor.text()
        metadata[key] = cursor.value(int(cursor.number("I")))
    rows = []
    for _ in range(tensors):
        name = cursor.text(MOST_NAME)
        if (n := int(cursor.number("I"))) > MOST_DIMENSIONS:
            raise _Damaged(f"{shorten(name, 80)} has {n} dimensions", "too_large")
        # innermost first there
        shape = tuple(int(cursor.number("Q")) for _ in range(n))[::-1]
        rows.append((name, shape, int(cursor.number("I")), int(cursor.number("Q"))))
    refuse_rotation(metadata, str(path))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise _Damaged(f"its alignment is {shorten(alignment, 40)}")
    begin = -(-cursor.at // alignment) * alignment
    found: dict[str, StoredTensor] = {}
    for name, shape, kind, offset in rows:
        if name in found:
            raise _Damaged(f"{shorten(name, 120)} is there twice", "duplicate")
        if offset % alignment:
            raise _Damaged(f"{shorten(name, 120)} begins at {offset}, no multiple of {alignment}")
        found[name] = _tensor(path, name, shape, kind, begin + offset, size, metadata)
    last, end = "", 0
    for name, stored in sorted(found.items(), key=lambda item: item[1].start):
        if stored.start < stored.stop:
            if stored.start < end:
                raise _Damaged(
                    f"{shorten(name, 120)} and {shorten(last, 120)} lie in the same bytes"
                )
            last, end = name, stored.stop
    stated = {name for name in found if SHAPE + name in metadata}
    return {
        name: stored if name in stated else replace(stored, shape=_whole(name, stored.shape, found))
        for name, stored in found.items()
    }


def _whole(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]
) -> tuple[int, ...]:
    """The shape that a tensor had before ggml.

    A convolution's number of outputs is its bias's; the order of the elements is the same in all
    of these shapes.
    """
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    if name.endswith(TABLES) and len(shape) == 2:
        return (1, *shape)
    if name.endswith(".weight") and (bias := tensors.get(name[:-6] + "bias")):
        rows = math.prod(bias.shape)
        if shape and rows and shape[0] != rows and shape[0] % rows == 0:
            shape = (rows, shape[0] // rows, *shape[1:])
        if name.endswith("patch_embedding.weight") and len(shape) == 4:
            return (*shape[:2], 1, *shape[2:])  # a patch is one frame in every Wan
    return shape


def _tensor(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    start: int,
    size: int,
    metadata: dict[str, object],
) -> StoredTensor:
    known = TYPES.get(kind, f"number {kind}")
    if kind not in PLAIN and known not in GGUF_BLOCKS:
        raise ModelError(
            f"{path}: {shorten(name, 120)} is of GGUF type {known}, which is not read here; get the"
            f" file in one of {', '.join(GGUF_BLOCKS)}, F16 or BF16.",
            code="unsupported",
        )
    if any(n > MAX_SIDE for n in shape):
        raise _Damaged(f"{shorten(name, 120)} is {shape}", "too_large")
    count, final = math.prod(shape), shape
    if SHAPE + name in metadata:
        original = metadata[SHAPE + name]
        sides = original if isinstance(original, tuple) else ()
        if not all(type(n) is int and 0 <= n <= MAX_SIDE for n in sides) or (
            not sides or math.prod(sides) != count
        ):
            words = f"{shorten(name, 120)} is {shape}, and was {shorten(original, 80)}"
            raise _Damaged(words, "mismatch")
        final = sides
    if kind in PLAIN:
        encoding, dtype, length = None, PLAIN[kind], count * PLAIN[kind].itemsize
    else:
        encoding, dtype = GGUF_BLOCKS[known], torch.uint8
        if not shape or shape[-1] % encoding.values:
            words = f"{shorten(name, 120)} is {shape}, rows that {known} cannot hold"
            raise _Damaged(words, "mismatch")
        length = count // encoding.values * encoding.size
    if start + length > size:
        raise _Damaged(f"{shorten(name, 120)} reaches beyond its end")
    return StoredTensor(path, start, start + length, dtype, final, encoding)
