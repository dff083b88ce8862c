"""Pickled tensors without running what a pickle may hold: `torch.save` zips, its old format, and
plain pickles.

For the converter only. The instructions are walked by `nexus_rt.loading.formats.unpickling`;
storages are taken from the file by checked lengths, zips record by record with their checksums, so
that a damaged file is refused and never read as other numbers.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.formats.pickle_values import Name, Storage, refuse, whole
from nexus_rt.loading.formats.unpickling import MOST_NESTED, STORAGES, Interpreter
from nexus_rt.loading.names import plain_name

MAGIC = 0x1950A86A20F9469CFC6C  # torch.save's old format begins with it
MOST_RECORDS, PIECE = 200_000, 1 << 24
MOST_RATIO = 100  # of unpacked to packed bytes, above 16 MiB: weights do not shrink so


def read_pickle(path: Path) -> Any:
    """Tensors, arrays and containers of a file written by `torch.save` or by plain `pickle`;
    nothing in it is run.

    Tensors of a `torch.save` file stay on disk until they are used.

    Raises:
        ModelError: missing, damaged, or it asks for anything but tensors and containers.
    """
    if not path.is_file():
        raise ModelError(
            f"{path} is missing; expected the folder as it was published.", code="not_found"
        )
    try:
        with path.open("rb") as file:
            if not (size := file.seek(0, io.SEEK_END)):
                raise refuse("it is empty")
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        return _read(memoryview(mapped), 0)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        NotImplementedError,
        OverflowError,
        MemoryError,
        KeyError,
        TypeError,
        struct.error,
    ) as error:
        reason = shorten(error).rstrip(".") or type(error).__name__
        raise ModelError(
            f"{path} is refused: {reason}. Only tensors and containers are read; get the file from"
            " the publisher again.",
            code=getattr(error, "code", "damaged"),
        ) from error


def _read(data: memoryview, depth: int) -> Any:
    """A file's value, whichever of the three formats it has."""
    if depth > MOST_NESTED:
        raise refuse("storages are nested in storages", "too_large")
    if bytes(data[:4]) == b"PK\x03\x04":
        return _read_zip(data)
    load_bytes = lambda inner: _read(memoryview(bytearray(inner)), depth + 1)
    file: io.BytesIO | _Mapped = io.BytesIO(data) if len(data) < PIECE else _Mapped(data)
    first = Interpreter(load_bytes=load_bytes).run(file)
    return _read_old(file, data) if isinstance(first, int) and first == MAGIC else first


class _Mapped(io.RawIOBase):
    """A file over mapped memory, without a copy of it."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.place = data, 0

    def read(self, count: int = -1) -> bytes:
        end = len(self.data) if count < 0 else min(len(self.data), self.place + count)
        piece = bytes(self.data[self.place : end])
        self.place = end
        return piece

    def readline(self, limit: int | None = -1) -> bytes:
        window = bytes(self.data[self.place : self.place + 65536])
        line = window[: window.find(b"\n") + 1] if b"\n" in window else window
        self.place += len(line)
        return line

    def tell(self) -> int:
        return self.place

    def seek(self, place: int, whence: int = 0) -> int:
        self.place = (
            place if whence == 0 else self.place + place if whence == 1 else len(self.data) + place
        )
        return self.place


def _storage_type(name: Any) -> torch.dtype | None:
    """Of a persistent id's class; None: untyped."""
    if isinstance(name, Name) and name.name in ("UntypedStorage", "TypedStorage"):
        return None
    if not isinstance(name, Name) or name.name not in STORAGES:
        raise refuse("a storage is of no type that torch has")
    return STORAGES[name.name]


def _identity(value: Any, lengths: tuple[int, ...]) -> tuple[torch.dtype | None, str, int]:
    """Type, key and count of elements of a persistent id ("storage", class, key, location, count[,
    view])."""
    if (
        not isinstance(value, tuple)
        or len(value) not in lengths
        or value[0] != "storage"
        or not isinstance(value[2], str)
    ):
        raise refuse("it refers to something that is no storage")
    if len(value) == 6 and value[5] is not None:
        raise refuse("a storage is a view of another, as torch wrote them long ago", "unsupported")
    return _storage_type(value[1]), value[2], whole(value[4], "a storage's length")


