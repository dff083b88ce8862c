"""Old names of moved modules: importing one warns and gives the module under its new name. They go
with release 0.3."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "arguments": "cli",
    "convert": "loading.convert",
    "engines.base": "engines.protocol",
    "engines.coders": "engines.text_vae",
    "engines.exported": "engines.exported_engine",
    "engines.graphs": "engines.cuda_graphs",
    "engines.open": "engines.registry",
    "engines.residency": "memory.residency",
    "engines.streaming": "memory.streaming",
    "export.coders": "export.text_vae",
    "export.parts": "export.components",
    "export.symbols": "export.dynamic_shapes",
    "kernels.op": "kernels.triton_op",
    "models.checkpoint": "loading.checkpoint",
    "models.load": "loading.transformer",
    "models.lora": "loading.lora",
    "models.lora_file": "loading.lora_file",
    "models.moving": "memory.offload",
    "models.pickles": "loading.pickles",
    "models.pretrained": "loading.pretrained",
    "models.unpickling": "loading.unpickling",
    "ops": "block_ops",
    "options": "cli.options",
    "pair": "loading.pair_folder",
}


def warn_old(old: str, new: str) -> None:
    """Warn the caller's caller that an old form goes with the next release."""
    warnings.warn(f"{old} is now {new}.", DeprecationWarning, stacklevel=3)


class MovedModules:
    """An import finder, asked after all others, and the loader of what it finds."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("nexus_rt.") or name.removeprefix("nexus_rt.") not in MOVED:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = "nexus_rt." + MOVED[spec.name.removeprefix("nexus_rt.")]
        warnings.warn(
            f"{spec.name} is now {new}; import from there.", DeprecationWarning, stacklevel=2
        )
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__  # the import system puts `spec` in its place
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
