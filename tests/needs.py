"""Tools that a test needs. Where one is missing the test is skipped with the name of the extra."""

import shutil
from importlib.metadata import version
from importlib.util import find_spec

import pytest

EXTRAS = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "tensorrt_rtx": "tensorrt-rtx",
    "ray": "ray",
    "starlette": "serve",
    "optuna": "tune",
    "mkdocs": "docs",
    "mkdocstrings": "docs",
    "gguf": "test",
    "openai": "test",
    "triton": "test",
    "fastapi": "dev",
    "mypy": "dev",
    "playwright": "dev",
    "setuptools": "dev",
}

MINIMUM = {
    "triton": (3, 7),  # earlier interpreters run no loops with run-time bounds
    "setuptools": (77, 0),  # earlier ones read no license expression
}


def missing(*modules: str) -> str | None:
    """Why tests of these modules cannot run here. Nothing is imported."""
    absent = [name for name in modules if find_spec(name) is None or too_old(name)]
    if not absent:
        return None
    extras = ",".join(sorted({EXTRAS[name] for name in absent}))
    return f'{", ".join(absent)} not installed or too old: pip install "nexus-rt[{extras}]"'


def too_old(name: str) -> bool:
    least = MINIMUM.get(name)
    return least is not None and tuple(map(int, version(name).split(".")[:2])) < least


def needs(*modules: str) -> None:
    """Skip a test, or at the top of a file all of its tests, where a module is missing."""
    if reason := missing(*modules):
        pytest.skip(reason, allow_module_level=True)


def program(*names: str) -> str:
    """The path of the first of these programs. A test is skipped where none is installed."""
    if path := next(filter(None, map(shutil.which, names)), None):
        return path
    pytest.skip(f"no {' or '.join(names)} on PATH: it comes with the system's packages")
