"""NexusRT: low-latency video generation with two generators in one latent space.

Nothing heavy is imported here: the public names load their modules when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "NexusPipeline": "pipeline.pipeline",
    "NexusOutput": "pipeline.pipeline",
    "Prompt": "method.generator",
    "Plan": "method.plan",
    "Step": "method.step",
    "StepCosts": "method.plan",
    "parse_plan": "method.plan_text",
    "gate": "method.upfb",
    "BlendConfig": "method.blend_config",
    "blend": "method.upfb",
    "TimeGrid": "method.time_grid",
    "time_grid": "method.time_grid",
    "save_video": "media.video",
    "NexusError": "core.errors",
    "InputError": "core.errors",
    "ModelError": "core.errors",
    "NumericsError": "core.errors",
    "DecodeError": "core.errors",
    "Cancelled": "core.errors",
}
__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from nexus_rt.core.errors import (
        Cancelled,
        DecodeError,
        InputError,
        ModelError,
        NexusError,
        NumericsError,
    )
    from nexus_rt.media.video import save_video
    from nexus_rt.method.blend_config import BlendConfig
    from nexus_rt.method.generator import Prompt
    from nexus_rt.method.plan import Plan, StepCosts
    from nexus_rt.method.plan_text import parse_plan
    from nexus_rt.method.step import Step
    from nexus_rt.method.time_grid import TimeGrid, time_grid
    from nexus_rt.method.upfb import blend, gate
    from nexus_rt.pipeline.pipeline import NexusOutput, NexusPipeline


def __getattr__(name: str):  # PEP 562
    import importlib

    if name not in _EXPORTS:
        raise AttributeError(f"module 'nexus_rt' has no attribute {name!r}")
    module = importlib.import_module(f"nexus_rt.{_EXPORTS[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
