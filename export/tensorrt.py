"""Engines of TensorRT and TensorRT for RTX, built from ONNX in a child process.

A crash or a shortage of memory ends the child, not the product. Networks are strongly typed: a
precision is what the ONNX graph says. TensorRT for RTX builds without a GPU, for one architecture
or for all it knows, and compiles the rest where it is loaded; such an engine is complete but not
compared, and says so until a GPU has compared it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexus_rt.core.errors import InputError
from nexus_rt.engines import tensorrt as backend
from nexus_rt.engines.folder import engines_root
from nexus_rt.export import onnx
from nexus_rt.export.dynamic_shapes import Traced, concrete, size_of

if TYPE_CHECKING:
    from nexus_rt.export.build import Target

# what symbols range over in a profile: fewest, usual, most. A step has one or two samples, guided
# or not; Lumos-Nexus cuts contexts at 2560 tokens, Wan's text at 512.
RANGES = {
    "batch": (1, 2, backend.SAMPLES),
    "tokens": (2, 128, 2560),
    "words": (2, 32, 512),
}


def check_target(target: Target) -> None:
    """Raise an `InputError` unless an engine can be made here."""
    trt = backend.package(target.backend)
    onnx.check_packages()
    if target.backend == "tensorrt" and not torch.cuda.is_available():
        raise InputError(
            "TensorRT builds for the GPU that is here, and there is none (tensorrt-rtx builds"
            " without one).",
            code="unsupported",
            param="backend",
        )
    if target.sm is not None:
        if target.backend == "tensorrt":
            raise InputError(
                "TensorRT builds for the GPU that is here; --sm is for tensorrt-rtx.",
                code="conflict",
                param="sm",
            )
        known = [n for n in dir(trt.ComputeCapability) if n.startswith("SM")]
        if "SM" + target.sm.replace(".", "") not in known:
            raise InputError(
                f"tensorrt-rtx has no target {target.sm}; it has"
                f" {', '.join(f'{n[2:-1]}.{n[-1]}' for n in known)}.",
                code="unsupported",
                param="sm",
            )


def version(target: Target) -> str:
    installed = backend.version(target.backend)
    assert installed is not None  # by `check_target`
    return installed


def built_for(target: Target) -> dict[str, Any]:
    """The device of the manifest: the GPU here, or the architecture asked for (None: all that the
    package knows)."""
    if target.backend == "tensorrt":
        from nexus_rt.engines.registry import here

        return here(torch.device("cuda"))
    return {"type": "cuda", "sm": target.sm, "name": None}


def can_run() -> bool:
    """Whether engines can be compared here."""
    return torch.cuda.is_available()


def profiles(traced: Traced, target: Target) -> list[dict[str, list]]:
    """Ranges of every input whose shape is not fixed, [fewest, usual, most]: a profile a size, or
    one for a range."""
    sizes = [size_of(b) for b in target.ordered()]
    spans = [(sizes[0], sizes[-1], sizes[-1])] if target.range else [(s, s, s) for s in sizes]
    symbols = {s for shape in traced.shapes.values() for s in shape if isinstance(s, str)}
    if not any(name in s for s in symbols for name in ("rows", "columns", "frames")):
        spans = spans[:1]
    profiles = []
    for span in spans:
        values = [{**{n: r[i] for n, r in RANGES.items()}, **span[i]} for i in range(3)]
        shapes = {n: [concrete(shape, v) for v in values] for n, shape in traced.shapes.items()}
        profiles.append(
            {
                n: shapes[n]
                for n, shape in traced.shapes.items()
                if any(isinstance(d, str) for d in shape)
            }
        )
    return profiles


def build(graph: str, traced: Traced, folder: Path, target: Target) -> None:
    """Write `graph`.engine into a folder, and what its builder said into `graph`.json.

    Raises:
        RuntimeError: the builder refused the graph, crashed or was killed; with the last of what it
            said.
    """
    # float32 has no kernel for ONNX's Attention operator, only for the products and the softmax it
    # stands for
    onnx.write(graph, traced, folder, 20 if target.precision == "fp32" else target.opset)
    job = {
        "backend": target.backend,
        "onnx": str(folder / f"{graph}.onnx"),
        "engine": str(folder / f"{graph}.engine"),
        "report": str(folder / f"{graph}.json"),
        "sm": target.sm,
        "profiles": profiles(traced, target),
        "timing_cache": str(
            engines_root() / f"{target.backend}-{backend.version(target.backend)}.timing"
        ),
        "weight_streaming": target.weight_streaming,
        "refit": target.refit,
    }
    note = folder / f"{graph}.job"
    note.write_text(json.dumps(job))
    child = subprocess.run(
        [sys.executable, "-m", "nexus_rt.export.tensorrt", str(note)],
        capture_output=True,
        text=True,
    )
    if child.returncode:
        message = (child.stderr.strip() or "it said nothing").splitlines()[-1][:500]
        ended = f"was killed by signal {-child.returncode}" if child.returncode < 0 else "failed"
        raise RuntimeError(f"{target.backend}'s builder {ended} on the {graph} graph: {message}")
    for rest in (note, *folder.glob(f"{graph}.onnx*")):
        rest.unlink()


def _child(job: dict[str, Any]) -> dict[str, Any]:
    """Parse, configure, build; the child's whole life."""
    import time

    trt = backend.package(job["backend"])
    errors: list[str] = []
    log = backend.logger(trt, errors)
    builder = trt.Builder(log)
    # TensorRT 11 knows no other kind
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["onnx"]):
        raise SystemExit(
            "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            or "the parser said no"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for ranges in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in ranges.items():
            profile.set_shape(name, low, usual, high)
        config.add_optimization_profile(profile)
    if job["sm"]:
        config.num_compute_capabilities = 1
        config.set_compute_capability(
            getattr(trt.ComputeCapability, "SM" + job["sm"].replace(".", "")), 0
        )
    for flag, wanted in (("WEIGHT_STREAMING", job["weight_streaming"]), ("REFIT", job["refit"])):
        if wanted:
            if not hasattr(trt.BuilderFlag, flag):
                raise SystemExit(f"{job['backend']} {trt.__version__} has no {flag}")
            config.set_flag(getattr(trt.BuilderFlag, flag))
    timed = job["backend"] == "tensorrt"  # RTX times nothing when it builds
    file = Path(job["timing_cache"])
    if timed:
        config.set_timing_cache(
            config.create_timing_cache(file.read_bytes() if file.is_file() else b""), False
        )
    start = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise SystemExit(errors[-1].replace("\n", " ") if errors else "the builder said no")
    Path(job["engine"]).write_bytes(plan)
    if timed:
        file.write_bytes(config.get_timing_cache().serialize())
    attention = [
        network.get_layer(i).name
        for i in range(network.num_layers)
        if "ATTENTION_INPUT" in str(network.get_layer(i).type)
    ]
    return {
        "seconds": round(time.monotonic() - start, 1),
        "layers": network.num_layers,
        "bytes": plan.nbytes,
        "package": trt.__version__,
        "attention_operators": len(attention),
        **_inspected(trt, log, plan),
    }


def _inspected(trt: Any, log: Any, plan: Any) -> dict[str, Any]:
    """What the engine's inspector says of attention, where a GPU is there to load it."""
    if not torch.cuda.is_available():
        return {"attention_fused": None, "inspected": "needs a GPU"}
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return {"attention_fused": None, "inspected": "the engine cannot be loaded on this GPU"}
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    fused = sum(text.lower().count(word) for word in ("_mha", "fmha", "flash"))
    return {"attention_fused": fused > 0, "inspected": f"{fused} fused attention layers"}


if __name__ == "__main__":
    done = json.loads(Path(sys.argv[1]).read_text())
    report = _child(done)
    Path(done["report"]).write_text(json.dumps(report, indent=1) + "\n")
