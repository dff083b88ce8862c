"""8-bit weights and the scales that stand beside them, under the names that publishers use; and
the quantisations that are recognised and not read.

Per tensor, per row and per block: ComfyUI's `scale_weight` (files called fp8_scaled) and
`weight_scale` with `comfy_quant` or `_quantization_metadata`, LightX2V's `weight_scale` (fp8 and
int8, a scale a row), and `weight_scale_inv` (blocks of 128). Scales of activations
(`scale_input`, `input_scale`) have no part in the weights and are left out.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nexus_rt.documents import parse
from nexus_rt.encodings import Scaled
from nexus_rt.errors import ModelError, cut

if TYPE_CHECKING:
    from nexus_rt.loading.stored import StoredTensor

SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
ACTIVATIONS = (".scale_input", ".input_scale")
NOTE, METADATA, BLOCK = ".comfy_quant", "_quantization_metadata", 128
FP8 = {torch.float8_e4m3fn: "fp8 e4m3", torch.float8_e5m2: "fp8 e5m2"}
FORMATS = {  # of ComfyUI's notes -> what the weight is stored in
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int8_tensorwise": torch.int8,
    "int8_blockwise": torch.int8,
}
BESIDE = ("spiece_model", "scaled_fp8")  # in ComfyUI's files: a tokenizer, and a marker
# endings of keys -> the quantisation they belong to
UNREAD = (
    (r"\.weight\.quant_state\.bitsandbytes__(nf4|fp4)$", "bitsandbytes {0}"),
    (r"\.weight\.(absmax|quant_map|nested_absmax)$", "bitsandbytes 4-bit"),
    (r"\.(SCB|weight_format)$", "bitsandbytes int8"),
    (
        r"\.(smooth_factor|smooth_factor_orig|wscales|wzeros|wtscale|wcscales)$",
        "SVDQuant (nunchaku)",
    ),
    (r"\.(qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.qweight$", "GPTQ, AWQ or SVDQuant"),
    (r"\.weight_scale_2$", "NVFP4"),
    (r"\.pre_quant_scale$", "a smoothed (AWQ-like)"),
    (r"\.weight\._(data|scale)$", "optimum-quanto"),
    (r"\.weight_packed$", "compressed-tensors' packed"),
)


def pair(
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    read: Callable[[StoredTensor], Tensor],
) -> dict[str, StoredTensor]:
    """Weights with their scales as encodings; scales, markers and notes are gone from the result.

    Args:
        metadata: of the file's header. read: a tensor's values.

    Raises:
        ModelError: a quantisation that is not read, a scale without its weight or of a shape that
            does not fit, or whole numbers without a scale.
    """
    refuse_unread(tensors)
    notes = _notes(tensors, metadata, read)
    weights: dict[str, StoredTensor] = {}
    scaled: dict[str, str] = {}
    for name, stored in tensors.items():
        ending = next((e for e in (*SCALES, *ACTIVATIONS) if name.endswith(e)), None)
        weight = name.removesuffix(ending or "") + ".weight"
        eight_bits = weight in tensors and tensors[weight].dtype.itemsize == 1
        if ending in ACTIVATIONS and eight_bits:
            continue
        if ending in ACTIVATIONS or (ending in SCALES and weight in tensors and not eight_bits):
            weights[name] = stored  # of a weight that is not quantised: no model has such a key
        elif ending in SCALES:
            if weight in scaled:
                raise ModelError(
                    f"{stored.path}: {cut(weight, 120)} has two scales, {cut(scaled[weight], 120)}"
                    f" and {cut(name, 120)}; keep one of them."
                )
            scaled[weight] = name
        elif ending is None and not name.endswith(NOTE) and name.rpartition(".")[2] not in BESIDE:
            weights[name] = stored
    for weight, name in scaled.items():
        if weight not in weights:
            raise ModelError(
                f"{tensors[name].path}: {cut(name, 120)} scales {cut(weight, 120)}, which is not"
                " there; get the file again."
            )
        block = notes.get(weight.removesuffix(".weight"), {}).get("group_size")
        weights[weight] = _scaled(weight, weights[weight], read(tensors[name]), block)
    for layer, note in notes.items():
        wanted, weight = FORMATS[note["format"]], f"{layer}.weight"
        if weight in weights:
            weights[weight] = _as_noted(weight, weights[weight], wanted)
    for name, stored in weights.items():
        if not stored.dtype.is_floating_point and stored.encoding is None:
            kind = str(stored.dtype).removeprefix("torch.")
            raise ModelError(
                f"{stored.path}: {cut(name, 120)} has type {kind} and no scale; expected a weight"
                " in floating point, or 8 bits beside their scale."
            )
    return weights


def refuse_unread(names: Mapping[str, Any]) -> None:
    """Raise where keys are of a quantisation that is known and not read; names it."""
    for name in names:
        for pattern, kind in UNREAD:
            if match := re.search(pattern, name):
                where = getattr(names[name], "path", "the file")
                raise ModelError(
                    f"{where}: {cut(name, 120)} is of {kind.format(*match.groups())} quantisation,"
                    " which is not read here; get the checkpoint in bf16, fp8 (plain or scaled),"
                    " int8 with scales, or GGUF."
                )


def _notes(
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    read: Callable[[StoredTensor], Tensor],
) -> dict[str, dict[str, Any]]:
    """ComfyUI's notes by layer: of the tensors beside the weights, and of the header."""
    notes: dict[str, Any] = {}
    if METADATA in metadata:
        where = next((t.path for t in tensors.values()), "the file")
        stored = parse(metadata[METADATA], f"{where}: {METADATA}")
        notes = stored.get("layers", {}) if isinstance(stored, dict) else {}
        if not isinstance(notes, dict):
            raise ModelError(f"{where}: the layers of {METADATA} are no object; get it again.")
    for name, stored in tensors.items():
        if name.endswith(NOTE):
            text = bytes(read(stored).to(torch.uint8).flatten().tolist())
            notes[name.removesuffix(NOTE)] = parse(text, f"{stored.path}: {cut(name, 120)}")
    for layer, note in notes.items():
        kind = note.get("format") if isinstance(note, dict) else None
        if kind not in FORMATS:
            where = next((t.path for t in tensors.values()), "the file")
            raise ModelError(
                f"{where}: {cut(layer, 120)} is quantised as {cut(json.dumps(kind), 60)}, which is"
                f" not read here; expected one of {', '.join(FORMATS)}."
            )
    return notes


