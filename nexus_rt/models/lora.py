"""LoRA files merged into a transformer's weights as it is loaded: low-rank products, and plain differences.

Read are the names that publishers of Wan LoRAs use: diffusers' and PEFT's (`transformer.blocks.0.attn1.to_q.lora_A.weight`),
Wan's own (`diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `.alpha`, `.diff`, `.diff_b`, and `.diff_m` of the
modulation tables), and kohya's (`lora_unet_blocks_0_self_attn_q.lora_down.weight`). Merging costs nothing at a step, and an
engine can be exported of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nexus_rt.errors import InputError, ModelError
from nexus_rt.models.checkpoint import diffusers_name, diffusers_shapes, fused_place, read_header, read_tensors

ENDINGS = {  # of a key -> what it is, and what is missing of the parameter's name
    ".lora_A.weight": ("down", ".weight"), ".lora_A.default.weight": ("down", ".weight"),
    ".lora_B.weight": ("up", ".weight"), ".lora_B.default.weight": ("up", ".weight"),
    ".lora_down.weight": ("down", ".weight"), ".lora_up.weight": ("up", ".weight"), ".alpha": ("alpha", ".weight"),
    ".diff": ("add", ".weight"), ".diff_b": ("add", ".bias"), ".diff_m": ("add", ".modulation"),
}  # fmt: skip
PREFIX = re.compile(r"^(base_model\.model\.|diffusion_model\.|transformer\.|model\.)+")
KOHYA = (  # underscores that were dots, where names have none of their own
    (r"^lora_unet_", ""), (r"^blocks_(\d+)_", r"blocks.\1."), (r"(self_attn|cross_attn)_([qkvo])$", r"\1.\2"),
    (r"ffn_(\d)$", r"ffn.\1"), (r"^(text|time)_(embedding|projection)_(\d)$", r"\1_\2.\3"), (r"^head_head$", "head.head"),
)  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """A LoRA file and how strongly it is merged."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str | Path) -> Lora:
        """ "FILE" or "FILE@SCALE".

        Raises:
            InputError: no such safetensors file, or a scale that is no number.
        """
        name, at, scale = str(text).rpartition("@")
        if not at or Path(text).expanduser().is_file():
            name, scale = str(text), "1"
        try:
            found = cls(Path(name).expanduser(), float(scale))
        except ValueError:
            raise InputError(
                f"LoRA {text}: {scale!r} is no scale; expected FILE@SCALE, such as distill.safetensors@0.8."
            ) from None
        if not found.path.is_file() or found.path.suffix != ".safetensors":
            raise InputError(f"LoRA {found.path} is not a safetensors file here; expected FILE or FILE@SCALE.")
        return found


LoraSource = str | Path | Lora | Sequence[str | Path | Lora]


def parse_loras(said: LoraSource) -> tuple[Lora, ...]:
    """One LoRA or several, each as `Lora.parse` reads it."""
    several = [said] if isinstance(said, (str, Path, Lora)) else said
    return tuple(s if isinstance(s, Lora) else Lora.parse(s) for s in several)


def loras_hash(loras: Mapping[str, Sequence[Lora]]) -> str | None:
    """A hash of what is merged into which generator: contents, scales and order. None where nothing is."""
    if not any(loras.values()):
        return None
    said = {}
    for name, files in loras.items():
        said[name] = [(hashlib.sha256(lora.path.read_bytes()).hexdigest(), lora.scale) for lora in files]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _place(key: str) -> tuple[str, str] | None:
    """The parameter, in diffusers' names, that a stored key changes, and what it is to it; None for an unknown one."""
    for ending, (kind, rest) in ENDINGS.items():
        if key.endswith(ending):
            name = PREFIX.sub("", key[: -len(ending)])
            if name.startswith("lora_unet_"):
                for pattern, replacement in KOHYA:
                    name = re.sub(pattern, replacement, name)
            return diffusers_name(name + rest), kind
    return None


def _changes(lora: Lora) -> dict[str, dict[str, Tensor]]:
    """Parameter in diffusers' names -> "down" and "up" (and "alpha") of a product, and/or "add"."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in read_tensors(read_header(lora.path).items()):
        if (place := _place(key)) is None:
            unknown.append(key)
        else:
            found.setdefault(place[0], {})[place[1]] = tensor.clone()
    if unknown:
        raise ModelError(
            f"{lora.path}: {len(unknown)} of its keys are none of a LoRA's, such as {sorted(unknown)[0]}; expected names that "
            f"end in {', '.join(ENDINGS)}."
        )
    return found


def _delta(parts: dict[str, Tensor], shape: tuple[int, ...], device: torch.device, where: str) -> Tensor:
    """What is added to a parameter of `shape`, float32 [*shape]; where: for errors."""
    total = torch.zeros(shape, device=device)
    if "add" in parts:
        if parts["add"].numel() != total.numel():
            raise ModelError(f"{where} is {tuple(parts['add'].shape)}, and the model's {shape}.")
        total += parts["add"].to(device, torch.float32).view(shape)
    if parts.keys() & {"down", "up"}:
        if not {"down", "up"} <= parts.keys():
            raise ModelError(f"{where}: only one half of its product is there; download the file again.")
        down, up = (parts[k].to(device, torch.float32).flatten(1) for k in ("down", "up"))
        if up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != (shape[0], total[0].numel()):
            raise ModelError(f"{where} is {tuple(up.shape)} times {tuple(down.shape)}, and the model's {shape}.")
        strength = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
        total += strength * (up @ down).view(shape)
    return total


@torch.no_grad()
def merge(model: nn.Module, lora: Lora) -> int:
    """Add a LoRA to a Wan transformer's weights, in float32 a parameter at a time; returns how many it changed.

    A product adds `scale * alpha / rank * up @ down` (alpha: the rank where none is stored), a difference `scale * diff`.

    Raises:
        ModelError: a damaged file, keys that are none of a LoRA's or of this architecture, halves or shapes that do not
            fit. Nothing has been changed then, or the model is not to be used.
    """
    changes, expected, places = _changes(lora), diffusers_shapes(model), dict(model.named_parameters())
    if strange := sorted(changes.keys() - expected.keys()):
        raise ModelError(
            f"{lora.path} changes {len(strange)} parameters that this model has not, such as {strange[0]}; it was made for "
            "another architecture."
        )
    for name, parts in changes.items():
        target, rows = fused_place(name, lambda n: tuple(places[n].shape))
        place = places[target] if rows is None else places[target][rows]
        delta = _delta(parts, expected[name], place.device, f"{lora.path}: {name}")
        place.copy_(place.float() + lora.scale * delta)
    return len(changes)
