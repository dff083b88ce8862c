"""The registry of engine backends: what runs an exported engine. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

from nexus_rt.core.errors import UnknownArgument, shown


@dataclass(frozen=True)
class EngineBackend:
    """A backend, by the modules it is made of.

    runtime: module with the sessions' class. sessions: the class, `(folder, device, **options)`.
    """

    runtime: str
    sessions: str

    def open(self, *args: Any, **options: Any) -> Any:
        """A session's object; the backend's packages are imported now."""
        sessions = getattr(import_module(self.runtime), self.sessions)
        known = list(signature(sessions).parameters)[2:]  # after the folder and the device
        for name in options:
            if name not in known:
                raise UnknownArgument(
                    f"engines of this backend have no option {shown(name)}; expected"
                    f" {' or '.join(known) or 'none'}.",
                    param=name,
                )
        return sessions(*args, **options)


_TENSORRT = EngineBackend("nexus_rt.engines.tensorrt", "TensorRTSessions")
ENGINE_BACKENDS = {
    "onnx": EngineBackend("nexus_rt.engines.onnx", "OnnxSessions"),
    "aoti": EngineBackend("nexus_rt.engines.aoti", "AotiSessions"),
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": _TENSORRT,
}
