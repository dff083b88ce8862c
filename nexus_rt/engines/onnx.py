"""ONNX Runtime, on the CPU, CUDA and TensorRT execution providers.

Tensors are bound where they lie, by address, so nothing is copied on either device and bfloat16
needs no numpy.
"""

from __future__ import annotations

import mmap
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.checks import whole
from nexus_rt.core.errors import InputError, choose
from nexus_rt.engines.exported_engine import Sessions

# onnx.TensorProto's numbers
ELEMENTS = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


def version() -> str | None:
    """The installed version of ONNX Runtime, from whichever package brings it, or None."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def why_not() -> str | None:
    """Why ONNX engines cannot run here; None where they can."""
    return (
        None
        if find_spec("onnxruntime")
        else "onnxruntime is not installed (pip install 'nexus-rt[onnx]')"
    )


PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


def provider_absent(provider: str) -> str | None:
    """Why ONNX Runtime here has no such provider of `PROVIDERS`; None where it has."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if PROVIDERS.get(provider) in available:
        return None
    return (
        f"ONNX Runtime here has no provider {provider!r}; it has {', '.join(available)}"
        " (onnxruntime-gpu brings CUDA's)"
    )


def _mapped(file: Path) -> mmap.mmap:
    """A file's bytes, read when they are used."""
    with open(file, "rb") as opened:
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)


class OnnxSessions(Sessions):
    """A session a graph.

    providers: "cpu", "cuda" or "tensorrt" execution provider; by default the device's own.
    """

    def __init__(
        self, folder, device: torch.device, provider: str | None = None, threads: int | None = None
    ) -> None:
        super().__init__(folder, device)
        if reason := why_not():
            raise InputError(f"ONNX engines cannot run here: {reason}.", code="missing_package")
        provider = choose("provider", device.type if provider is None else provider, PROVIDERS)
        if threads is not None:
            whole("threads", threads, 1, 4096)
        if reason := provider_absent(provider):
            raise InputError(f"{reason}.", code="unsupported", param="provider")
        wanted = {"cpu": ["cpu"], "cuda": ["cuda"]}.get(provider, [provider, "cuda"])
        # without a number, a session computes on the first GPU
        number = {} if provider == "cpu" else {"device_id": str(device.index or 0)}
        self.providers = [(PROVIDERS[p], number) for p in wanted]
        self.threads = torch.get_num_threads() if threads is None else threads
        self.sessions: dict[str, Any] = {}

    @property
    def resident(self) -> bool:
        return bool(self.sessions)

    def load(self) -> None:
        if self.sessions:
            return
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # ONNX Runtime opens no weights behind a link that leads out of the model's folder
        linked = [n for n in self.folder.manifest.files if n.endswith(".data")]
        linked = [n for n in linked if self.folder.artefact(n).is_symlink()]
        weights = [_mapped(self.folder.artefact(n)) for n in linked]
        if linked:
            options.add_external_initializers_from_files_in_memory(
                linked, weights, [len(w) for w in weights]
            )
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # threads that spin between calls take the processor from PyTorch's: on two cores whole
        # clips took 2.5 times as long
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.sessions = {
            name: onnxruntime.InferenceSession(
                str(self.folder.artefact(f"{name}.onnx")), options, providers=self.providers
            )
            for name in self.graphs
        }

    def unload(self) -> None:
        self.sessions = {}

    def run(self, graph: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        binding = self.sessions[graph].io_binding()
        index = self.device.index or 0
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, t in tensors.items():
                bind(name, self.device.type, index, ELEMENTS[t.dtype], tuple(t.shape), t.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(
                self.device
            ).synchronize()  # the session runs on a stream of its own
        self.sessions[graph].run_with_iobinding(binding)
        binding.synchronize_outputs()
