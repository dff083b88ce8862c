"""From folders to what a pipeline is made of: models in PyTorch, or exported engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nexus_rt.engines.coders import EngineDecoder, EngineTextEncoder
from nexus_rt.engines.graphs import ReplayedEngine
from nexus_rt.engines.open import open_engines
from nexus_rt.engines.step import StepEngine
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.errors import InputError
from nexus_rt.models import load
from nexus_rt.models.context import ContextEncoder
from nexus_rt.models.lora import Lora
from nexus_rt.models.text import TextEncoder
from nexus_rt.models.vae import VideoDecoder
from nexus_rt.pair import Defaults, Parts, engine_parts


@dataclass
class Loaded:
    """What `NexusPipeline` holds; None for a part that is not there. space: latent channels and patch size."""

    engines: dict[str, Any]
    text: TextEncoder | EngineTextEncoder | None
    vae: VideoDecoder | EngineDecoder | None
    context: ContextEncoder | None
    step: StepEngine | None
    defaults: Defaults
    space: tuple[int, tuple[int, int, int]]

    def replayed(self) -> Loaded:
        """The same with CUDA graphs of the generators' steps.

        Raises:
            InputError: they cannot be recorded here.
        """
        return replace(self, engines={name: ReplayedEngine(engine) for name, engine in self.engines.items()})


def default_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else "cuda" where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def default_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, else bfloat16 on a GPU and float32 on a CPU."""
    return dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)


def _coders(
    parts: Parts, dtype: torch.dtype, device: torch.device, tiling: bool | str
) -> tuple[ContextEncoder | None, TextEncoder | None, VideoDecoder | None]:  # fmt: skip
    context = ContextEncoder(parts.understanding, parts.connector, dtype, device) if parts.connector else None
    text = TextEncoder(parts.text, dtype, device) if parts.text else None
    return context, text, VideoDecoder(parts.vae, torch.float32, device, tiling) if parts.vae else None


def load_models(
    parts: Parts, dtype: torch.dtype, device: torch.device, weights: torch.device, kernels: str, attention: str,
    tiling: bool | str, loras: Mapping[str, Sequence[Lora]],
) -> Loaded:  # fmt: skip
    """A pair in PyTorch; `weights` is where the generators' are read to, `loras` what is merged into which of them.

    Raises:
        ModelError: a folder is no model, is damaged, or the connector is of another width.
    """
    context, text, vae = _coders(parts, dtype, device, tiling)
    if context is not None:
        parts.check_width(context.text_dim)
    if lost := [n for n in loras if n not in parts.generators]:
        raise InputError(f"a LoRA is given for the {lost[0]} generator, which is not loaded; pass {lost[0]}= too.")
    models = {
        n: load.load_transformer(f, dtype, weights, kernels, attention, loras.get(n, ())) for n, f in parts.generators.items()
    }
    config = next(iter(models.values())).config
    engines = {name: TorchEngine(model, device=device) for name, model in models.items()}
    return Loaded(engines, text, vae, context, None, parts.defaults, (config.in_channels, config.patch_size))


def load_engines(
    root: Path, dtype: torch.dtype, device: torch.device, tiling: bool | str, force: bool, options: dict[str, Any]
) -> Loaded:  # fmt: skip
    """The engines of an exported folder, and PyTorch for what of the pair is no engine.

    Raises:
        ModelError: no engine folder, or one that is damaged, wrong, or built for something else.
    """
    found = open_engines(root, device, force, **options)
    engines = {n: found[n] for n in ("small", "large") if n in found}
    parts = engine_parts(root, engines)
    context, text, vae = _coders(parts, dtype, device, tiling)
    a = next(iter(engines.values())).folder.manifest.architecture
    space = a["in_channels"], tuple(a["patch_size"])
    text, vae = found.get("text_encoder", text), found.get("vae", vae)
    return Loaded(engines, text, vae, context, found.get("step"), parts.defaults, space)