def _scaled(name: str, stored: StoredTensor, scale: Tensor, block: Any) -> StoredTensor:
    """A weight whose stored values are multiplied by `scale`."""
    where = f"{stored.path}: the scale of {cut(name, 120)}"
    if not bool(scale.float().isfinite().all()):
        raise ModelError(f"{where} holds NaN or infinity; get the file again.")
    scale, shape = scale.float(), stored.shape
    sizes: tuple[int, int] | None = None
    if scale.numel() == 1:
        scale = scale.reshape(())
    elif len(shape) == 2 and tuple(scale.shape) in ((shape[0],), (shape[0], 1)):
        scale = scale.reshape(-1, 1)
    elif len(shape) == 2 and scale.ndim == 2:
        sizes = _block(shape, tuple(scale.shape), block)
    fits = scale.ndim == 0 or sizes is not None or tuple(scale.shape) == (shape[0], 1)
    if len(shape) != 2 or not fits:
        raise ModelError(
            f"{where} is {tuple(scale.shape)}, and the weight {shape}; expected one number, one a"
            f" row, or one a block of {BLOCK}."
        )
    form = "" if scale.ndim == 0 else " by row" if sizes is None else f" by {sizes[0]}x{sizes[1]}"
    kind = FP8.get(stored.dtype, str(stored.dtype).removeprefix("torch."))
    encoding = Scaled(f"{kind} scaled{form}", scale, sizes)
    return dataclasses.replace(stored, encoding=encoding)


def _block(shape: tuple[int, ...], scales: tuple[int, ...], said: Any) -> tuple[int, int] | None:
    """Rows and columns of a block; None where these scales are of no blocks."""
    sizes = [said] if isinstance(said, int) and said > 0 else [BLOCK, 64, 32, 256]
    for size in sizes:
        if all(-(-n // size) == m for n, m in zip(shape, scales, strict=True)):
            return (size, size)
    if all(m and n % m == 0 for n, m in zip(shape, scales, strict=True)):
        return (shape[0] // scales[0], shape[1] // scales[1])
    return None


def _as_noted(name: str, stored: StoredTensor, wanted: torch.dtype) -> StoredTensor:
    """A weight that a note gives a format: bytes are numbers of it."""
    if stored.dtype == wanted:
        return stored
    if stored.dtype == torch.uint8 and wanted.itemsize == 1:
        return dataclasses.replace(stored, dtype=wanted)
    raise ModelError(
        f"{stored.path}: {cut(name, 120)} is stored as"
        f" {str(stored.dtype).removeprefix('torch.')}, and its note says"
        f" {str(wanted).removeprefix('torch.')}; get the file again."
    )
