"""Installed versions of the packages that decide what runs and what a clip looks like."""

from __future__ import annotations

from importlib import metadata

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "diffusers",
    "safetensors",
    "numpy",
    "av",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
)


def versions() -> dict[str, str | None]:
    """Installed versions; None for a package that is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions
