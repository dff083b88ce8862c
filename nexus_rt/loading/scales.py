"""8-bit weights and the scales that stand beside them, under the names that publishers use; and
the quantisations that are recognised and not read.

Per tensor, per row and per block: ComfyUI's `scale_weight` (files called fp8_scaled) and
`weight_scale` with notes (`nexus_rt.loading.notes`), LightX2V's `weight_scale` (fp8 and int8, a
scale a row), and `weight_scale_inv` (blocks of 128). Scales of activations (`scale_input`,
`input_scale`) have no part in the weights and are left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.devices import dtype_name
from nexus_rt.core.documents import parse
from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading import notes
from nexus_rt.loading.finite import is_finite
from nexus_rt.loading.formats.stored import StoredTensor, read_tensor
from nexus_rt.loading.names import plain_name
from nexus_rt.loading.notes import FP8, MAX_NOTE, NOTE, Note
from nexus_rt.loading.quantization_config import config_note, header_config
from nexus_rt.models.encodings import Scaled

SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
ACTIVATIONS = (".scale_input", ".input_scale")
ZEROS = ".weight_zero_point"  # compressed-tensors writes them where they are all zero, too
BLOCKS = ((128, 128), (64, 64), (32, 32), (256, 256))  # tried where no note gives a size
MARKER = "scaled_fp8"  # of ComfyUI's files: the fp8 weights have scales
# in ComfyUI's files: a tokenizer, the marker, and a preference of how attention is computed
BESIDE = re.compile(r"(^|\.)(spiece_model|scaled_fp8|comfy_attention\.config)$")
# endings of keys -> the quantisation they belong to
UNREAD = (
    (r"\.weight\.quant_state\.bitsandbytes__(nf4|fp4)$", "bitsandbytes {0}"),
    (r"\.weight\.(absmax|quant_map|nested_absmax)$", "bitsandbytes 4-bit"),
    (r"\.(SCB|weight_format)$", "bitsandbytes int8"),
    (
        r"\.(smooth_factor|smooth_factor_orig|wscales|wzeros|wtscale|wcscales)$",
        "SVDQuant (nunchaku)",
    ),
    (r"\.(qzeros|g_idx|weight_g_idx)$", "GPTQ or AWQ"),
    (r"\.qweight$", "GPTQ, AWQ or SVDQuant"),
    (r"\.(weight_scale_2|weight_global_scale)$", "NVFP4"),
    (r"\.(pre_quant_scale|smooth_scale)$", "a smoothed (AWQ-like)"),
    (r"\.weight\._(data|scale)$", "optimum-quanto"),
    (r"\.weight_packed$", "compressed-tensors' packed"),
    (r"\.(zero_point|weight_zeros|weight_zp|weight_offset)$", "an asymmetric (with zero points)"),
    (r"\.weight_(s_rel|s_channel|codebook)$", "W4A8"),
    (
        r"\.(hadamard\w*|had_[kl]|rotation\w*|weight_rotation|rotation_matrix)$",
        "a rotated (QuaRot-like)",
    ),
)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says beside its tensors: a safetensors header's strings, or `config.json`."""

    where: str
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def pair(tensors: Mapping[str, StoredTensor], headers: Sequence[Header]) -> dict[str, StoredTensor]:
    """Weights with their scales as encodings; scales, markers and notes are gone from the result.

    Args:
        headers: of the files, and the config beside them.

    Raises:
        ModelError: a quantisation that is not read or a note that is not understood, a scale
            without its weight or of a shape that does not fit, an 8-bit weight without a scale in a
            file of scaled ones, or whole numbers without a scale.
    """
    refuse_unread(tensors)
    layers = _notes(tensors, headers)
    whole = _whole(headers)
    weights: dict[str, StoredTensor] = {}
    scaled: dict[str, str] = {}
    for name, stored in tensors.items():
        ending = next((e for e in (*SCALES, *ACTIVATIONS, ZEROS) if name.endswith(e)), None)
        if ending is None:
            if not name.endswith(NOTE) and BESIDE.search(name) is None:
                weights[name] = stored
            continue
        weight = name.removesuffix(ending) + ".weight"
        if weight not in tensors:
            raise ModelError(
                f"{stored.path}: {shorten(name, 120)} scales {shorten(weight, 120)}, which is"
                f" not there;"
                " get the file again.",
                code="missing",
            )
        if ending == ZEROS:
            _refuse_zeros(name, stored)
        elif ending in SCALES and _is_quantised(tensors[weight], layers.get(weight)):
            if weight in scaled:
                raise ModelError(
                    f"{stored.path}: {shorten(weight, 120)} has two scales,"
                    f" {shorten(scaled[weight], 120)}"
                    f" and {shorten(name, 120)}; keep one of them.",
                    code="duplicate",
                )
            scaled[weight] = name
        elif ending in SCALES:
            _refuse_factor(name, stored, tensors[weight])
    for weight, note in layers.items():
        weights[weight] = _as_noted(weight, weights[weight], note)
    for weight, name in scaled.items():
        weights[weight] = _scaled(
            weight, weights[weight], _scale(name, tensors[name]), layers.get(weight, whole)
        )
    _refuse_missing(weights, _reason(tensors, layers, scaled, whole))
    return weights


