"""The tensors of a checkpoint by name, whatever its files: under plain names, with their scales.

Nothing is read but headers and the scales of 8-bit weights. Which files hold them is
`nexus_rt.loading.locate`'s, how a file holds them `nexus_rt.loading.formats`'.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from nexus_rt.core.documents import read_object
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading import names, scales
from nexus_rt.loading.config import config_of
from nexus_rt.loading.formats import gguf, pickles
from nexus_rt.loading.formats.safetensors import read_header, read_metadata, read_shards
from nexus_rt.loading.formats.stored import StoredTensor
from nexus_rt.loading.locate import PICKLES, weight_files
from nexus_rt.loading.scales import Header


def find_tensors(source: Path) -> dict[str, StoredTensor]:
    """Every weight of a model's file or folder, 8-bit ones with their scales.

    Raises:
        ModelError: no weights here (pickles are named), a shard is missing, a tensor is there
            twice, or a quantisation that is not read; names it.
    """
    file = weight_files(source)[0]
    if file.suffix == ".gguf":
        return _unwrapped(gguf.read(file))
    files = [] if file.suffix in PICKLES else [file]
    if file.name.endswith(".json"):
        tensors = read_shards(source, file)
        files = sorted({t.path for t in tensors.values()})
    else:
        tensors = read_header(file, integers=True) if files else _pickled(file)
    headers = [Header(str(f), read_metadata(f)) for f in files]
    if (config := config_of(source)) is not None:
        headers.append(Header(str(config), config=read_object(config)))
    return scales.pair(_unwrapped(tensors), headers)


def fitted(
    tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """Tensors of GGUF files in a model's shapes where only sizes of 1 differ, which converters
    that go through ggml drop or add; all else as it is."""
    out = dict(tensors)
    ones = lambda sides: [n for n in sides if n != 1]
    for name, stored in tensors.items():
        shape = tuple(shapes.get(name, stored.shape))
        if stored.path.suffix == ".gguf" and ones(shape) == ones(stored.shape):
            out[name] = replace(stored, shape=shape)
    return out


def _unwrapped(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint without the attributes of wrappers in its names, and without the counters of
    training runs."""
    counters = [k for k, t in tensors.items() if names.is_counter(k, t.shape)]
    if counters:
        path = tensors[counters[0]].path
        warnings.warn(
            f"{path}: left out {names.some(counters)}: counters of a training run, which no model"
            " computes with.",
            stacklevel=3,
        )
    weights = {k: t for k, t in tensors.items() if k not in counters}
    return renamed(weights, names.plain_name)


def renamed(
    tensors: Mapping[str, StoredTensor], name: Callable[[str], str]
) -> dict[str, StoredTensor]:
    """A checkpoint under a model's own names.

    Raises:
        ModelError: two keys are one parameter (as `x` and `model.x` are).
    """
    out: dict[str, StoredTensor] = {}
    keys: dict[str, str] = {}
    for key, stored in tensors.items():
        if (new := name(key)) in out:
            raise ModelError(
                f"{stored.path}: {shorten(keys[new], 120)} and {shorten(key, 120)} are one"
                f" parameter,"
                " stored twice; save the checkpoint again with one of them.",
                code="duplicate",
            )
        out[new], keys[new] = stored, key
    return out


def _pickled(file: Path) -> dict[str, StoredTensor]:
    """A pickle's tensors, read without running it."""
    state = pickles.read_state(file, "model", "module", "state_dict", "model_state_dict")
    warnings.warn(
        f"{file} is a pickle, which is read without running it; `nexus-rt convert wan {file} DIR`"
        " makes safetensors, which are loaded sooner and in less memory.",
        stacklevel=2,
    )
    return {
        name: StoredTensor(file, 0, t.nbytes, t.dtype, tuple(t.shape), None, t)
        for name, t in state.items()
    }
