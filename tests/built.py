"""What tests build from the sources: kept for the next run and shared by all processes."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import time
from functools import cache
from importlib import metadata
from pathlib import Path

from nexus_rt.core.cpu import instruction_sets

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("nexus_rt", "kernels", "export", "tests/conftest.py")
PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numpy")
MAX_STATES = 3  # of the sources,
MIN_AGE_S = 3600.0  # beside those that a run may still use
COMPLETE = ".complete"


@cache
def state() -> str:
    """A hash of the sources, of what compiles them and of the processor that runs the result."""
    made_by = [sys.version, platform.machine(), *sorted(instruction_sets())]
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            made_by.append(f"{name} {metadata.version(name)}")
    digest = hashlib.sha256("\n".join(made_by).encode())
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def store() -> Path:
    """The user's folder of all states, below the system's temporary folder."""
    path = Path(tempfile.gettempdir()) / f"nexus-rt-tests-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    assert path.stat().st_uid == os.getuid(), f"{path} belongs to another user"
    return path


@cache
def folder() -> Path:
    """The folder of this state. Beyond `MAX_STATES` the oldest states are removed."""
    own = store() / state()
    with locked(store() / ".lock"):
        own.mkdir(exist_ok=True)
        os.utime(own)
        states = [p for p in store().iterdir() if p.is_dir()]
        for old in sorted(states, key=lambda p: p.stat().st_mtime)[:-MAX_STATES]:
            if time.time() - old.stat().st_mtime > MIN_AGE_S:
                shutil.rmtree(old, ignore_errors=True)
    return own


def once(name, make) -> Path:
    """The folder `name` of this state, filled by `make(path)` in the first process that wants
    it."""
    path = folder() / name
    with locked(folder() / f".{name}.lock"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            make(path)
            (path / COMPLETE).touch()
    return path