def refuse_unread(names: Mapping[str, Any]) -> None:
    """Raise where keys are of a quantisation that is known and not read; names it."""
    for name in names:
        for pattern, kind in UNREAD:
            if match := re.search(pattern, name):
                where = getattr(names[name], "path", "the file")
                raise ModelError(
                    f"{where}: {shorten(name, 120)} is of {kind.format(*match.groups())}"
                    f" quantisation,"
                    " which is not read here; get the checkpoint in bf16, fp8 (plain or scaled),"
                    " int8 with scales, or GGUF.",
                    code="unsupported",
                )


def _notes(tensors: Mapping[str, StoredTensor], headers: Sequence[Header]) -> dict[str, Note]:
    """Notes by weight: of the tensors beside the weights, and of the headers."""
    stated: list[tuple[str, str, Mapping[str, Any]]] = []
    for header in headers:
        layers = notes.header_notes(header.metadata, header.where)
        where = f"{header.where}: {notes.METADATA}: "
        stated += [
            (plain_name(layer), where + shorten(layer, 120), note) for layer, note in layers.items()
        ]
    for name, stored in tensors.items():
        if not name.endswith(NOTE):
            continue
        where = f"{stored.path}: {shorten(name, 120)}"
        if stored.dtype != torch.uint8 or stored.stop - stored.start > MAX_NOTE:
            raise ModelError(
                f"{where} is {stored.shape} of {_kind(stored.dtype)}; expected JSON as at most"
                f" {MAX_NOTE} bytes.",
                code="invalid_type",
            )
        text = bytes(read_tensor(stored).flatten().tolist())
        stated.append((name.removesuffix(NOTE), where, notes.layer_note(parse(text, where), where)))
    found = notes.by_layer(stated, (n for n in tensors if n.endswith(".weight")))
    if not any(note.rotation for note in found.values()):
        for header in headers:
            notes.refuse_rotation(header.metadata, header.where)
    return found


def _whole(headers: Sequence[Header]) -> Note | None:
    """What is said of all 8-bit weights together."""
    stated = [config_note(h.config, h.where) for h in headers]
    stated += [header_config(h.metadata, h.where) for h in headers]
    return next((note for note in stated if note is not None), None)


def _is_quantised(stored: StoredTensor, note: Note | None) -> bool:
    """Whether a stored weight is of 8 bits."""
    if stored.dtype == torch.uint8 and note is None:
        raise ModelError(
            f"{stored.path}: a weight is stored as uint8 beside a scale, and no note says what the"
            " bytes are; get the file again.",
            code="missing",
        )
    return stored.dtype.itemsize == 1


def _kind(dtype: torch.dtype) -> str:
    return FP8.get(dtype, dtype_name(dtype))


def _scale(name: str, stored: StoredTensor) -> Tensor:
    """A scale in float32."""
    where = f"{stored.path}: {shorten(name, 120)}"
    if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
        raise ModelError(
            f"{where} holds scales as {_kind(stored.dtype)}, which are not read here; expected"
            " float32, bfloat16 or float16.",
            code="unsupported",
        )
    scale = read_tensor(stored).float()
    if not is_finite(scale):
        raise ModelError(f"{where} holds NaN or infinity; get the file again.", code="not_finite")
    return scale


def _refuse_zeros(name: str, stored: StoredTensor) -> None:
    """Raise where zero points are not all zero."""
    if bool(read_tensor(stored).any()):
        raise ModelError(
            f"{stored.path}: {shorten(name, 120)} is of an asymmetric (with zero points)"
            f" quantisation,"
            f" which is not read here; {notes.REMEDY}.",
            code="unsupported",
        )


def _refuse_factor(name: str, stored: StoredTensor, weight: StoredTensor) -> None:
    """Raise where a weight that is not quantised has a scale that changes it."""
    if bool((_scale(name, stored) != 1).any()):
        raise ModelError(
            f"{stored.path}: {shorten(name, 120)} scales a weight that is stored as"
            f" {_kind(weight.dtype)}; expected one of 8 bits, or no scale: get the file again.",
            code="mismatch",
        )


def _as_noted(name: str, stored: StoredTensor, note: Note) -> StoredTensor:
    """A weight that a note gives a format: bytes are numbers of it."""
    if note.shape is not None and note.shape != stored.shape:
        raise ModelError(
            f"{note.where} sets orig_shape to {note.shape}, and {shorten(name, 120)} is"
            f" {stored.shape};"
            " get the file again.",
            code="mismatch",
            param="orig_shape",
        )
    (wanted,) = note.dtypes
    if stored.dtype == torch.uint8:
        stored = dataclasses.replace(stored, dtype=wanted)
    _check_type(name, stored, note)
    return stored


