"""LoRAs as callers name them: files, how strongly each is merged, and into which expert.

They are merged into a transformer's weights as it is loaded (`nexus_rt.loading.lora_changes`):
merging costs nothing at a step, and an engine can be exported of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import torch

from nexus_rt.core.errors import InputError, choose, shorten, shown
from nexus_rt.loading.formats.safetensors import is_file
from nexus_rt.method.step import EXPERTS

PACKAGED = Path(__file__).resolve().parents[1] / "mini" / "loras"  # found by name
# as diffusers and PEFT name them
FOLDER_FILES = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
)
LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Lora:
    """A LoRA file, how strongly it is merged, and into which expert of a generator that has two
    ("high" or "low"; None: into both, or the only one).

    half: the expert that it is being merged into, which `loras_of` sets: a file may hold one LoRA
        for each.
    """

    path: Path
    scale: float = 1.0
    expert: str | None = None
    half: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, Path)):
            raise InputError(
                f"a LoRA's path is {shown(self.path)}; expected a file.",
                code="invalid_type",
                param="path",
            )
        object.__setattr__(self, "path", Path(self.path))
        number = isinstance(self.scale, Real) and not isinstance(self.scale, bool)
        if not number or not abs(self.scale) <= LARGEST:
            raise InputError(
                f"LoRA {shorten(self.path)}: scale {shown(self.scale)} is not finite in float32;"
                " expected a number, such as 0.8.",
                code="not_finite" if number else "invalid_type",
                param="scale",
            )
        if self.expert is not None:
            choose("expert", self.expert, EXPERTS)

    @classmethod
    def parse(cls, text: str | Path) -> Lora:
        """ "FILE", "FILE@SCALE" or "FILE@SCALE:EXPERT"; a folder is its one safetensors file, or
        the one that diffusers or PEFT would name; "few_step" is the mini pair's own.

        Raises:
            InputError: no such safetensors file, a scale that is no finite number, or an expert
                that is neither "high" nor "low".
        """
        if not isinstance(text, (str, Path)):
            raise InputError(
                f"a LoRA is {shown(text)}; expected FILE or FILE@SCALE.", code="invalid_type"
            )
        name, at, scale = str(text).rpartition("@")
        if not at or _is_there(_expanded(str(text))):
            name, scale = str(text), "1"
        scale, colon, expert = scale.partition(":")
        if colon:
            choose("expert", expert, EXPERTS)
        try:
            lora = cls(_expanded(name), float(scale), expert or None)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"LoRA {shorten(text)}: {shown(scale)} is no scale; expected FILE@SCALE, such as"
                " distill.safetensors@0.8.",
                param="scale",
            ) from None
        packaged = PACKAGED / f"{lora.path}.safetensors"
        there = _is_there(lora.path)
        path = _in_folder(lora.path) if there and lora.path.is_dir() else lora.path
        if not there and lora.path.name == str(lora.path) and is_file(packaged):
            path = packaged
        if not is_file(path) or path.suffix != ".safetensors":
            raise InputError(
                f"LoRA {shorten(path)} is not a safetensors file here; expected FILE or"
                " FILE@SCALE.",
                code="not_found",
                param="path",
            )
        return cls(path, lora.scale, lora.expert)


def _expanded(name: str) -> Path:
    """A path with its `~` replaced.

    Raises:
        InputError: the home of a user that is not known.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InputError(
            f"LoRA {shorten(name)}: its home folder is not known ({shorten(error)}); write the"
            f" whole path.",
            code="not_found",
            param="path",
        ) from None


def _is_there(path: Path) -> bool:
    """Whether a path exists; a name that no file can have (too long, NUL) does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _in_folder(folder: Path) -> Path:
    """The LoRA file of a folder."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        several = ", ".join(f.name for f in files[:3]) or "none"
        raise InputError(
            f"LoRA {folder} is a folder with {len(files)} safetensors files ({several}); name the"
            " one to merge.",
            param="path",
        )
    return files[0]


LoraSource = str | Path | Lora | Sequence[str | Path | Lora]


def parse_loras(source: LoraSource) -> tuple[Lora, ...]:
    """One LoRA or several, each as `Lora.parse` reads it."""
    several = [source] if isinstance(source, (str, Path, Lora)) else source
    if not isinstance(several, Sequence):
        raise InputError(
            f"loras are {shown(source)}; expected a file, or a list of files or Lora(path, scale).",
            code="invalid_type",
        )
    return tuple(s if isinstance(s, Lora) else Lora.parse(s) for s in several)


def loras_of(
    generator: str, experts: Collection[str], loras: Sequence[Lora]
) -> dict[str, list[Lora]]:
    """What is merged into each transformer of a generator: by expert, or under "" where it is one.

    Raises:
        InputError: a LoRA for an expert of a generator that has none.
    """
    for lora in loras:
        if lora.expert is not None and lora.expert not in experts:
            raise InputError(
                f"LoRA {lora.path} is for the {lora.expert}-noise expert, and the {generator}"
                f" generator is one transformer; leave :{lora.expert} out.",
                code="unsupported",
                param="expert",
            )
    return {
        name: [replace(a, half=name or None) for a in loras if a.expert in (None, name)]
        for name in experts
    }


def loras_hash(loras: Mapping[str, Sequence[Lora]]) -> str | None:
    """A hash of what is merged into which generator: contents, scales and order. None where nothing
    is."""
    if not any(loras.values()):
        return None
    content = {}
    for name, files in loras.items():
        content[name] = [
            (
                hashlib.sha256(_content(lora.path)).hexdigest(),
                lora.scale,
                *((lora.expert,) if lora.expert else ()),
            )
            for lora in files
        ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content(path: Path) -> bytes:
    """Everything that decides a LoRA's meaning: the file, and the config beside it where there is
    one."""
    beside = path.with_name("adapter_config.json")
    return path.read_bytes() + (beside.read_bytes() if beside.is_file() else b"")
