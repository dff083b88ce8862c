"""TensorRT and TensorRT for RTX: one module, the package that is installed is the only difference.

A profile a size. All graphs share one block of activation memory, which the engine asks of PyTorch
and gives back when it is unloaded; launches go to PyTorch's current stream, so a step needs no
synchronisation and can be captured.

An execution context belongs to one CUDA graph at most: a context that is given another shape or
profile may change what its earlier graph reads (the developer guide, "CUDA Graphs"). A recording
makes contexts of its own, a graph and its shapes each, and holds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.devices import held_by_recording, on_device
from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.exported_engine import Sessions

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
DISTRIBUTIONS = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt-rtx", "tensorrt_rtx")}
INSTALL = {
    "tensorrt": "its wheels are in the vendor's own package index, not in the public one",
    "tensorrt-rtx": "pip install tensorrt-rtx",
}


def version(backend: str) -> str | None:
    """The installed version of a backend's package; None where it is not installed."""
    for name in DISTRIBUTIONS[backend]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def package(backend: str) -> ModuleType:
    """The Python package of "tensorrt" or "tensorrt-rtx".

    Raises:
        InputError: it is not installed, or is the stub that has no library.
    """
    if find_spec(PACKAGES[backend]) is None:
        raise InputError(
            f"{backend} is not installed ({INSTALL[backend]}).",
            code="missing_package",
            param="backend",
        )
    try:
        module = import_module(PACKAGES[backend])
        module.Builder  # noqa: B018 (the stub package lacks it)
    except (ImportError, OSError, AttributeError) as error:
        raise InputError(
            f"{backend} is installed without its libraries ({error}); {INSTALL[backend]}.",
            code="missing_package",
            param="backend",
        ) from None
    return module


def logger(trt: ModuleType, kept: list[str]) -> Any:
    """A TensorRT logger that keeps errors."""

    # the module is found when it is asked for
    class Kept(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                kept.append(message)

    return Kept()


# of one run at most, what a profile is for: a sample and its unconditional twin. More are run in
# turn
SAMPLES = 2


@dataclass(eq=False)
class Context:
    """An execution context on its activation memory. shapes: of its inputs, where it is of one
    recording alone; profile: the one it is set to."""

    sessions: TensorRTSessions
    graph: str
    execution: Any
    memory: Tensor
    shapes: tuple | None = None
    profile: int | None = None


class TensorRTSessions(Sessions):
    """Execution contexts of all graphs on one block of activation memory.

    weight_budget: bytes of the weights that stay on the GPU, the rest streamed at every step;
        engines built with weight streaming only.
    """

    most = SAMPLES

    def __init__(self, folder, device: torch.device, weight_budget: int | None = None) -> None:
        super().__init__(folder, device)
        if device.type != "cuda":
            raise InputError(
                f"{folder.manifest.backend} engines run on a CUDA device, and this is"
                f" {device.type}.",
                code="unsupported",
                param="device",
            )
        self.trt = package(folder.manifest.backend)
        self.weight_budget = weight_budget
        self.errors: list[str] = []
        sizes = {
            g: folder.manifest.files.get(f"{g}.engine", {"bytes": 0})["bytes"] for g in self.graphs
        }
        self.largest = max(sizes, key=sizes.__getitem__)  # the one whose weights a budget is for
        self.buckets = [ClipSize(*b).latent for b in folder.manifest.buckets]
        self.logger = logger(self.trt, self.errors)
        self.engines: dict[str, Any] = {}
        self.contexts: dict[str, Context] = {}
        self.memory: Tensor | None = None

    @property
    def resident(self) -> bool:
        return bool(self.contexts)

    def load(self) -> None:
        with on_device(self.device):
            self._load()

    def _load(self) -> None:
        if self.contexts:
            return
        runtime = self.trt.Runtime(self.logger)
        for graph in self.graphs:
            engine = runtime.deserialize_cuda_engine(
                (self.folder.path / f"{graph}.engine").read_bytes()
            )
            if engine is None:
                message = self.errors[-1] if self.errors else "no message"
                raise ModelError(
                    f"{self.folder.path} cannot be loaded here ({message}); {self.folder.rebuild()}"
                )
            if self.weight_budget is not None and graph == self.largest:
                engine.weight_streaming_budget_v2 = min(
                    self.weight_budget, engine.streamable_weights_size
                )
            self.engines[graph] = engine
        size = max(e.device_memory_size_v2 for e in self.engines.values())
        self.memory = torch.empty(max(1, size), dtype=torch.uint8, device=self.device)
        self.contexts = {graph: self.new_context(graph) for graph in self.engines}

    def new_context(self, graph: str, shapes: tuple | None = None) -> Context:
        """An execution context of a graph, in the memory that all share."""
        assert self.memory is not None
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        execution = self.engines[graph].create_execution_context(strategy)
        execution.set_device_memory(self.memory.data_ptr(), self.memory.numel())
        return Context(self, graph, execution, self.memory, shapes)

    def _context_for(self, graph: str, inputs: dict[str, Tensor]) -> Context:
        """The context of a run: a recording's own for these shapes, made as it is warmed up."""
        held = held_by_recording()
        if held is None:
            return self.contexts[graph]
        shapes = tuple(tuple(t.shape) for t in inputs.values())
        for own in held:
            mine = isinstance(own, Context) and own.sessions is self
            if mine and (own.graph, own.shapes) == (graph, shapes):
                return own
        held.append(self.new_context(graph, shapes))
        return held[-1]

    def unload(self) -> None:
        torch.cuda.current_stream(self.device).synchronize()
        self.contexts, self.engines, self.memory = {}, {}, None
        torch.cuda.empty_cache()

    def _profile_of(self, graph: str, inputs: dict[str, Tensor]) -> int:
        """Which profile holds these inputs: the latents' size decides, frames aside where a graph
        takes one at a time."""
        if "latents" not in inputs or self.folder.manifest.options.get("range"):
            return 0
        size = tuple(inputs["latents"].shape[2:])
        same = [i for i, b in enumerate(self.buckets) if b == size] or [
            i for i, b in enumerate(self.buckets) if b[1:] == size[1:]
        ]
        return same[0]

    def run(self, graph: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        with on_device(self.device):  # an engine enqueues to the GPU that is the current one
            self._run(graph, inputs, outputs)

    def _run(self, graph: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        own, profile = self._context_for(graph, inputs), self._profile_of(graph, inputs)
        context = own.execution
        if own.profile != profile:
            context.set_optimization_profile_async(profile, stream)
            own.profile = profile
        for name, t in inputs.items():
            if not context.set_input_shape(name, tuple(t.shape)):
                raise InputError(
                    f"{self.folder.path}: {name} of shape {tuple(t.shape)} is outside the engine's"
                    " profile.",
                    code="out_of_range",
                    param=name,
                )
        for name, t in (*inputs.items(), *outputs.items()):
            context.set_tensor_address(name, t.data_ptr())
        if not context.execute_async_v3(stream):
            message = self.errors[-1] if self.errors else "no message"
            raise ModelError(f"{self.folder.path} failed to run: {message}", code="failed")
