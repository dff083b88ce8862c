"""Exported programs compiled by AOTInductor into `.pt2` packages."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from nexus_rt.engines import aoti as backend
from nexus_rt.export.graph import Traced


def cannot_build(precision: str, device: torch.device) -> str | None:
    """Why no AOTInductor engine can be made here; None where it can."""
    from torch._inductor import cpp_builder

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except Exception as error:  # PyTorch's own error type moves between versions
        return f"AOTInductor needs a C++ compiler ({str(error).splitlines()[0]})"
    return None if shutil.which(compiler) else f"AOTInductor needs a C++ compiler, and {compiler} is not on PATH"


def version() -> str:
    return backend.version()


def build(graph: str, traced: Traced, folder: Path, opset: int) -> None:
    """Compile `graph`.pt2 into a folder."""
    torch._inductor.aoti_compile_and_package(traced.program, package_path=str(folder / f"{graph}.pt2"))
