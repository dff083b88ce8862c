"""Reading pickled tensors without running what a pickle may hold: for the converter only."""

from __future__ import annotations

import importlib
import io
import pickle
import re
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.errors import ModelError


def _storage(data: bytes) -> Any:
    """What a tensor pickled by plain `pickle` keeps its numbers in: a whole `torch.save` of a storage."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


@lru_cache(maxsize=1)
def _allowed() -> dict[tuple[str, str], Any]:
    """Everything a pickle of tensors and containers needs, and nothing else."""
    import numpy as np

    core = "numpy._core" if hasattr(np, "_core") else "numpy.core"  # the name moved with NumPy 2
    arrays = [("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")]
    allowed = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): _storage,
        ("torch", "device"): torch.device,
        ("torch", "Size"): torch.Size,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }
    for module in ("builtins", "__builtin__"):  # the second in protocol 2
        allowed[module, "set"], allowed[module, "frozenset"] = set, frozenset
    for module, name in arrays:
        function = getattr(importlib.import_module(f"{core}.{module}"), name)
        allowed |= {(f"{prefix}.{module}", name): function for prefix in ("numpy._core", "numpy.core")}
    return allowed


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode` as pickled arrays use it, and no other codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"codec {encoding!r} is not one that arrays are pickled with")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _allowed()
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no tensor or container")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def _reason(error: Exception) -> str:
    """What went wrong; of torch's page of advice (which includes setting weights_only to False) only the line that says it."""
    told = re.search(r"[^\n]*\b(?:GLOBAL|operand|op)\b[^\n]*", str(error))
    text = told[0] if told and "Weights only load failed" in str(error) else str(error)
    return " ".join(text.split())[:300].rstrip(".") or type(error).__name__


def read_pickle(path: Path) -> Any:
    """Tensors, arrays and containers of a file written by `torch.save` or by plain `pickle`; nothing in it is run.

    Tensors of a `torch.save` file stay on disk until they are used.

    Raises:
        ModelError: missing, damaged, or it asks for anything but tensors and containers.
    """
    if not path.is_file():
        raise ModelError(f"{path} is missing; expected the folder as it was published.")
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        if zipped:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        with path.open("rb") as file:
            try:
                value = _Unpickler(file).load()
            except pickle.UnpicklingError as error:
                if "no tensor or container" in str(error):
                    raise
                value = 0
        # torch.save's old format is several pickles in a row, the first of them a number
        return torch.load(path, map_location="cpu", weights_only=True) if isinstance(value, int) else value
    except (
        pickle.UnpicklingError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
    ) as error:
        reason = _reason(error)
        raise ModelError(
            f"{path} is refused: {reason}. Only tensors and containers are read; get the file from the publisher again."
        ) from error


def read_state(path: Path, *wrappers: str) -> dict[str, Tensor]:
    """A pickled state dict: out of the first of `wrappers` that is there, `module.` prefixes taken off.

    Raises:
        ModelError: as `read_pickle`, or it is no dictionary of tensors.
    """
    state = read_pickle(path)
    for key in wrappers:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path} is no state dict: expected names and tensors{' under ' + wrappers[0] if wrappers else ''}.")
    return {k.removeprefix("module."): v for k, v in state.items()}
