"""A checkpoint's names and shapes, and copying it into a model, never holding the weights twice.

A tensor is copied from the mapped file straight into its place in the model (a slice of a fused
parameter), then its pages are given back, so that resident memory stays at the model's own bytes
plus one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.finite import check_finite
from nexus_rt.loading.names import extra, some, without_spare
from nexus_rt.loading.stored import StoredTensor, fitted, read_tensors, renamed
from nexus_rt.models.wan import FUSED, KEEP_FP32

if TYPE_CHECKING:
    from nexus_rt.loading.packing import Packing

ORIGINAL_NAMES = [  # Wan's own names -> diffusers', as diffusers' conversion script maps them
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (
        r"\.norm3\.",
        ".norm2.",
    ),  # Wan counts its norms 1, 3, 2: the affine one before cross-attention is its third
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
]


# What a transformer's names begin with where it was saved as part of something: `diffusion_model`
# by ComfyUI, `transformer_2` by diffusers, `pipe.dit` by DiffSynth.
HOLDERS = re.compile(r"^(?:(?:model|diffusion_model|transformer(?:_2)?|pipe|dit)\.)+")


def diffusers_name(name: str) -> str:
    """A parameter's name in diffusers' layout, given either layout's, with or without the names of
    what held the transformer."""
    name = HOLDERS.sub("", name)
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def fused_place(name: str, shape: Callable[[str], tuple[int, ...]]) -> tuple[str, slice | None]:
    """Where diffusers' parameter `name` lies in our model: our name, and its rows there (None: all
    of them)."""
    for ours, theirs in FUSED.items():
        for i, part in enumerate(theirs):
            if f".{part}." in name:
                target = name.replace(part, ours)
                rows = shape(target)[0] // len(theirs)
                return target, slice(i * rows, (i + 1) * rows)
    return name, None


def fused_parts(name: str) -> tuple[str, ...]:
    """Our parameter's names in diffusers' layout: those it is made of, or itself."""
    for ours, theirs in FUSED.items():
        if f".{ours}." in name:
            return tuple(name.replace(ours, part) for part in theirs)
    return (name,)


def diffusers_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes our parameters have in a diffusers checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        parts = fused_parts(name)
        rows = parameter.shape[0] // len(parts)
        shapes |= dict.fromkeys(parts, (rows, *parameter.shape[1:]))
    return shapes


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in diffusers' names: the fused projections split (views, not copies)."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = fused_parts(name)
        out.update(
            zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True)
        )
    return out


def in_diffusers_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint of either layout under diffusers' names.

    Raises:
        ModelError: two keys are one parameter (as `x` and `model.x` are).
    """
    return renamed(tensors, diffusers_name)


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
    stored = fitted(in_diffusers_names(tensors), expected)
    where = next((t.path.parent for t in tensors.values()), "the file")
    stored = without_spare(stored, expected, where)
    missing, unknown = expected.keys() - stored.keys(), stored.keys() - expected.keys()
    if missing or unknown:
        reason = extra(sorted(unknown))
        raise ModelError(
            f"{where}: the checkpoint is not this architecture: missing {some(missing)}, unknown"
            f" {some(unknown)}; {reason or 'check config.json against the weights'}.",
            code="mismatch",
        )
    for name, shape in expected.items():
        got = stored[name].shape
        if got != shape:
            raise ModelError(
                f"{stored[name].path}: {name} has shape {got}; config.json asks for {shape}.",
                code="mismatch",
            )
    return stored


def compare(stored: Mapping[str, StoredTensor], module: nn.Module, where: Path, what: str) -> None:
    """Raise unless a checkpoint's names and shapes are exactly a module's (which may be on the meta
    device).

    Raises:
        ModelError: names the first that are missing, unknown or of another shape.
    """
    expected = module.state_dict()
    missing, unknown = (
        sorted(expected.keys() - stored.keys()),
        sorted(stored.keys() - expected.keys()),
    )
    if missing or unknown:
        first = lambda names: shorten(", ".join(names[:3])) or "none"
        raise ModelError(
            f"{where}: the weights are not this {what}'s: {len(missing)} missing"
            f" ({first(missing)}), {len(unknown)} unknown ({first(unknown)}); check config.json"
            " against the weights, or download the folder again.",
            code="mismatch",
        )
    for name, place in expected.items():
        if stored[name].shape != tuple(place.shape):
            raise ModelError(
                f"{where}: {name} has shape {stored[name].shape}; config.json asks for"
                f" {tuple(place.shape)}.",
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
    for name, tensor in read_tensors(stored.items()):
        owner, leaf = name.rpartition(".")[::2]
        kept = torch.float32 if any(part in name for part in keep_fp32) else dtype
        value = torch.empty(tensor.shape, dtype=kept, device=device)
        value.copy_(tensor)
        check_finite(name, stored[name], value, tensor)
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            setattr(place, leaf, nn.Parameter(value, requires_grad=False))
        else:
            place._buffers[leaf] = value
