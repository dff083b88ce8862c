"""Exported programs as ONNX graphs, weights beside them (`.onnx` and `.onnx.data`)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexus_rt.core.errors import InputError
from nexus_rt.engines import onnx as backend
from nexus_rt.engines.registry import here
from nexus_rt.export import contract
from nexus_rt.export.dynamic_shapes import Traced

if TYPE_CHECKING:
    from nexus_rt.export.build import Target

OPSETS = (23, 20)  # 23 has Attention and RMSNormalization; 20 is for consumers that lack them


def check_packages() -> None:
    """Raise an `InputError` unless ONNX graphs can be written here."""
    absent = [p for p in ("onnx", "onnxscript", "onnxruntime") if find_spec(p) is None]
    if absent:
        raise InputError(
            f"{', '.join(absent)} not installed (pip install 'nexus-rt[onnx]').",
            code="missing_package",
        )


def check_target(target: Target) -> None:
    """Raise an `InputError` unless an ONNX engine can be made here."""
    check_packages()
    if target.opset not in OPSETS:
        raise InputError(
            f"opset is {target.opset}; expected one of {', '.join(map(str, OPSETS))}.",
            param="opset",
        )
    if target.precision == "bf16" and target.device.type == "cpu":
        raise InputError(
            "ONNX Runtime computes no bfloat16 on a CPU; use --precision fp32.",
            code="unsupported",
            param="precision",
        )
    if why := backend.provider_absent(target.device.type):
        raise InputError(f"{why}.", code="unsupported", param="device")


def version(target: Target) -> str:
    installed = backend.version()
    assert installed is not None  # by `check_packages`
    return installed


def built_for(target: Target) -> dict[str, Any]:
    """The device of the manifest."""
    return {**here(target.device), "sm": None}  # a graph, not code: any GPU's runtime reads it


def can_run() -> bool:
    """Whether engines can be compared here: where one can be built, it can."""
    return True


def build(graph: str, traced: Traced, folder: Path, target: Target) -> None:
    """Write `graph`.onnx into a folder and check it; errors as `write`."""
    write(graph, traced, folder, target.opset)
    if target.precision == "int8" and graph == "velocity":  # what runs at every step
        quantise(folder / f"{graph}.onnx")


def quantise(path: Path) -> None:
    """The blocks' products by constant matrices in int8, a scale a column, their other side
    quantised as it comes (`DynamicQuantizeLinear`, `MatMulInteger`): the form that ONNX Runtime's
    CPU kernels speed up. Matrices alone behind `DequantizeLinear` it widens at every run.

    Embeddings (`Gemm` here), the head, which is the last, and the patch embedding, the first where
    it is one product, stay as they are.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path, load_external_data=False).graph
    shapes = {i.name: list(i.dims) for i in graph.initializer}
    products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in shapes]
    head = shapes[products[-1].input[1]]
    blocks = products[shapes[products[0].input[1]][0] == head[1] : -1]
    small = path.with_name(f"small-{path.name}")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it advises to pre-process, which is done
    try:
        quantize_dynamic(
            path,
            small,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=[n.name for n in blocks],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.getLogger().setLevel(level)
    model = onnx.load(small)
    for old in (path, path.with_name(f"{path.name}.data"), small):
        old.unlink()
    small.with_name(f"{small.name}.data").unlink(missing_ok=True)
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{path.name}.data",
    )
    path.with_name(f"{path.name}.data").chmod(path.stat().st_mode)  # the library's is its own
    onnx.checker.check_model(str(path))


def _publish(model: Any, names: dict[str, str]) -> None:
    """Give dynamic axes their names, and leave out what tells of the machine that traced the graph:
    nodes' metadata holds source paths and makes most of the file."""
    import onnx_ir as ir

    def named(value: Any) -> None:
        shape: Any = getattr(value, "shape", None)
        for axis, dim in enumerate(() if shape is None else shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                shape[axis] = ir.SymbolicDim(contract.rename(str(dim.value), names))

    model.metadata_props.clear()
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            named(value)
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                named(value)
                value.metadata_props.clear()


def write(graph: str, traced: Traced, folder: Path, opset: int) -> None:
    """An exported program as `graph`.onnx and `graph`.onnx.data.

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
                traced.program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=True,
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
            )
            assert program is not None  # None is of the exporter before dynamo
            _publish(program.model, contract.symbols(traced))
            program.save(str(path), external_data=True)
            # the exporter keeps graphs, and with them weights
            for initializer in program.model.graph.initializers.values():
                initializer.const_value = None
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    onnx.checker.check_model(str(path), full_check=True)
