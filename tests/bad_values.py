"""Values that are no argument's, and a call with each of them in the place of each argument."""

import inspect
import sys
from pathlib import Path

import numpy as np
import torch

from nexus_rt import NexusError


class Broken:
    """An object none of whose methods works."""

    def _fail(self, *arguments):
        raise ZeroDivisionError("broken")

    __repr__ = __str__ = __float__ = __index__ = __int__ = __len__ = __iter__ = __bool__ = _fail
    __eq__ = __hash__ = __fspath__ = __call__ = __getitem__ = __lt__ = __add__ = __mul__ = _fail


VALUES = {
    "an object": object(),
    "a broken object": Broken(),
    "a class": dict,
    "a module": sys,
    "a function": lambda *arguments: None,
    "bytes": b"small",
    "no text": "",
    "a space": " ",
    "half a pair": "\ud800",
    "a NUL": "small\0",
    "a long text": "a" * 10_000,
    "text": "nonsense",
    "a list of nothing": [None],
    "an empty list": [],
    "an empty tuple": (),
    "a nested list": [[["x"]]],
    "two words": ("x", "y"),
    "three numbers": (1, 2, 3),
    "a dictionary": {"a": 1},
    "a set": {1},
    "True": True,
    "zero": 0,
    "minus one": -1,
    "a fraction": 2.5,
    "a whole float": 17.0,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a complex number": 1j,
    "5,000 digits": 10**5000,
    "minus 5,000 digits": -(10**5000),
    "a path": Path("nowhere"),
    "an empty tensor": torch.empty(0),
    "three elements": torch.zeros(3),
    "a tensor of truth values": torch.ones(1, 16, 2, 4, 6, dtype=torch.bool),
    "a NaN tensor": torch.full((1, 16, 2, 4, 6), float("nan")),
    "a meta tensor": torch.empty(1, 16, 2, 4, 6, device="meta"),
    "an array": np.zeros(3),
    "an array of text": np.array(["x"]),
    "a dtype": torch.int8,
    "a device": torch.device("meta"),
}


def parameters(function):
    """Names of a function's arguments, without `self` and the like."""
    every = inspect.signature(function).parameters.values()
    return [p.name for p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def raw_errors(call, base, names, skip=()):
    """What a call raises that is no `NexusError`, by argument and value.

    base: arguments that are right, None where there are none; `names`: those to replace in turn. skip: (argument, value) pairs
        that mean something.
    """
    if base is not None:
        call(**base)
    raw = {}
    for name in names:
        for words, value in VALUES.items():
            if (name, words) in skip:
                continue
            try:
                call(**{**(base or {}), name: value})
            except NexusError as error:
                str(error).encode()
            except Exception as error:
                raw[name, words] = f"{type(error).__name__}: {str(error)[:120]}"
    return raw
