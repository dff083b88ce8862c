"""A pickle interpreter that knows tensors, arrays and containers, and calls nothing that a pickle
names.

The opcodes are walked one by one; a name is looked up in a table of the functions of
`pickle_values`, each of which checks its arguments and builds its value from bytes of checked
length. No object of a pickle's own is ever made, changed or called: Python's unpickler, numpy's
`_reconstruct` and dtype states are not used, since each can be led to run code.
"""

from __future__ import annotations

import codecs
import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, cast

import torch

from nexus_rt.loading.formats.pickle_values import (
    MOST_DIMENSIONS,
    ArrayDtype,
    Name,
    PendingArray,
    UnpicklingError,
    array,
    device,
    dtype,
    elements,
    empty_or_bytes,
    frombuffer,
    key_of,
    latin1,
    ordered,
    rebuild_parameter,
    rebuild_tensor_v2,
    rebuild_tensor_v3,
    reconstruct,
    refuse,
    scalar,
    size,
)

for _codec in ("raw_unicode_escape", "unicode_escape", "cp437", "latin1", "ascii"):
    codecs.lookup(_codec)  # now, and not while a file is read: an import runs code
# A checkpoint of a thousand tensors has thirty thousand instructions; of these limits' sizes,
# seconds go by.
MOST_OPCODES, MOST_MARKS, MOST_NESTED = 2_000_000, 256, 2

DTYPES = {  # torch's names, as globals and as `<Name>Storage`
    "float64": ("Double", torch.float64),
    "float32": ("Float", torch.float32),
    "float16": ("Half", torch.float16),
    "bfloat16": ("BFloat16", torch.bfloat16),
    "int64": ("Long", torch.int64),
    "int32": ("Int", torch.int32),
    "int16": ("Short", torch.int16),
    "int8": ("Char", torch.int8),
    "uint8": ("Byte", torch.uint8),
    "bool": ("Bool", torch.bool),
    "complex64": ("ComplexFloat", torch.complex64),
    "complex128": ("ComplexDouble", torch.complex128),
    "float8_e4m3fn": ("", torch.float8_e4m3fn),
    "float8_e5m2": ("", torch.float8_e5m2),
    "uint16": ("", torch.uint16),
    "uint32": ("", torch.uint32),
    "uint64": ("", torch.uint64),
}
STORAGES = {f"{storage}Storage": dtype for storage, dtype in DTYPES.values() if storage}


FUNCTIONS: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): ordered,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch", "Size"): size,
    ("torch", "device"): device,
    ("numpy", "dtype"): dtype,
    ("_codecs", "encode"): latin1,
    **{
        (m, n): elements(k)
        for m in ("builtins", "__builtin__")
        for n, k in (("set", set), ("frozenset", frozenset))
    },
    **{(m, "bytes"): empty_or_bytes for m in ("builtins", "__builtin__")},
    **{(m, "bytearray"): empty_or_bytes for m in ("builtins", "__builtin__")},
    **{
        (f"{core}.multiarray", n): f
        for core in ("numpy.core", "numpy._core")
        for n, f in (("_reconstruct", reconstruct), ("scalar", scalar))
    },
    **{(f"{core}.numeric", "_frombuffer"): frombuffer for core in ("numpy.core", "numpy._core")},
}
VALUES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): Name("numpy", "ndarray"),
    **{("torch", name): kind for name, (_, kind) in DTYPES.items()},
}


