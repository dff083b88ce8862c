"""From an engine folder to an engine: what is here, what the folder was built for, and whether they match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nexus_rt.engines.exported import ExportedEngine
from nexus_rt.engines.folder import MANIFEST, EngineFolder
from nexus_rt.errors import ModelError, choose

BACKENDS = ("onnx", "aoti", "tensorrt", "tensorrt-rtx")


def here(device: torch.device) -> dict[str, Any]:
    """A device as manifests describe it."""
    if device.type != "cuda":
        return {"type": device.type, "sm": None, "name": None}
    major, minor = torch.cuda.get_device_capability(device)
    return {"type": "cuda", "sm": f"{major}.{minor}", "name": torch.cuda.get_device_name(device)}


def versions() -> dict[str, str]:
    """Backends whose engines are bound to a version: that version here. ONNX graphs are not: any runtime reads them."""
    from nexus_rt.engines import aoti, tensorrt

    found = {"aoti": aoti.version(), **{b: tensorrt.version(b) for b in tensorrt.PACKAGES}}
    return {backend: version for backend, version in found.items() if version}


def engine_of(folder: EngineFolder, device: torch.device, **options: Any) -> ExportedEngine:
    """The engine of a folder, unchecked."""
    choose("backend", folder.manifest.backend, BACKENDS)
    if folder.manifest.backend == "onnx":
        from nexus_rt.engines.onnx import OnnxEngine

        return OnnxEngine(folder, device, **options)
    if folder.manifest.backend == "aoti":
        from nexus_rt.engines.aoti import AotiEngine

        return AotiEngine(folder, device, **options)
    from nexus_rt.engines.tensorrt import TensorRTEngine

    return TensorRTEngine(folder, device, **options)


def open_engine(path: str | Path, device: torch.device, force: bool = False, **options: Any) -> ExportedEngine:
    """Check an engine folder against its manifest and this machine, and open it; its weights are read on first use.

    Args:
        force: load an engine that failed its parity gate.

    Raises:
        ModelError: no engine folder, damaged files, a newer schema, another version or GPU, or parity that failed.
        InputError: a backend that cannot run here.
    """
    folder = EngineFolder.read(path)
    folder.check_here(versions(), here(device))
    folder.check_parity(force)
    folder.verify()
    return engine_of(folder, device, **options)


def open_engines(root: Path, device: torch.device, force: bool = False, **options: Any) -> dict[str, ExportedEngine]:
    """The engines "small" and "large" of a folder that `nexus-rt export` made, those that it holds.

    Raises:
        ModelError: it holds neither, or as `open_engine`.
    """
    found = {n: root / n for n in ("small", "large") if (root / n / MANIFEST).is_file()}
    if not found:
        raise ModelError(f"{root} holds no engines (small/ or large/ with a {MANIFEST}); make them with `nexus-rt export`.")
    return {name: open_engine(path, device, force, **options) for name, path in found.items()}
