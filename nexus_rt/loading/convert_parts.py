"""The parts of a converted checkpoint, written in diffusers' layout: transformer, text encoder,
VAE; the account of what became of every key; and the folder that appears only when it is
complete."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.core.part_files import part_folder
from nexus_rt.loading.config import write_json
from nexus_rt.loading.formats.safetensors import write_shards
from nexus_rt.loading.formats.stored import StoredTensor, read_tensors
from nexus_rt.loading.layouts import t5_name, vae_name
from nexus_rt.loading.names import is_spare, refuse_unused
from nexus_rt.loading.tensors import find_tensors, renamed
from nexus_rt.loading.umt5 import umt5_settings
from nexus_rt.loading.vae import diffusers_vae, vae_config
from nexus_rt.models.umt5 import SHARED, TIED
from nexus_rt.models.wan_config import WanConfig


@dataclass
class Report:
    """What became of every key, by source file."""

    used: dict[str, int] = field(default_factory=dict)
    overridden: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    # source -> what was absent, or which form it had
    notes: dict[str, str] = field(default_factory=dict)

    def add(
        self, source: str, used: int, overridden: Iterable[str] = (), unused: Iterable[str] = ()
    ) -> None:
        self.used[source] = used
        for kept, names in ((self.overridden, overridden), (self.unused, unused)):
            if listed := sorted(names):
                kept[source] = listed

    def __str__(self) -> str:
        lines = []
        for source, count in self.used.items():
            over, left = self.overridden.get(source, []), self.unused.get(source, [])
            extra = [f"{len(over)} overridden by the whole model's"] if over else []
            extra += (
                [f"{len(left)} unused ({', '.join(left[:3])}{', ...' if len(left) > 3 else ''})"]
                if left
                else []
            )
            lines.append(f"{source}: {count} used" + "".join(f", {e}" for e in extra))
        lines += [f"{source}: {note}" for source, note in self.notes.items()]
        return "\n".join(lines)


def check_shapes(
    source: Path, got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise unless every wanted tensor is there with its shape."""
    lost = sorted(wanted.keys() - got.keys())
    if lost:
        absent = "" if source.exists() else " is missing, and what is there"
        raise ModelError(
            f"{source}{absent} lacks {len(lost)} tensors ({', '.join(lost[:3])}); get the published"
            " files again.",
            code="missing" if source.exists() else "not_found",
        )
    for name, shape in wanted.items():
        if got[name] != tuple(shape):
            raise ModelError(
                f"{source}: {name} has shape {got[name]}; expected {tuple(shape)}.", code="mismatch"
            )


def transformer_config(config: WanConfig) -> dict:
    """diffusers' `config.json` of a text-to-video Wan transformer."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    extra = {
        "_class_name": "WanTransformer3DModel",
        "qk_norm": "rms_norm_across_heads",
        "added_kv_proj_dim": None,
        "image_dim": None,
    }
    return {**extra, **fields}


def write_transformer(
    folder: Path, config: WanConfig, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """A transformer's folder, of tensors in diffusers' names."""
    write_shards(folder, "diffusion_pytorch_model", tensors)
    write_json(folder / "config.json", transformer_config(config))


def plain(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors as they go into a file: what was stored in fewer bits as bfloat16."""
    for name, tensor in read_tensors(stored.items()):
        encoded = stored[name].encoding is not None or tensor.dtype.itemsize == 1
        yield name, tensor.to(torch.bfloat16) if encoded else tensor


def write_part(
    folder: Path,
    stem: str,
    stored: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[int, ...]],
    source: Path,
    what: str,
    spare: Callable[[str], bool] = lambda name: False,
) -> None:
    """A part's weights, of a checkpoint in its names that holds all that is wanted.

    Args:
        spare: whether a name may be left out.

    Raises:
        ModelError: weights are missing, of other shapes, or would change what the part computes.
    """
    check_shapes(source, {k: t.shape for k, t in stored.items()}, wanted)
    refuse_unused((k for k in stored if k not in wanted and not spare(k)), source, what)
    write_shards(folder, stem, plain({k: t for k, t in stored.items() if k in wanted}))


def write_text_encoder(target: Path, source: Path, label: str, report: Report) -> None:
    """`text_encoder/`, of a UMT5 encoder's folder, or its file in any of its names."""
    from transformers import UMT5Config, UMT5EncoderModel

    stored = renamed(find_tensors(source), t5_name)
    config = UMT5Config(**umt5_settings(source))
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    wanted = {k: tuple(v.shape) for k, v in model.named_parameters()}
    if SHARED not in stored and TIED in stored:
        stored[SHARED] = stored.pop(TIED)
    folder = target / "text_encoder"
    write_part(folder, "model", stored, wanted, source, "text encoder", is_spare)
    config.save_pretrained(folder)
    report.add(label, len(wanted), unused=stored.keys() - wanted.keys())


def write_vae(target: Path, source: Path, label: str, report: Report) -> None:
    """`vae/`, of a Wan 2.1 VAE's folder, or its file in Wan's or diffusers' names."""
    stored = renamed(find_tensors(source), vae_name)
    with torch.device("meta"):
        model: Any = diffusers_vae(vae_config(source))
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    write_part(target / "vae", "diffusion_pytorch_model", stored, wanted, source, "VAE")
    model.save_config(target / "vae")
    report.add(label, len(wanted), unused=stored.keys() - wanted.keys())


@contextlib.contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when the block is left without an error.

    Raises:
        InputError: the target exists.
        ModelError: it cannot be written.
    """
    if target.exists():
        raise InputError(
            f"{target} exists; name a folder that does not, and the conversion will make it.",
            param="target",
        )
    try:
        with part_folder(target) as part:
            yield part
    except OSError as error:
        raise ModelError(
            f"{target} cannot be written ({error.strerror or error}); free some space or choose"
            " another place.",
            code="not_writable",
            param="target",
        ) from error
