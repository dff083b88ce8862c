"""From an engine folder to an engine: what is here, what the folder was built for, and whether they
match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.cpu import instruction_sets
from nexus_rt.core.errors import ModelError, choose
from nexus_rt.engines import aoti
from nexus_rt.engines.backends import ENGINE_BACKENDS
from nexus_rt.engines.exported_engine import ExportedEngine, Sessions
from nexus_rt.engines.folder import MANIFEST, EngineFolder
from nexus_rt.engines.text_vae import EngineDecoder, EngineTextEncoder
from nexus_rt.method.step import EXPERTS

GENERATORS = ("small", "small-high", "small-low", "large", "large-high", "large-low")
PARTS = (*GENERATORS, "vae", "text_encoder")


def here(device: torch.device) -> dict[str, Any]:
    """A device as manifests describe it."""
    if device.type != "cuda":
        return {"type": device.type, "sm": None, "name": None}
    major, minor = torch.cuda.get_device_capability(device)
    return {"type": "cuda", "sm": f"{major}.{minor}", "name": torch.cuda.get_device_name(device)}


def versions() -> dict[str, str]:
    """Backends whose engines are bound to a version: that version here. ONNX graphs are not: any
    runtime reads them."""
    from nexus_rt.engines import tensorrt

    installed = {"aoti": aoti.version(), **{b: tensorrt.version(b) for b in tensorrt.PACKAGES}}
    return {backend: version for backend, version in installed.items() if version}


def sessions_of(folder: EngineFolder, device: torch.device, **options: Any) -> Sessions:
    """The sessions of a folder's backend."""
    choose("backend", folder.manifest.backend, ENGINE_BACKENDS)
    return ENGINE_BACKENDS[folder.manifest.backend].open(folder, device, **options)


def engine_of(folder: EngineFolder, device: torch.device, **options: Any) -> Any:
    """The engine of a folder, as its part asks: a generator, a decoder or a text encoder;
    unchecked."""
    sessions = sessions_of(folder, device, **options)
    if folder.manifest.part == "vae":
        return EngineDecoder(sessions)
    if folder.manifest.part == "text_encoder":
        return EngineTextEncoder(sessions, folder.path.parent / "tokenizer")
    return ExportedEngine(sessions)


def open_engine(path: str | Path, device: torch.device, force: bool = False, **options: Any) -> Any:
    """Check an engine folder against its manifest and this machine, and open it; its weights are
    read on first use.

    Args:
        force: load an engine that failed its parity gate.

    Returns:
        What `engine_of` makes of it.

    Raises:
        ModelError: no engine folder, damaged files, a newer schema, another version or GPU, or
            parity that failed.
        InputError: a backend that cannot run here.
    """
    folder = EngineFolder.read(path)
    folder.check_here(versions(), {**here(device), "instruction_sets": instruction_sets() or None})
    folder.check_parity(force)
    folder.verify()
    return engine_of(folder, device, **options)


def open_engines(
    root: Path, device: torch.device, force: bool = False, **options: Any
) -> dict[str, Any]:
    """The engines of a folder that `nexus-rt export` made, by part; "small" or "large", or both
    experts of one, at least.

    Raises:
        ModelError: it holds neither, one expert without the other, or as `open_engine`.
    """
    folders = {n: root / n for n in PARTS if (root / n / MANIFEST).is_file()}
    for name in folders:
        generator, _, expert = name.partition("-")
        lost = [f"{generator}-{e}" for e in EXPERTS if expert and f"{generator}-{e}" not in folders]
        if lost:
            raise ModelError(
                f"{root} holds {name}/ and not {lost[0]}/, the other expert; export both again.",
                code="missing",
                param=lost[0],
            )
    if not folders.keys() & set(GENERATORS):
        raise ModelError(
            f"{root} holds no engines (small/ or large/ with a {MANIFEST}); make them with"
            " `nexus-rt export`.",
            code="not_found",
        )
    for name, path in folders.items():
        if (part := EngineFolder.read(path).manifest.part) != name:
            raise ModelError(
                f"{path} holds the {part} engine; expected {name}: put the folders back under their"
                " parts' names.",
                code="mismatch",
                param="part",
            )
    return {name: open_engine(path, device, force, **options) for name, path in folders.items()}