def _check_type(name: str, stored: StoredTensor, note: Note) -> None:
    if stored.dtype not in note.dtypes:
        kinds = " or ".join(map(dtype_name, note.dtypes))
        raise ModelError(
            f"{stored.path}: {shorten(name, 120)} is stored as"
            f" {str(stored.dtype).removeprefix('torch.')}, and its note says {kinds}; get the file"
            " again.",
            code="mismatch",
        )


def _scaled(name: str, stored: StoredTensor, scale: Tensor, note: Note | None) -> StoredTensor:
    """A weight whose stored values are multiplied by `scale`."""
    if note is not None:
        _check_type(name, stored, note)
    scale, sizes = _placed(name, stored, scale, note)
    form = "" if scale.ndim == 0 else " by row" if sizes is None else f" by {sizes[0]}x{sizes[1]}"
    rotation = None if note is None else note.rotation
    if rotation is not None:
        if len(stored.shape) != 2 or stored.shape[1] % rotation:
            raise ModelError(
                f"{note.where if note else stored.path} rotates groups of {rotation} columns, and"
                f" {shorten(name, 120)} is {stored.shape}; get the file again.",
                code="mismatch",
            )
        form += f", rotated in {rotation}"
    encoding = Scaled(f"{_kind(stored.dtype)} scaled{form}", scale, sizes, rotation)
    return dataclasses.replace(stored, encoding=encoding)


def _placed(
    name: str, stored: StoredTensor, scale: Tensor, note: Note | None
) -> tuple[Tensor, tuple[int, int] | None]:
    """A scale as `Scaled` has it, and rows and columns of a block where it has one for each."""
    shape, shapes = stored.shape, tuple(scale.shape)
    blocks = None if note is None else note.blocks
    rows = None if note is None else note.rows
    one_block = any(all(n <= m for n, m in zip(shape, b, strict=False)) for b in blocks or ())
    if scale.numel() == 1 and (one_block if blocks else not rows or shape[:1] == (1,)):
        return scale.reshape(()), None
    by_row = bool(shape) and shapes[:1] == shape[:1] and scale.numel() == shape[0]
    if blocks is None and rows is not False and by_row:
        return scale.reshape(-1, *[1] * (len(shape) - 1)), None
    if len(shape) == len(shapes) == 2 and rows is None and scale.numel():
        for size in blocks or BLOCKS:
            if tuple(-(-n // s) for n, s in zip(shape, size, strict=True)) == shapes:
                return scale, size
        if blocks is None and all(n % m == 0 for n, m in zip(shape, shapes, strict=True)):
            return scale, (shape[0] // shapes[0], shape[1] // shapes[1])
    expected = "one number, one a row, or one a block of 128"
    if blocks is not None:
        expected = "one a block of " + " or ".join(f"{a}x{b}" for a, b in blocks)
    elif rows is not None:
        expected = "one a row" if rows else "one number"
    says = "" if note is None or (blocks is None and rows is None) else f", as {note.where} says"
    raise ModelError(
        f"{stored.path}: the scale of {shorten(name, 120)} is {shapes}, and the weight {shape};"
        f" expected {expected}{says}.",
        code="mismatch",
    )


def _reason(
    tensors: Mapping[str, StoredTensor],
    layers: Mapping[str, Note],
    scaled: Mapping[str, str],
    whole: Note | None,
) -> str | None:
    """Why 8-bit weights of a file have scales; None where nothing says that they do."""
    marker = next((n for n in tensors if n.rpartition(".")[2] == MARKER), None)
    if marker is not None:
        return f"{shorten(marker, 120)} marks the file as scaled"
    if layers:
        return f"{next(iter(layers.values())).where} says that the file is scaled"
    if whole is not None:
        return f"{whole.where} says that the file is scaled"
    if scaled:
        return f"others have one, such as {shorten(next(iter(scaled.values())), 120)}"
    return None


def _refuse_missing(weights: Mapping[str, StoredTensor], reason: str | None) -> None:
    """Raise where a weight lacks its scale: whole numbers, and fp8 where `reason` says so."""
    for name, stored in weights.items():
        if stored.encoding is not None:
            continue
        if not stored.dtype.is_floating_point:
            raise ModelError(
                f"{stored.path}: {shorten(name, 120)} has type {_kind(stored.dtype)} and no scale;"
                " expected a weight in floating point, or 8 bits beside their scale.",
                code="missing",
            )
        if reason is not None and stored.dtype in FP8 and name.endswith(".weight"):
            raise ModelError(
                f"{stored.path}: {shorten(name, 120)} is {_kind(stored.dtype)} and has no scale,"
                f" and"
                f" {reason}; get the file again.",
                code="missing",
            )
