"""AOTInductor packages (`.pt2`): compiled code, and its weights beside it, in one file; no model
code needed at load.

On a CPU the code is C++, on a GPU Triton kernels, ours among them, compiled for its architecture.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from nexus_rt.engines.exported_engine import Sessions

# torch._inductor.aoti_load_package does not read weights that lie beside the code; this does
LOADER = (
    "torch.export.pt2_archive._package.load_pt2(path, device_index=-1,"
    " load_weights_from_disk=True).aoti_runners"
)


def version() -> str:
    """The version of PyTorch, which compiled code is bound to."""
    return torch.__version__


class AotiSessions(Sessions):
    """A loaded package a graph."""

    def __init__(self, folder, device: torch.device) -> None:
        super().__init__(folder, device)
        self.packages: dict[str, Callable] = {}

    @property
    def resident(self) -> bool:
        return bool(self.packages)

    def load(self) -> None:
        if self.packages:
            return
        from torch.export.pt2_archive._package import load_pt2

        index = -1 if self.device.type == "cpu" else self.device.index or 0
        for name in self.graphs:
            package = load_pt2(
                str(self.folder.artefact(f"{name}.pt2")),
                device_index=index,
                load_weights_from_disk=True,
            )
            (self.packages[name],) = package.aoti_runners.values()

    def unload(self) -> None:
        self.packages = {}
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def run(self, graph: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        made = self.packages[graph](*(inputs[name] for name in self.graphs[graph]))
        for out, t in zip(
            outputs.values(), made if isinstance(made, list | tuple) else (made,), strict=True
        ):
            out.copy_(t)
