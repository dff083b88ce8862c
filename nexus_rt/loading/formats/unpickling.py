"""A pickle interpreter that makes tensors, arrays and containers, and calls nothing that a pickle
names.

The opcodes are walked one by one; a global is a key of `GLOBALS`, whose functions check what they
are called with. Python's unpickler, numpy's `_reconstruct` and dtype states are not used, since
each can be led to run code.
"""

from __future__ import annotations

import codecs
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.storage import TypedStorage

for _codec in ("raw_unicode_escape", "unicode_escape", "cp437", "latin1", "ascii"):
    codecs.lookup(_codec)  # now, and not while a file is read: an import runs code
# A checkpoint of a thousand tensors has thirty thousand instructions; of this limit's size, seconds
# go by.
MAX_OPCODES, MAX_MARKS, MAX_DEPTH = 2_000_000, 256, 64
MAX_COPIED = 1 << 20  # items and bytes that a pickle may copy beyond its own length
PLAIN = (str, bytes, int, float, bool, type(None))


class Refused(ValueError):
    """Why a pickle is refused, with the `code` of the error that it becomes."""

    def __init__(self, why: str, code: str = "damaged") -> None:
        super().__init__(why)
        self.code = code


@dataclass(frozen=True)
class Function:
    """A function that a pickle may name."""

    call: Callable[..., Any]


@dataclass(frozen=True)
class StorageKind:
    """The class of a storage."""

    dtype: torch.dtype


@dataclass
class ArrayDtype:
    """A numpy dtype by value, before and after its state."""

    code: str
    order: str


@dataclass
class PendingArray:
    """What `_reconstruct` makes; its state makes the array, which replaces it."""

    key: int | None = None


def _key(value: Any) -> Any:
    """A dictionary's key or a set's item: plain, or a flat tuple of plain values, so that hashing
    it takes no time."""
    flat = isinstance(value, tuple) and len(value) <= 64
    if not all(isinstance(v, PLAIN) for v in (value if flat else [value])):
        raise Refused(f"a key is a {type(value).__name__}; expected text or numbers")
    return value


def _items(values: Any) -> list | tuple:
    """Never a tensor's: of a large one, each is a tensor."""
    if not isinstance(values, (list, tuple)):
        raise Refused(f"a {type(values).__name__} is no list of items")
    return values


def _keys(values: Any = ()) -> list[Any]:
    return [_key(v) for v in _items(values)]


def _ordered(pairs: Any = ()) -> OrderedDict:
    return OrderedDict((_key(k), v) for k, v in map(_items, _items(pairs)))


def _tensor(rebuild: Callable) -> Function:
    def rebuilt(storage: Any, offset: Any, *rest: Any) -> Tensor:
        if not isinstance(storage, TypedStorage) or isinstance(offset, bool):
            raise Refused("a tensor has other arguments than torch writes")
        tensor = rebuild(storage, offset, *rest)
        if tensor.nbytes > storage.nbytes():
            raise Refused(f"a tensor of shape {list(tensor.shape)} exceeds its storage")
        return tensor

    return Function(rebuilt)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise Refused("a parameter is no tensor")
    return tensor


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Refused("an encoding is not the one that arrays are pickled with", "unsafe")
    return text.encode("latin1")


def as_bytes(data: Any = b"") -> bytes:
    """`bytes()` of nothing or of bytes; never of a length."""
    if not isinstance(data, (bytes, bytearray)):
        raise Refused("bytes have odd arguments")
    return bytes(data)


def _dtype(code: Any, align: Any = False, copy: Any = True) -> ArrayDtype:
    """`numpy.dtype(code, False, True)`: a number or bool of a fixed size, and nothing else."""
    if not isinstance(code, str):
        raise Refused("a numpy dtype has odd arguments")
    plain = code.lstrip("<>|=").replace("?", "b1")
    if plain not in "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1".split():
        raise Refused(f"numpy dtype {plain[:20]!r} is no plain number", "unsafe")
    return ArrayDtype(plain, ">" if code[0] == ">" else "<")


