"""The values that a pickle may make, each from plain arguments; nothing of the pickle's own is
called."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

UnpicklingError = pickle.UnpicklingError
MOST_DIMENSIONS = 64
NUMPY = {
    f"{kind}{size}"
    for kind, sizes in {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "b": (1,)}.items()
    for size in sizes
}
PLAIN = (str, bytes, int, float, bool, type(None))


class Refused(UnpicklingError):
    """Why a pickle is refused, with the `code` of the error that it becomes."""

    def __init__(self, why: str, code: str) -> None:
        super().__init__(why)
        self.code = code


def refuse(why: str, code: str = "damaged") -> Refused:
    return Refused(why, code)


@dataclass(frozen=True)
class Name:
    """A global that a pickle names: a pair of words, and no object."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"[:120]


@dataclass(frozen=True)
class Storage:
    """The bytes that tensors lie in; dtype None: untyped, offsets are the tensor's own elements."""

    data: memoryview
    dtype: torch.dtype | None


@dataclass
class ArrayDtype:
    """A numpy dtype by value, before and after its state."""

    code: str
    order: str = "<"

    def numpy(self) -> np.dtype:
        return np.dtype(("" if self.code[1:] == "1" else self.order) + self.code)


class PendingArray:
    """What `_reconstruct` makes: an array that its state fills."""

    value: np.ndarray | None = None


def whole(value: Any, what: str, low: int = 0, high: int = 2**62) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise refuse(f"{what} is no whole number from {low} up")
    return value


def shape_of(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MOST_DIMENSIONS:
        raise refuse("a shape is no tuple of whole numbers")
    return tuple(whole(n, "a side") for n in value)


def tensor(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
) -> Tensor:
    """A strided view of a storage that lies inside it and has no element twice."""
    if not isinstance(storage, Storage):
        raise refuse("a tensor's storage is none")
    offset, size, stride = whole(offset, "a tensor's offset"), shape_of(size), shape_of(stride)
    dtype = dtype or storage.dtype
    if dtype is None:
        raise refuse("a tensor's type is not said")
    if len(size) != len(stride):
        raise refuse("a tensor's shape and strides differ in length")
    count, room = math.prod(size), len(storage.data) // dtype.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else offset
    if last >= room + (not count) or count > room:
        raise refuse(f"a tensor of shape {list(size)} exceeds its storage of {room} elements")
    if not count:
        return torch.empty(size, dtype=dtype)
    flat = torch.frombuffer(storage.data, dtype=dtype, count=room)
    return flat.as_strided(size, stride, offset)


def rebuild_tensor_v2(*args: Any) -> Tensor:
    if len(args) not in (6, 7) or (len(args) == 7 and args[6] not in (None, {})):
        raise refuse("a tensor has other arguments than torch writes")
    return tensor(*args[:4])


def rebuild_tensor_v3(*args: Any) -> Tensor:
    if len(args) not in (7, 8) or not isinstance(args[6], torch.dtype):
        raise refuse("a tensor has other arguments than torch writes")
    storage, offset, size, stride = args[:4]
    return tensor(storage, offset, size, stride, args[6])


def rebuild_parameter(*args: Any) -> Tensor:
    if len(args) != 3 or not isinstance(args[0], Tensor):
        raise refuse("a parameter is no tensor")
    return args[0]


def ordered(*args: Any) -> OrderedDict:
    if len(args) > 1 or (args and not isinstance(args[0], list)):
        raise refuse("an ordered dictionary has odd arguments")
    items = OrderedDict()
    for pair in args[0] if args else []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise refuse("an ordered dictionary has odd arguments")
        items[key_of(pair[0])] = pair[1]
    return items


def key_of(value: Any) -> Any:
    """A dictionary's key: plain, or a flat tuple of plain values, so that hashing it takes no
    time."""
    flat = (
        isinstance(value, tuple) and len(value) <= 64 and all(isinstance(v, PLAIN) for v in value)
    )
    if not (isinstance(value, PLAIN) or flat):
        raise refuse(f"a key is a {type(value).__name__}; expected text or numbers")
    return value


def elements(kind: Callable) -> Callable:
    def made(*args: Any) -> Any:
        if len(args) != 1 or not isinstance(args[0], (list, tuple)):
            raise refuse("a set has odd arguments")
        return kind(key_of(v) for v in args[0])

    return made


def size(*args: Any) -> tuple[int, ...]:
    return shape_of(*args) if len(args) == 1 else shape_of(args)


def device(*args: Any) -> str:
    if not args or not isinstance(args[0], str) or len(args[0]) > 32 or len(args) > 2:
        raise refuse("a device has odd arguments")
    return args[0]


def dtype(*args: Any) -> ArrayDtype:
    """`numpy.dtype(code, False, True)`: a number or bool of a fixed size, and nothing else."""
    code = args[0] if args else None
    if (
        not isinstance(code, str)
        or len(args) > 3
        or not all(isinstance(a, (bool, int)) for a in args[1:])
    ):
        raise refuse("a numpy dtype has odd arguments")
    order = code[0] if code[:1] in "<>|=" else "<"
    code = {"?": "b1"}.get(code.lstrip("<>|="), code.lstrip("<>|="))
    if code not in NUMPY:
        raise refuse(f"numpy dtype {code[:20]!r} is no plain number", "unsafe")
    return ArrayDtype(code, ">" if order == ">" else "<")


def array(kind: Any, data: Any, shape: Any, order: Any = "C") -> np.ndarray:
    """An array of its bytes, as many as its shape takes."""
    if (
        not isinstance(kind, ArrayDtype)
        or not isinstance(data, (bytes, bytearray))
        or order not in ("C", "F")
    ):
        raise refuse("an array has odd arguments")
    shape, made = shape_of(shape), kind.numpy()
    if math.prod(shape) * made.itemsize != len(data):
        raise refuse(
            f"an array of shape {list(shape)} has {len(data)} bytes; expected"
            f" {math.prod(shape) * made.itemsize}"
        )
    if kind.code == "b1" and set(data) - {0, 1}:
        raise refuse("an array of bools holds other bytes")
    array = np.frombuffer(bytearray(data), made).reshape(shape, order=order)
    return array if kind.order == "<" else array.astype(made.newbyteorder("="))


def scalar(*args: Any) -> Any:
    if len(args) != 2:
        raise refuse("a numpy scalar has odd arguments")
    return array(args[0], args[1], ())[()]


def frombuffer(*args: Any) -> np.ndarray:
    if len(args) != 4:
        raise refuse("an array has odd arguments")
    return array(args[1], args[0], args[2], args[3])


def reconstruct(*args: Any) -> PendingArray:
    if len(args) != 3 or args[0] != Name("numpy", "ndarray"):
        raise refuse("an array is rebuilt of something else", "unsafe")
    return PendingArray()


def latin1(*args: Any) -> bytes:
    if not args or not isinstance(args[0], str) or args[1:] not in ((), ("latin1",), ("latin-1",)):
        raise refuse("an encoding is not the one that arrays are pickled with", "unsafe")
    return args[0].encode("latin1")


def empty_or_bytes(*args: Any) -> bytes:
    """`bytes()` and, of protocol 2, `bytes(list of numbers)`; never a length."""
    if not args:
        return b""
    if len(args) == 1 and isinstance(args[0], (bytes, bytearray)):
        return bytes(args[0])
    raise refuse("bytes have odd arguments")
