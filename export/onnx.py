"""Exported programs as ONNX graphs, weights beside them (`.onnx` and `.onnx.data`)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from nexus_rt.engines import onnx as backend
from nexus_rt.export.graph import INPUTS, OUTPUTS, Traced

OPSETS = (23, 20)  # 23 has Attention and RMSNormalization; 20 is for consumers that lack them


def cannot_build(precision: str, device: torch.device) -> str | None:
    """Why no ONNX engine can be made here; None where it can."""
    absent = [p for p in ("onnx", "onnxscript", "onnxruntime") if find_spec(p) is None]
    if absent:
        return f"{', '.join(absent)} not installed (pip install 'nexus-rt[onnx]')"
    if precision == "bf16" and device.type == "cpu":
        return "ONNX Runtime computes no bfloat16 on a CPU; use --precision fp32"
    return None


def version() -> str:
    return backend.version()


def build(graph: str, traced: Traced, folder: Path, opset: int) -> None:
    """Write `graph`.onnx into a folder and check it.

    Raises:
        RuntimeError, ValueError: the exporter or the checker refused the graph.
    """
    import onnx

    path = folder / f"{graph}.onnx"
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced.program, dynamo=True, opset_version=opset, verbose=False, optimize=True,
                input_names=list(INPUTS[graph]), output_names=list(OUTPUTS[graph]),
            )  # fmt: skip
            program.save(str(path), external_data=True)
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    onnx.checker.check_model(str(path), full_check=True)