def _array(data: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(kind, ArrayDtype) or not isinstance(data, (bytes, bytearray)):
        raise Refused("an array is not of numbers", "unsafe")
    if kind.code == "b1" and set(data) - {0, 1}:
        raise Refused("an array of bools holds other bytes")
    array = np.frombuffer(bytearray(data), kind.order + kind.code).reshape(shape, order=order)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _reconstruct(kind: Any, shape: Any, code: Any) -> PendingArray:
    if kind is not np.ndarray:
        raise Refused("an array is rebuilt of something else", "unsafe")
    return PendingArray()


DTYPES = [
    getattr(torch, name)
    for name in (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
        " float8_e4m3fn float8_e5m2 uint16 uint32 uint64"
    ).split()
]
STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble"
UNTYPED = StorageKind(torch.uint8)
TENSORS: dict[str, Any] = {
    **{str(dtype): dtype for dtype in DTYPES},
    **{
        f"torch.{name}Storage": StorageKind(dtype)
        for name, dtype in zip(STORAGES.split(), DTYPES, strict=False)
    },
    "torch.storage.UntypedStorage": UNTYPED,
    "torch.Size": Function(torch.Size),
    "torch.device": Function(torch.device),
    "torch._utils._rebuild_tensor_v2": _tensor(torch._utils._rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _tensor(torch._utils._rebuild_tensor_v3),
    "torch._utils._rebuild_parameter": Function(_parameter),
    "collections.OrderedDict": Function(_ordered),
}
BUILTINS = {
    "set": Function(lambda items=(): set(_keys(items))),
    "frozenset": Function(lambda items=(): frozenset(_keys(items))),
    "bytes": Function(as_bytes),
    "bytearray": Function(as_bytes),
}
NUMPY = {
    "multiarray._reconstruct": Function(_reconstruct),
    "multiarray.scalar": Function(lambda kind, data: _array(data, kind, ())[()]),
    "numeric._frombuffer": Function(_array),
}
GLOBALS: dict[str, Any] = {
    **TENSORS,
    **{f"{module}.{k}": v for module in ("builtins", "__builtin__") for k, v in BUILTINS.items()},
    **{f"numpy.{core}.{k}": v for core in ("core", "_core") for k, v in NUMPY.items()},
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": Function(_dtype),
    "_codecs.encode": Function(_latin1),
}
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES"
    " SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT"
    " BINFLOAT".split()
)
CONSTANTS: dict[str, Callable[[], Any]] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set},
}
PUTS, GETS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
FROM_MARK = frozenset("TUPLE LIST DICT FROZENSET APPENDS SETITEMS ADDITEMS".split())
FROM_STACK = {"APPEND": 1, "SETITEM": 2, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Unpickler:
    """The next pickle of a file, as `torch.load` expects it of a `pickle_module`."""

    persistent_load: Callable[[tuple], Any] | None = None

    def __init__(self, file: IO[bytes], **options: Any) -> None:
        self.file, self.copied = file, 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        where = f"{module}.{name}"
        if where not in GLOBALS:
            raise Refused(f"it asks for {where[:120]}, which is no tensor or container", "unsafe")
        return GLOBALS[where]

    def load(self) -> Any:
        """Its value.

        Raises:
            Refused: it asks for anything but tensors, arrays and containers, or is damaged; where
                its stack or memo lacks a value, IndexError or KeyError.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.file)):
            if count > MAX_OPCODES:
                raise Refused(f"it has more than {MAX_OPCODES} instructions", "too_large")
            if opcode.name == "STOP":
                break
            self._step(opcode.name, argument)
        if len(self.stack) != 1 or self.marks:
            raise Refused("it does not end in one value")
        return self.stack[0]

    def _step(self, name: str, argument: Any) -> None:
        stack, items = self.stack, []
        if name in FROM_MARK:
            items, self.stack = stack, self.marks.pop()
            stack = self.stack
        elif count := FROM_STACK.get(name):
            items = [stack.pop() for _ in range(count)][::-1]
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in PUTS:
            key = len(self.memo) if argument is None else argument
            self.memo[key] = stack[-1]
            if isinstance(stack[-1], PendingArray):
                stack[-1].key = key
        elif name in GETS:
            stack.append(self.memo[argument])
        elif name.startswith("TUPLE"):
            stack.append(tuple(items))
        elif name == "MARK":
            if len(self.marks) == MAX_MARKS:
                raise Refused(
                    f"it opens more than {MAX_MARKS} containers in one another", "too_large"
                )
            self.marks.append(stack)
            self.stack = []
        elif name == "LIST":
            stack.append(items)
        elif name == "FROZENSET":
            stack.append(frozenset(_keys(items)))
        elif name in ("APPEND", "APPENDS") and type(stack[-1]) is list:
            stack[-1].extend(items)
        elif name == "ADDITEMS" and type(stack[-1]) is set:
            stack[-1].update(_keys(items))
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            if name == "DICT":
                stack.append({})
            if not isinstance(stack[-1], dict):
                raise Refused("it sets items of what is no dictionary")
            stack[-1].update(zip(_keys(items[::2]), items[1::2], strict=True))
        elif name == "POP" and stack:
            stack.pop()
        elif name in ("POP", "POP_MARK"):
            self.stack = self.marks.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(self.find_class(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(module, str) or not isinstance(attribute, str):
                raise Refused("it names something by no text")
            stack.append(self.find_class(module, attribute))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, Function) or not isinstance(arguments, tuple):
                raise Refused("it calls something that is no function", "unsafe")
            self._copy(arguments)
            stack.append(function.call(*arguments))
        elif name == "BUILD":
            self._build(stack.pop())
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"it uses {name}, which no tensor or container needs", "unsafe")

    def _copy(self, values: list | tuple) -> None:
        """Count what a function copies of its arguments: a pickle that names a large value many
        times must not fill the memory."""
        copied = (list, tuple, dict, str, bytes, bytearray)
        self.copied += sum(len(v) for v in values if isinstance(v, copied))
        if self.copied > self.file.tell() + MAX_COPIED:
            raise Refused("it copies its values more often than it holds them", "too_large")

    def _build(self, state: Any) -> None:
        """BUILD: the state of an array (version, shape, dtype, column-major, data) or of a dtype
        (version, order, ...), by value; of an ordered dictionary nothing (torch's `_metadata`)."""
        target = self.stack[-1]
        if isinstance(target, PendingArray):
            self._copy(_items(state))
            shape, kind, fortran, data = state[-4:]
            self.stack[-1] = _array(data, kind, shape, "F" if fortran else "C")
            if target.key is not None:
                self.memo[target.key] = self.stack[-1]
        elif isinstance(target, ArrayDtype):
            if (
                not isinstance(state, tuple)
                or state[1] not in ("<", ">", "|", "=")
                or state[2:] != (None, None, None, -1, -1, 0)
            ):
                raise Refused("a numpy dtype's state is not that of a plain number", "unsafe")
            target.order = ">" if state[1] == ">" else "<"
        elif not isinstance(target, OrderedDict):
            raise Refused(f"it sets attributes of a {type(target).__name__}", "unsafe")

    def _storage(self, identity: Any) -> Any:
        """Of ("storage", class, key, location, count[, view])."""
        if self.persistent_load is None:
            raise Refused("it refers to objects outside itself", "unsafe")
        kind, _, key, _, count, *view = _items(identity)
        if kind != "storage" or not isinstance(key, str) or not isinstance(count, int):
            raise Refused("it refers to something that is no storage")
        if view not in ([], [None]):
            raise Refused(
                "a storage is a view of another, as torch wrote them long ago", "unsupported"
            )
        return self.persistent_load(identity)


TOKENS = {  # of the instructions of a state dict; of a global: what it is
    **{"MARK": "(", "TUPLE": ")", "EMPTY_TUPLE": "e", "TUPLE1": "1", "TUPLE2": "2", "TUPLE3": "3"},
    **{"BININT": "i", "BININT1": "i", "BININT2": "i", "LONG1": "i", "BINFLOAT": "f"},
    **{"NONE": "n", "NEWTRUE": "b", "NEWFALSE": "b", "BINUNICODE": "w", "BINPERSID": "P"},
    **{"REDUCE": "r", "BUILD": "B", "EMPTY_DICT": "{", "SETITEM": "s", "SETITEMS": "u"},
    **{"EMPTY_LIST": "[", "APPEND": "a", "APPENDS": "A", "STOP": "."},
    **dict.fromkeys(map(str, DTYPES), "d"),
    **{k: "S" for k, v in TENSORS.items() if isinstance(v, StorageKind)},
    "collections.OrderedDict": "O",
    "torch._utils._rebuild_tensor_v2": "R",
    "torch._utils._rebuild_tensor_v3": "R",
}
LEAVES = [  # instructions that make one value -> its token
    (re.compile(r"e|i1|ii2|iii3|\(i+\)"), "t"),  # a tuple of whole numbers
    (re.compile(r"\(wSwwin?\)P"), "p"),  # a storage
    (re.compile(r"Otr"), "o"),
    (re.compile(r"R\(pittbod?\)r"), "v"),  # a tensor
    (re.compile(r"[{o]"), "m"),
    (re.compile(r"\["), "l"),
]
VALUE = "[wifnbdtvml]"
CONTAINERS = re.compile(
    rf"(?P<m>mmB|m(?:[wi]{VALUE}s|\((?:[wi]{VALUE})+u))|(?P<l>l(?:{VALUE}a|\({VALUE}+A))"
)


def is_plain_state(file: IO[bytes]) -> bool:
    """Whether the next pickle of a file is one that torch's `weights_only` reader may be given:
    the instructions of a tree of dictionaries and lists of tensors, text and numbers, in the order
    in which `torch.save` writes them, with no value but text used twice.

    Of others, torch's reader hashes a tuple that is used twice, in a tuple that is used twice ...,
    in 2^depth steps, copies a list as often as it is used, and iterates over or prints a tensor.
    """
    words: dict[Any, str] = {}  # the memo's globals and text
    tokens: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if len(tokens) > MAX_OPCODES:
            raise Refused(f"it has more than {MAX_OPCODES} instructions", "too_large")
        if name in PUTS and tokens:
            words[argument] = tokens[-1]
        elif name in GETS:
            token = words.get(argument, "?")
            tokens.append(token if token in "wdSOR" else "?")
        elif name == "GLOBAL":
            tokens.append(TOKENS.get(str(argument).replace(" ", ".", 1), "?"))
        elif name != "PROTO" or argument != 2:
            tokens.append(TOKENS.get(name, "?"))
    written, passes = "".join(tokens), 0
    for pattern, token in LEAVES:
        written = pattern.sub(token, written)
    changed = 1
    while changed and passes < MAX_DEPTH:
        written, changed = CONTAINERS.subn(lambda match: match.lastgroup or "", written)
        passes += 1
    return re.fullmatch(rf"(?:{VALUE}|p)\.", written) is not None
