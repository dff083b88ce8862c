"""What a GPU machine without a network lacks, and the wheels that bring it.

A machine that has torch, triton, numpy, safetensors, transformers, pillow and requests needs
`WHEELS` besides; without the last two, those and what requests imports too.
Imports nothing but the standard library, as it is asked before anything else is imported.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from nexus_rt.bench.failures import first_line

# package to import -> its wheel, and what is lacking without it
WHEELS = {
    "msgspec": ("msgspec-*-cp312-*.whl", "all rows but the kernels' own"),
    "diffusers": ("diffusers-*.whl", "the VAE and the peers"),
    "importlib_metadata": ("importlib_metadata-*.whl", "what diffusers requires"),
    "zipp": ("zipp-*.whl", "what importlib_metadata requires"),
    "av": ("av-*-cp312-abi3-*.whl", "the mp4"),
}
PYTHON = "3.12"
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
)
MAX_BYTES = 64 * 2**20  # of a folder that is carried
HOW = "--fetch-wheels DIR [PACKAGE ...] makes a folder of the wheels, --wheels DIR imports from it"
# a name whose import shows that a package works: diffusers imports its models when asked for them
PROBES = {"diffusers": "AutoencoderKLWan"}


def absent(package: str) -> str | None:
    """Why a package cannot be imported here, and the wheel to carry; None where it can."""
    try:
        module = importlib.import_module(package)
        if package in PROBES:
            getattr(module, PROBES[package])
    except ModuleNotFoundError as error:
        name = (error.name or package).partition(".")[0]
        if not name.isidentifier():  # a sentence, of a missing distribution
            why = first_line(error, 200)
            return f"{package} cannot be imported here: {why}; carry that wheel too: {HOW}"
        wheel = WHEELS.get(name, (f"{name}-*.whl",))[0]
        for_it = "" if name == package else f", which {package} imports,"
        return f"{name}{for_it} is not installed here; carry {wheel}: {HOW}"
    except Exception as error:  # what a package's own checks raise
        return (
            f"{package} cannot be imported here ({type(error).__name__}: {first_line(error, 200)})"
        )
    return None


def present(package: str) -> bool:
    """Whether a package is there to import, without importing it."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def shortages() -> list[str]:
    """A line a package of `WHEELS` that is not here, with the rows it costs; diffusers stands for
    what it imports."""
    lines = []
    for package in ("msgspec", "diffusers", "av"):
        if why := absent(package):
            lines.append(f"without {WHEELS[package][1]}: {why}")
    return lines


def unpack(wheels: Path) -> Path:
    """Wheels as a folder to import from; compiled ones cannot be imported as they are.

    Raises:
        SystemExit: the folder holds no wheels, or one that is damaged.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"{wheels} holds no wheels; expected *.whl: {HOW}")
    folder = wheels / "unpacked"
    for wheel in files:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        except (OSError, zipfile.BadZipFile) as error:
            raise SystemExit(f"{wheel} cannot be unpacked ({error}); fetch it again") from error
    return folder


def import_from(folder: Path) -> None:
    """Put a folder before the other places of imports, of this process and of those it starts."""
    sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(folder), os.environ.get("PYTHONPATH")])
    )


def fetch_command(folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The command that downloads `WHEELS` and more packages for the GPU machine's Python."""
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"),
        *(option for platform in PLATFORMS for option in ("--platform", platform)),
        *("-d", str(folder), *WHEELS, *more),
    ]


def fetch(folder: Path, more: Sequence[str] = ()) -> str:
    """Download `WHEELS` and more packages into a folder; returns what is in it, in a line.

    Raises:
        SystemExit: pip failed, or the folder is too large to be carried.
    """
    if subprocess.run(fetch_command(folder, more)).returncode:
        raise SystemExit(
            f"the wheels could not be downloaded into {folder}: see pip's message; this needs a"
            " machine with a network"
        )
    sizes = {f.name: f.stat().st_size for f in sorted(folder.glob("*.whl"))}
    total = sum(sizes.values())
    line = f"{folder}: {total / 2**20:.1f} MiB: {', '.join(sizes)}"
    if total > MAX_BYTES:
        raise SystemExit(
            f"{line}; expected at most {MAX_BYTES >> 20} MiB: remove wheels of other versions"
        )
    return line
