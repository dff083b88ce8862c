"""NexusRT: low-latency video generation with two generators in one latent space.

Nothing heavy is imported here: the public names load their modules when first used.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "NexusPipeline": "pipeline",
    "NexusOutput": "pipeline",
    "Prompt": "method.generator",
    "Plan": "plan",
    "Step": "plan",
    "StepCosts": "plan",
    "parse_plan": "plan_text",
    "gate": "method.upfb",
    "BlendConfig": "method.blend_config",
    "blend": "method.upfb",
    "TimeGrid": "solver",
    "time_grid": "solver",
    "save_video": "video",
    "NexusError": "errors",
    "InputError": "errors",
    "ModelError": "errors",
    "NumericsError": "errors",
    "DecodeError": "errors",
    "Cancelled": "errors",
}
__all__ = [*_EXPORTS, "__version__"]

# kernels/, export/ and bench/ stand beside this package in a checkout and inside it when installed;
# in a checkout the repository's root joins the search path of `nexus_rt.*`, so that the same import
# works in both.
_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.insert(0, str(_root))

if TYPE_CHECKING:
    from nexus_rt.errors import (
        Cancelled,
        DecodeError,
        InputError,
        ModelError,
        NexusError,
        NumericsError,
    )
    from nexus_rt.method.blend_config import BlendConfig
    from nexus_rt.method.generator import Prompt
    from nexus_rt.method.upfb import blend, gate
    from nexus_rt.pipeline import NexusOutput, NexusPipeline
    from nexus_rt.plan import Plan, Step, StepCosts
    from nexus_rt.plan_text import parse_plan
    from nexus_rt.solver import TimeGrid, time_grid
    from nexus_rt.video import save_video


def __getattr__(name: str):  # PEP 562
    import importlib

    if name not in _EXPORTS:
        raise AttributeError(f"module 'nexus_rt' has no attribute {name!r}")
    module = importlib.import_module(f"nexus_rt.{_EXPORTS[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