def _swapped(data: memoryview, dtype: torch.dtype | None, big: bool) -> memoryview:
    """Bytes in this machine's order."""
    if big == (sys.byteorder == "big"):
        return data
    if dtype is None:
        raise refuse("an untyped storage is of the other byte order", "unsupported")
    size = dtype.itemsize // (2 if dtype.is_complex else 1)
    turned = bytearray(data)
    if size > 1:
        view = memoryview(turned)
        for i in range(size // 2):
            view[i::size], view[size - 1 - i :: size] = (
                bytes(view[size - 1 - i :: size]),
                bytes(view[i::size]),
            )
    return memoryview(turned)


class _Zip:
    """The records of a `torch.save` zip, each with its checksum compared."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.zip = zipfile.ZipFile(_Mapped(data))  # type: ignore[arg-type]
        self.records: dict[str, zipfile.ZipInfo] = {}
        infos = self.zip.infolist()
        if len(infos) > MOST_RECORDS:
            raise refuse(f"it has {len(infos)} records", "too_large")
        roots = {info.filename.split("/", 1)[0] for info in infos}
        if len(roots) != 1:
            raise refuse("it is no archive that torch.save writes")
        for info in infos:
            name = info.filename.split("/", 1)[-1]
            if name in self.records:
                raise refuse(f"it holds {name[:80]} twice", "duplicate")
            if info.flag_bits & 1:
                raise refuse("it is encrypted", "unsupported")
            self.records[name] = info

    def read(self, name: str, most: int) -> memoryview:
        """A record's bytes: of the mapped file where they are stored as they are, else unpacked, no
        more than declared."""
        info = self.records.get(name)
        if info is None:
            raise refuse(f"it lacks its record {name[:80]}", "missing")
        if info.file_size > most:
            raise refuse(
                f"its record {name[:80]} has {info.file_size} bytes; expected at most {most}"
            )
        if info.compress_type != zipfile.ZIP_STORED:
            if info.file_size > max(PIECE, MOST_RATIO * info.compress_size):
                raise refuse(
                    f"its record {name[:80]} would unpack to {info.file_size} bytes", "too_large"
                )
            with self.zip.open(info) as packed:  # the library compares the checksum
                content = packed.read(info.file_size + 1)
            if len(content) != info.file_size:
                raise refuse(f"its record {name[:80]} is not as long as it says")
            return memoryview(bytearray(content))
        header = self.data[info.header_offset : info.header_offset + 30]
        if len(header) < 30 or bytes(header[:4]) != b"PK\x03\x04":
            raise refuse(f"its record {name[:80]} is not where it should be")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        piece = self.data[begin : begin + info.file_size]
        if len(piece) != info.file_size or info.compress_size != info.file_size:
            raise refuse(f"its record {name[:80]} is cut short")
        # 0: written without (torch.serialization.set_crc32_options)
        if info.CRC and self._checksum(piece) != info.CRC:
            raise refuse(f"its record {name[:80]} is damaged: its checksum differs")
        return piece

    @staticmethod
    def _checksum(piece: memoryview) -> int:
        checksum = 0
        for start in range(0, len(piece), PIECE):
            checksum = zlib.crc32(piece[start : start + PIECE], checksum)
        return checksum


def _read_zip(data: memoryview) -> Any:
    archive = _Zip(data)
    if "data.pkl" not in archive.records:
        raise refuse("it is a zip without data.pkl, none that torch.save writes", "missing")
    order = (
        bytes(archive.read("byteorder", 16)).strip()
        if "byteorder" in archive.records
        else b"little"
    )
    if order not in (b"little", b"big"):
        raise refuse("its byte order is neither little nor big", "unsupported")
    known: dict[str, Storage] = {}

    def persistent(value: Any) -> Storage:
        dtype, key, count = _identity(value, (5,))
        if key not in known:
            length = count * (dtype.itemsize if dtype else 1)
            piece = archive.read(f"data/{key}", length)
            if len(piece) != length:
                raise refuse(f"storage {key[:40]} has {len(piece)} bytes; expected {length}")
            known[key] = Storage(_swapped(piece, dtype, order == b"big"), dtype)
        if known[key].dtype != dtype:
            raise refuse(f"storage {key[:40]} is of two types")
        return known[key]

    return Interpreter(persistent).run(io.BytesIO(archive.read("data.pkl", 1 << 30)))


def _read_old(file: Any, data: memoryview) -> Any:
    """The rest of torch.save's old format: version, machine, the value, its storages' keys, their
    bytes."""
    plain = Interpreter()
    version, machine = plain.run(file), plain.run(file)
    if version != 1001 or not isinstance(machine, dict):
        raise refuse("it is of a version of torch.save that is not known", "unsupported")
    big = machine.get("little_endian") is False
    place = file.tell()
    wanted: dict[str, tuple[torch.dtype | None, int]] = {}

    def collect(value: Any) -> Storage:
        dtype, key, count = _identity(value, (5, 6))
        if wanted.setdefault(key, (dtype, count)) != (dtype, count):
            raise refuse(f"storage {key[:40]} is of two kinds")
        room = count * (dtype.itemsize if dtype else 1)
        if room > len(data):
            raise refuse(f"storage {key[:40]} has {room} bytes and the file {len(data)}")
        # a stand-in of its length
        return Storage(memoryview(bytearray(room)) if not room else data[:room], dtype)

    Interpreter(collect).run(file)
    keys = plain.run(file)
    if (
        not isinstance(keys, list)
        or set(map(str, keys)) != wanted.keys()
        or len(keys) != len(wanted)
    ):
        raise refuse("its storages are not those it names")
    storages: dict[str, Storage] = {}
    for key in keys:
        dtype, count = wanted[key]
        head = file.read(8)
        if len(head) != 8 or struct.unpack(">q" if big else "<q", head)[0] != count:
            raise refuse(f"storage {key[:40]} is not as long as it says")
        start, room = file.tell(), count * (dtype.itemsize if dtype else 1)
        piece = data[start : start + room]
        if len(piece) != room:
            raise refuse(f"storage {key[:40]} is cut short")
        file.seek(start + room)
        storages[key] = Storage(_swapped(piece, dtype, big), dtype)
    file.seek(place)
    return Interpreter(lambda value: storages[_identity(value, (5, 6))[1]]).run(file)


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
