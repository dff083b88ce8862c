"""Pickled tensors without running what a pickle may hold: `torch.save` zips, its old format, and
plain pickles.

A checkpoint of tensors, text and numbers is read by `torch.load(weights_only=True)`; zips are
mapped, so that a tensor is on disk until it is used. What torch's reader cannot do is done here
(test_pickles.py shows each):

- It reads a damaged, short or compressed record of a mapped zip as other numbers. The checksums and
  lengths of records are compared first.
- It makes tensors that are larger than their storage, of which a copy fills the memory. Every
  tensor is compared with its storage.
- Keys of nested tuples cost it 2^depth steps or the process (the C stack overflows). A pickle of
  other instructions than a tree of tensors needs (`is_plain_state`) is never given to it.
- It reads no plain pickles, no protocols 3 to 5, no arrays or scalars of numpy and no frozen sets;
  and its errors advise to run the file. `nexus_rt.loading.formats.unpickling` reads these, and
  says what is wrong.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.storage import TypedStorage, UntypedStorage

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.formats.unpickling import (
    MAX_DEPTH,
    UNTYPED,
    Function,
    PendingArray,
    Refused,
    StorageKind,
    Unpickler,
    as_bytes,
    is_plain_state,
)
from nexus_rt.loading.names import plain_name

MAGIC = 0x1950A86A20F9469CFC6C  # torch.save's old format begins with it
MAX_RECORDS, PIECE = 200_000, 1 << 24
MAX_RATIO = 100  # of unpacked to packed bytes, above 16 MiB: weights do not shrink so
FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error),
    *(zipfile.BadZipFile, zlib.error, Warning),
)


def read_pickle(path: Path) -> Any:
    """Tensors, arrays and containers of a file written by `torch.save` or by plain `pickle`;
    nothing in it is run.

    Tensors of a `torch.save` zip stay on disk until they are used.

    Raises:
        ModelError: missing, damaged, or it asks for anything but tensors and containers.
    """
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; expected the folder as it was published.", code="not_found"
        )
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            storages = _Storages(len(data))
            if data[:4] == b"PK\x03\x04":
                value = _read_zip(path, data, storages)
            else:
                value = _read_stream(data, storages)
            _check(value, storages)
            return value
    except FAILURES as error:
        reason = shorten(error).rstrip(".") or type(error).__name__
        raise ModelError(
            f"{path} is refused: {reason}. Only tensors and containers are read; get the file from"
            " the publisher again.",
            code=getattr(error, "code", "damaged"),
        ) from error


class _Storages:
    """Address and bytes of the storages that were made of a file, all on the CPU; `room` is how
    many bytes more they may have."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.made: list[tuple[int, int]] = []

    def place(self, storage: Any, location: str = "cpu") -> Any:
        """`torch.load`'s `map_location`."""
        self.made.append((storage.data_ptr(), storage.nbytes()))
        self.room -= storage.nbytes()
        if self.room < 0:
            raise Refused("its storages are larger than the file")
        return storage


def _read_stream(file: Any, storages: _Storages) -> Any:
    """A plain pickle, or torch.save's old format."""
    first = _Plain(file, storages).load()
    return _read_old(file, storages) if type(first) is int and first == MAGIC else first


class _Plain(Unpickler):
    """A plain pickle, in which a storage is the bytes of a `torch.save` of it."""

    def __init__(self, file: IO[bytes], storages: _Storages) -> None:
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return Function(lambda data: _read_old(io.BytesIO(as_bytes(data)), self.storages))
        return super().find_class(module, name)


class _Instructions:
    """Our unpickler as torch.load's `pickle_module`."""

    Unpickler = Unpickler

    @staticmethod
    def load(file: IO[bytes], **options: Any) -> Any:
        return Unpickler(file).load()


def _read_old(file: Any, storages: _Storages) -> Any:
    """torch.save's old format: five pickles (a number, a version, the machine, the value, its
    storages' keys) and the storages' bytes.

    A file without a descriptor: torch would unpack one that is a tar archive.
    """
    file.seek(0)
    if Unpickler(file).load() != MAGIC:
        raise Refused("a storage's bytes are none that torch.save writes")
    made, room = list(storages.made), storages.room
    if all(is_plain_state(file) for _ in range(4)):
        file.seek(0)
        with contextlib.suppress(*FAILURES):
            return torch.load(file, map_location=storages.place, weights_only=True)
        storages.made, storages.room = made, room
    file.seek(0)
    return torch.load(
        file, map_location=storages.place, pickle_module=_Instructions, weights_only=False
    )


def _records(archive: zipfile.ZipFile, room: int) -> dict[str, zipfile.ZipInfo]:
    """The records of a `torch.save` zip by name, each with its checksum compared."""
    infos = archive.infolist()
    records = {info.filename.split("/", 1)[-1]: info for info in infos}
    if len(records) > MAX_RECORDS or sum(info.compress_size for info in infos) > room:
        raise Refused("its records are too many or larger than the file", "too_large")
    if len({info.filename.split("/", 1)[0] for info in infos}) != 1:
        raise Refused("it is no archive that torch.save writes")
    if len(records) < len(infos):
        raise Refused("it holds a record twice", "duplicate")
    if lost := {"data.pkl"} - records.keys():
        raise Refused(f"it lacks its record {lost.pop()}", "missing")
    for name, info in records.items():
        if info.flag_bits & 1:
            raise Refused("it is encrypted", "unsupported")
        if info.file_size > max(PIECE, MAX_RATIO * info.compress_size):
            raise Refused(
                f"its record {name[:80]} would unpack to {info.file_size} bytes", "too_large"
            )
        info.CRC = info.CRC or None  # type: ignore[assignment]  # written without: not compared
    if damaged := archive.testzip():
        raise Refused(f"its record {damaged[:80]} is damaged: its checksum or header differs")
    return records


