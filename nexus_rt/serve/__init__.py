"""`pip install "nexus-rt[serve]"`: a pipeline behind OpenAI's video routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nexus_rt.serve.server import NexusServer

__all__ = ["NexusServer"]


def __getattr__(name: str) -> Any:
    if name == "NexusServer":
        from nexus_rt.serve.server import NexusServer

        return NexusServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