class Interpreter:
    """One pickle's opcodes to its value.

    Args:
        persistent: turns a persistent id (a tuple) into a storage, where the format has them.
        load_bytes: reads what plain `pickle` keeps of a storage: a whole `torch.save` of it.
    """

    def __init__(
        self,
        persistent: Callable[[Any], Any] | None = None,
        load_bytes: Callable[[bytes], Any] | None = None,
    ) -> None:
        self.persistent, self.load_bytes = persistent, load_bytes

    def run(self, file: io.BufferedIOBase | io.RawIOBase) -> Any:
        """The value of the next pickle of a file.

        Raises:
            pickle.UnpicklingError: it asks for anything but tensors, arrays and containers, or is
                damaged.
        """
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        try:
            for number, (opcode, argument, _) in enumerate(
                pickletools.genops(cast(IO[bytes], file))
            ):
                if number > MOST_OPCODES:
                    raise refuse(f"it has more than {MOST_OPCODES} instructions", "too_large")
                name = opcode.name
                if name == "STOP":
                    if len(stack) != 1 or marks:
                        raise refuse("it does not end in one value")
                    value = finished(stack[0])
                    check_depth(value)
                    return value
                stack = self._step(name, argument, stack, marks, memo)
        except UnpicklingError:
            raise
        except (
            ValueError,
            IndexError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
            AttributeError,
        ) as error:
            raise refuse(f"it is damaged ({type(error).__name__}: {str(error)[:120]})") from None
        raise refuse("it ends before its last instruction")

    def _step(self, name: str, argument: Any, stack: list, marks: list, memo: dict) -> list:
        """One instruction; returns the stack, which a mark starts anew."""
        if name in ("PROTO", "FRAME"):
            return stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name == "MARK":
            if len(marks) >= MOST_MARKS:
                raise refuse(
                    f"it opens more than {MOST_MARKS} containers in one another", "too_large"
                )
            marks.append(stack)
            return []
        elif name in FROM_MARK:
            items, stack = stack, marks.pop()
            FROM_MARK[name](stack, items)
        elif name in FIXED:
            FIXED[name](stack)
        elif name == "POP":
            if stack:
                stack.pop()
            else:
                return marks.pop()
        elif name == "POP_MARK":
            return marks.pop()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(self._named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._named(module, attribute))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            build(stack[-1], state)
        elif name in ("PERSID", "BINPERSID"):
            identity = stack.pop() if name == "BINPERSID" else argument
            if self.persistent is None:
                raise refuse("it refers to objects outside itself", "unsafe")
            stack.append(self.persistent(identity))
        else:
            raise refuse(f"it uses {name}, which no tensor or container needs", "unsafe")
        return stack

    def _named(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise refuse("it names something by no text")
        where = module, name
        if where in VALUES:
            return VALUES[where]
        storage = module in ("torch", "torch.storage") and (
            name in STORAGES or name in ("UntypedStorage", "TypedStorage")
        )
        if (
            where in FUNCTIONS
            or storage
            or (where == ("torch.storage", "_load_from_bytes") and self.load_bytes)
        ):
            return Name(module, name)
        raise refuse(f"it asks for {Name(module, name)}, which is no tensor or container", "unsafe")

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise refuse("it calls something that is no function", "unsafe")
        arguments = tuple(finished(a) for a in arguments)
        if (function.module, function.name) == ("torch.storage", "_load_from_bytes"):
            if (
                self.load_bytes is None
                or len(arguments) != 1
                or not isinstance(arguments[0], (bytes, bytearray))
            ):
                raise refuse("a storage's bytes are none")
            return self.load_bytes(bytes(arguments[0]))
        known = FUNCTIONS.get((function.module, function.name))
        if known is None:
            raise refuse(f"it calls {function}, which is no function of tensors", "unsafe")
        return known(*arguments)


def finished(value: Any) -> Any:
    """A value; an array that was filled is itself."""
    if isinstance(value, PendingArray):
        if value.value is None:
            raise refuse("an array has no state")
        return value.value
    return value


def check_depth(value: Any) -> None:
    """Raise where containers are nested deeper than any code of ours walks, or hold themselves."""
    layer: list[Any] = [value]
    seen: set[int] = set()
    for _ in range(MOST_DIMENSIONS):
        inner = [
            x
            for v in layer
            if isinstance(v, (dict, list, tuple))
            for x in (v.values() if isinstance(v, dict) else v)
        ]
        layer = list(
            {
                id(x): x for x in inner if isinstance(x, (dict, list, tuple)) and id(x) not in seen
            }.values()
        )
        seen |= set(map(id, layer))
        if not layer:
            return
    raise refuse(f"its containers are nested more than {MOST_DIMENSIONS} deep", "too_large")


def build(target: Any, state: Any) -> None:
    """BUILD: the state of an array or of a dtype, by value; of an ordered dictionary nothing
    (torch's `_metadata`)."""
    if isinstance(target, PendingArray):
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise refuse("an array's state is none")
        shape, kind, fortran, data = state[-4:]
        if isinstance(data, list) or not isinstance(fortran, (bool, int)):
            raise refuse("an array holds objects", "unsafe")
        target.value = array(kind, data, shape, "F" if fortran else "C")
    elif isinstance(target, ArrayDtype):
        plain = (
            isinstance(state, tuple) and len(state) in (8, 9) and state[1] in ("<", ">", "|", "=")
        )
        if (
            not plain
            or any(s is not None for s in state[2:5])
            or any(s not in (-1, 0) for s in state[5:8])
            or state[8:] not in ((), (None,))
        ):
            raise refuse("a numpy dtype's state is not that of a plain number", "unsafe")
        target.order = ">" if state[1] == ">" else "<"
    elif not (isinstance(target, OrderedDict) and isinstance(state, dict)):
        raise refuse(f"it sets attributes of a {type(target).__name__}", "unsafe")


def _extend(stack: list, items: list) -> None:
    if not stack or type(stack[-1]) is not list:
        raise refuse("it appends to what is no list")
    stack[-1].extend(map(finished, items))


def _set_items(stack: list, items: list) -> None:
    if not stack or not isinstance(stack[-1], dict) or len(items) % 2:
        raise refuse("it sets items of what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        stack[-1][key_of(key)] = finished(value)


def _add_items(stack: list, items: list) -> None:
    if not stack or type(stack[-1]) is not set:
        raise refuse("it adds to what is no set")
    stack[-1].update(key_of(v) for v in items)


def _made_dict(stack: list, items: list) -> None:
    stack.append({})
    _set_items(stack, items)


def _tuple(count: int) -> Callable[[list], None]:
    def made(stack: list) -> None:
        if len(stack) < count:
            raise refuse("a tuple lacks its items")
        items = tuple(map(finished, stack[len(stack) - count :]))
        del stack[len(stack) - count :]
        stack.append(items)

    return made


def _set_item(stack: list) -> None:
    value, key = stack.pop(), stack.pop()
    _set_items(stack, [key, value])


def _append(stack: list) -> None:
    value = stack.pop()
    _extend(stack, [value])


LITERALS = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
    "UNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
    "FLOAT",
    "BINFLOAT",
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
FROM_MARK: dict[str, Callable[[list, list], None]] = {
    "APPENDS": _extend,
    "SETITEMS": _set_items,
    "ADDITEMS": _add_items,
    "DICT": _made_dict,
    "LIST": lambda stack, items: stack.append(list(map(finished, items))),
    "TUPLE": lambda stack, items: stack.append(tuple(map(finished, items))),
    "FROZENSET": lambda stack, items: stack.append(frozenset(key_of(v) for v in items)),
}
FIXED: dict[str, Callable[[list], None]] = {
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "SETITEM": _set_item,
    "APPEND": _append,
    "DUP": lambda stack: stack.append(stack[-1]),
}
