"""Which matrices of a transformer stay in fewer bits as it is loaded, and which do not.

"small" keeps what a checkpoint stores in 8 bits or fewer as it is stored; "int8" and "fp8" quantise
every matrix of the blocks, a scale a row, after LoRAs are merged; "int8-dynamic" and "fp8-dynamic"
quantise the activations as well. Embeddings, norms, modulation tables, the patch embedding and the
head stay as they are, and under "fp8-dynamic" the first and the last block, whose errors every
block after sees, or nothing mends; "fp8-dynamic-all" quantises them too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nexus_rt.core.devices import dtype_name
from nexus_rt.core.errors import InputError, ModelError, choose
from nexus_rt.loading.finite import check_finite, check_kept
from nexus_rt.loading.formats.stored import StoredTensor
from nexus_rt.loading.layouts import fused_parts
from nexus_rt.loading.scales import FP8
from nexus_rt.models.encodings import Scaled
from nexus_rt.models.layers import Linear
from nexus_rt.models.quantized import QuantizedLinear, Rows, quantise

WEIGHTS = (
    "dense",
    "small",
    "int8",
    "int8-dynamic",
    "fp8",
    "fp8-dynamic",
    "fp8-dynamic-all",
)
EDGES_DENSE = "fp8-dynamic"
BLOCKS = "blocks."  # matrices outside are few, and what they do is felt everywhere


@dataclasses.dataclass
class Packing:
    """How a transformer's matrices are kept, and those that have been read.

    kind: of `WEIGHTS`, but for "dense". changes: as in `fill`. source: for errors.
    """

    kind: str
    source: Path
    changes: Callable[[str, Tensor], Tensor] | None = None
    read: dict[str, dict[str, Rows]] = dataclasses.field(default_factory=dict)

    def places(self, model: nn.Module, stored: Mapping[str, StoredTensor]) -> set[str]:
        """Our names of the matrices that stay in fewer bits.

        Raises:
            ModelError: "small" asked of a checkpoint that stores none so.
        """
        found: set[str] = set()
        for name, module in model.named_modules():
            if not isinstance(module, Linear) or not name.startswith(BLOCKS):
                continue
            if self.kind == EDGES_DENSE and name.startswith(_edges(model)):
                continue
            parts = fused_parts(f"{name}.weight")
            small = lambda t: t.dtype.itemsize == 1 and len(t.shape) == 2
            if self.kind != "small" or all(small(stored[p]) for p in parts):
                found.add(f"{name}.weight")
        if not found:
            raise ModelError(
                f"{self.source} stores no matrix in 8 bits or fewer, which weights 'small' keeps;"
                " pass weights 'int8' or 'fp8' to quantise it, or leave it out.",
                code="unsupported",
                param="weights",
            )
        return found

    def keep(
        self,
        model: nn.Module,
        target: str,
        name: str,
        stored: StoredTensor,
        raw: Tensor,
        device: torch.device,
    ) -> None:
        """Take a stored matrix, as it lies in the file; a layer whose parts are all there gets its
        place."""
        if self.kind == "small":
            check_kept(name, stored, raw)
            encoding = stored.encoding or Scaled(FP8[stored.dtype], torch.ones(()))
            rows = Rows(
                raw.view(stored.shape[0], -1).to(device, copy=True), encoding, stored.shape[0]
            )
        else:
            value = stored.decoded(raw).to(device)
            value = self.changes(name, value) if self.changes is not None else value
            check_finite(name, stored, value, value)
            rows = quantise(value, quantised_as(self.kind))
        if isinstance(rows.encoding, Scaled):
            scale = rows.encoding.scale.to(device)
            rows = dataclasses.replace(
                rows, encoding=dataclasses.replace(rows.encoding, scale=scale)
            )
        self.read.setdefault(target, {})[name] = rows
        order = fused_parts(target)
        if len(self.read[target]) == len(order):  # at once, so that no part is held twice
            parts = self.read.pop(target)
            path, ordered = target.removesuffix(".weight"), [parts[n] for n in order]
            _put(model, path, ordered, "-dynamic" in self.kind)


def _put(model: nn.Module, path: str, rows: list[Rows], activations: bool) -> None:
    """A quantised layer where its matrix was; its bias, which may be read later, stays where it
    is."""
    layer = model.get_submodule(path)
    made = QuantizedLinear(
        rows,
        layer.in_features,  # type: ignore[arg-type]
        layer.bias.detach(),  # type: ignore[union-attr, operator]
        activations,
    )
    model.set_submodule(path, made)


def pack_model(model: nn.Module, kind: str) -> None:
    """Quantise the matrices of a model in memory, as one is that is loaded with these weights.

    kind: of `WEIGHTS`, but for "dense" and "small".
    """
    for target in Packing(kind, Path()).places(model, {}):
        path = target.removesuffix(".weight")
        rows = [quantise(model.get_submodule(path).weight.detach(), quantised_as(kind))]  # type: ignore[union-attr, operator, arg-type]
        _put(model, path, rows, "-dynamic" in kind)


def _edges(model: nn.Module) -> tuple[str, ...]:
    """How names in the first and the last of three blocks or more begin."""
    last = len(model.blocks) - 1  # type: ignore[arg-type]
    return (f"{BLOCKS}0.", f"{BLOCKS}{last}.") if last > 1 else ()


def quantised_as(kind: str) -> str:
    """The format that a kind of weights is quantised to: "int8" or "fp8"."""
    return kind.partition("-")[0]


def check_weights(kind: str) -> str:
    """A name of `WEIGHTS`.

    Raises:
        InputError: there is none of that name.
    """
    return choose("weights", kind, WEIGHTS)


def formats_of(model: nn.Module) -> dict[str, int]:
    """How many matrices of a transformer's blocks are kept in which format; those that are not
    quantised under their dtype."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            key = " + ".join(dict.fromkeys(module.formats))
        elif isinstance(module, Linear):
            kind = dtype_name(module.weight.dtype)
            key = kind if name.startswith(BLOCKS) else f"{kind} outside the blocks"
        else:
            continue
        counts[key] = counts.get(key, 0) + 1
    return counts


def left_dense(model: nn.Module) -> list[str]:
    """Names of a transformer's linear layers that are not quantised."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear)]


def check_dense(model: nn.Module) -> None:
    """Raise an `InputError` where a transformer holds quantised layers."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            raise InputError(
                f"it is of dense weights, and {name} is kept in {module.formats[0]}; leave"
                " --weights and --quantize out",
                code="conflict",
                param="weights",
            )
