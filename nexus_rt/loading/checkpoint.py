"""A checkpoint's names and shapes, and copying it into a model, never holding the weights twice.

A tensor is copied from the mapped file straight into its place in the model (a slice of a fused
parameter), then its pages are given back, so that resident memory stays at the model's own bytes
plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nexus_rt.core.errors import ModelError
from nexus_rt.loading.finite import check_finite
from nexus_rt.loading.formats.stored import StoredTensor, read_tensors
from nexus_rt.loading.layouts import diffusers_name, diffusers_shapes, fused_place
from nexus_rt.loading.names import extra, some, without_spare
from nexus_rt.loading.packing import Packing
from nexus_rt.loading.tensors import fitted, renamed
from nexus_rt.models.wan import KEEP_FP32


def fill(
    model: nn.Module,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    changes: Callable[[str, Tensor], Tensor] | None = None,
    packing: Packing | None = None,
) -> None:
    """Give a meta-device Wan model its memory and copy a checkpoint of either layout into it.

    Args:
        changes: diffusers' name of a parameter and the stored tensor to what goes into the model
            instead; rounded to `dtype` once, after it.
        packing: which matrices stay in fewer bits, and how.

    Raises:
        ModelError: a parameter is missing, unknown, there twice, of another shape, or not finite.
    """
    stored = _checked(model, tensors)
    packed = packing.places(model, stored) if packing is not None else set()
    for name, parameter in list(model.named_parameters()):
        if name in packed:
            continue
        keep = torch.float32 if any(part in name for part in KEEP_FP32) else dtype
        owner, leaf = name.rpartition(".")[::2]
        place = nn.Parameter(
            torch.empty(parameter.shape, dtype=keep, device=device), requires_grad=False
        )
        setattr(model.get_submodule(owner), leaf, place)
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_tensors(stored.items(), encoded=True):
            target, rows = fused_place(name, lambda n: tuple(places[n].shape))
            if target in packed:
                assert packing is not None
                packing.keep(model, target, name, stored[name], tensor, device)
                continue
            value = stored[name].decoded(tensor)
            part: Tensor = places[target] if rows is None else places[target][rows]
            part.copy_(value if changes is None else changes(name, value.to(device)))
            check_finite(name, stored[name], part, value)


def _checked(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint under diffusers' names, exactly a model's parameters."""
    expected = diffusers_shapes(model)
    stored = fitted(renamed(tensors, diffusers_name), expected)
    where = next((t.path.parent for t in tensors.values()), "the file")
    stored = without_spare(stored, expected, where)
    reason = extra(sorted(stored.keys() - expected.keys()))
    compare(stored, expected, where, "transformer", *[reason] if reason else [])
    return stored


def compare(
    stored: Mapping[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    where: Path | str,
    what: str,
    remedy: str = "check config.json against the weights, or download the folder again",
) -> None:
    """Raise unless a checkpoint's names and shapes are exactly a model's.

    Raises:
        ModelError: names the first that are missing, unknown or of another shape.
    """
    other = [
        mismatch(name, tensor.shape, shapes[name])
        for name, tensor in stored.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    lost, foreign = shapes.keys() - stored.keys(), stored.keys() - shapes.keys()
    refuse_unfit(where, what, lost, foreign, other, remedy=remedy)


def mismatch(name: str, stored: Iterable[int], expected: Iterable[int]) -> str:
    """A tensor of another shape, in words."""
    return f"{name}: {tuple(stored)} stored, {tuple(expected)} in config.json"


def refuse_unfit(
    where: Path | str,
    what: str,
    missing: Collection[str],
    unknown: Collection[str],
    mismatched: Collection[str],
    errors: Iterable[str] = (),
    *,
    remedy: str,
) -> None:
    """Raise a `ModelError` that names the first weights of each kind, if there are any."""
    kinds = (
        ("missing are", missing),
        ("unknown are", unknown),
        ("of another shape are", mismatched),
    )
    problems = [f"{words} {some(names)}" for words, names in kinds if names] + list(errors)
    if problems:
        raise ModelError(
            f"{where}: the weights are not this {what}'s: {'; '.join(problems)}; {remedy}.",
            code="mismatch",
        )


def fill_exactly(
    module: nn.Module,
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    keep_fp32: tuple[str, ...] = (),
) -> None:
    """Give a meta-device module that the tensors fit exactly its memory; each goes from the mapped
    file to its place.

    Args:
        keep_fp32: parts of names of tensors that stay in float32.

    Raises:
        ModelError: a tensor holds NaN or infinity.
    """
    for name, value in read_checked(stored, dtype, device, keep_fp32):
        owner, leaf = name.rpartition(".")[::2]
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            setattr(place, leaf, nn.Parameter(value, requires_grad=False))
        else:
            place._buffers[leaf] = value


def read_checked(
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
    keep_fp32: tuple[str, ...] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, on a device; arguments and errors as of `fill_exactly`."""
    for name, tensor in read_tensors(stored.items()):
        kept = torch.float32 if any(part in name for part in keep_fp32) else dtype
        value = torch.empty(tensor.shape, dtype=kept, device=device)
        value.copy_(tensor)
        check_finite(name, stored[name], value, tensor)
        yield name, value
