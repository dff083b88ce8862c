"""Exported programs compiled by AOTInductor into `.pt2` packages."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexus_rt.core.cpu import instruction_sets
from nexus_rt.core.errors import InputError
from nexus_rt.engines import aoti as backend
from nexus_rt.engines.registry import here
from nexus_rt.export.dynamic_shapes import Traced

if TYPE_CHECKING:
    from nexus_rt.export.build import Target


def check_target(target: Target) -> None:
    """Raise an `InputError` unless an AOTInductor engine can be made here."""
    from torch._inductor import cpp_builder

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except Exception as error:  # PyTorch's own error type moves between versions
        raise InputError(
            f"AOTInductor needs a C++ compiler ({str(error).splitlines()[0]}).",
            code="missing_package",
        ) from error
    if not shutil.which(compiler):
        raise InputError(
            f"AOTInductor needs a C++ compiler, and {compiler} is not on PATH.",
            code="missing_package",
        )


def version(target: Target) -> str:
    return backend.version()


def built_for(target: Target) -> dict[str, Any]:
    """The device of the manifest: compiled code is for one GPU architecture."""
    return here(target.device)


def options(target: Target) -> dict[str, Any]:
    """What the manifest says besides: how a package is loaded, and on a CPU the instruction sets
    its code may use."""
    options: dict[str, Any] = {"loader": backend.LOADER}
    if target.device.type == "cpu":
        options["instruction_sets"] = instruction_sets()
    return options


def can_run() -> bool:
    """Whether engines can be compared here: where one can be built, it can."""
    return True


def build(graph: str, traced: Traced, folder: Path, target: Target) -> None:
    """Compile `graph`.pt2 into a folder, its weights beside the code: linked into it they would be
    held three times."""
    apart = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.package_constants_on_disk_format": "pickle_weights",
    }
    path = str(folder / f"{graph}.pt2")
    torch._inductor.aoti_compile_and_package(
        traced.program, package_path=path, inductor_configs=apart
    )