def _read_zip(path: Path, data: mmap.mmap, storages: _Storages) -> Any:
    with zipfile.ZipFile(path) as archive:
        records = _records(archive, len(data))
        pickled = archive.read(records["data.pkl"])
        order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
        if order not in (b"little", b"big"):
            raise Refused("its byte order is neither little nor big", "unsupported")
        held = [info for name, info in records.items() if name.startswith("data/")]
        storages.room = room = sum(info.file_size for info in held)
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in held)
        if order == b"little" and is_plain_state(io.BytesIO(pickled)):
            with contextlib.suppress(*FAILURES):
                place = storages.place
                value = torch.load(path, map_location=place, weights_only=True, mmap=stored)
                if _are_records(storages, held, stored):
                    return value
        storages.made, storages.room = [], room
        mapped, made = UntypedStorage.from_file(str(path), False, len(data)), {}

        def storage(identity: tuple) -> TypedStorage:
            """Of ("storage", class, key, location, count)."""
            kind, key, count = identity[1], f"data/{identity[2]}"[:80], identity[4]
            if not isinstance(kind, StorageKind):
                raise Refused("a storage is of no type that torch has")
            if (info := records.get(key)) is None:
                raise Refused(f"it lacks its record {key}", "missing")
            if info.file_size != (size := count * kind.dtype.itemsize):
                raise Refused(f"its record {key} has {info.file_size} bytes; expected {size}")
            if key not in made:
                if info.compress_type == zipfile.ZIP_STORED:
                    at = info.header_offset + 30  # the names' lengths end the header
                    at += sum(struct.unpack("<HH", data[at - 4 : at]))
                    content = mapped[at : at + size]
                else:
                    unpacked = bytearray(archive.read(info))
                    content = torch.frombuffer(unpacked, dtype=torch.uint8).untyped_storage()
                if order == b"big" and kind is UNTYPED:
                    raise Refused("an untyped storage is of the other byte order", "unsupported")
                if order == b"big":
                    content.byteswap(kind.dtype)
                wrapped = storages.place(content)
                made[key] = TypedStorage(wrap_storage=wrapped, dtype=kind.dtype, _internal=True)
            return made[key]

        reader = Unpickler(io.BytesIO(pickled))
        reader.persistent_load = storage
        return reader.load()


def _are_records(storages: _Storages, held: list[zipfile.ZipInfo], mapped: bool) -> bool:
    """Whether the storages that torch made are the records, one by one in the file's order: it
    takes as many bytes as the pickle names, from wherever the record begins."""
    made = [size for _, size in sorted(storages.made) if size]
    sizes = [i.file_size for i in sorted(held, key=lambda i: i.header_offset) if i.file_size]
    return made == sizes if mapped else sorted(made) == sorted(sizes)


def _check(value: Any, storages: _Storages) -> None:
    """Raise where a tensor is larger than its storage, or containers are nested deeper than any
    code of ours walks or hold themselves."""
    made, layer = set(storages.made), {id(value): value}
    seen: set[int] = set()
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for item in layer.values():
            if isinstance(item, Tensor):
                own = item.untyped_storage()
                inside = (own.data_ptr(), own.nbytes()) in made and item.nbytes <= own.nbytes()
                if item.numel() and not inside:
                    raise Refused(f"a tensor of shape {list(item.shape)} exceeds its storage")
                item.requires_grad_(False)
            elif isinstance(item, PendingArray):
                raise Refused("an array has no state")
            elif isinstance(item, (list, tuple)):
                inner += item
            elif isinstance(item, dict):
                inner += item.values()
        seen |= layer.keys()
        layer = {id(item): item for item in inner if id(item) not in seen}
        if not layer:
            return
    raise Refused(f"its containers are nested more than {MAX_DEPTH} deep", "too_large")


def read_state(path: Path, *wrappers: str) -> dict[str, Tensor]:
    """A pickled state dict: out of the first of `wrappers` that is there, under plain names
    (`nexus_rt.loading.names`).

    Raises:
        ModelError: as `read_pickle`, or it is no dictionary of tensors.
    """
    state = read_pickle(path)
    for key in wrappers:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    named = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not named or not state:
        raise ModelError(
            f"{path} is no state dict: expected names and"
            f" tensors{' under ' + wrappers[0] if wrappers else ''}."
        )
    tensors = {plain_name(k): v for k, v in state.items()}
    if len(tensors) < len(state):
        raise ModelError(
            f"{path} holds a tensor twice, with and without a wrapper's name such as 'module.'; get"
            " the file from the publisher again.",
            code="duplicate",
        )
    return tensors
