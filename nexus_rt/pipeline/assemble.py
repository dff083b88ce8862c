"""From folders to what a pipeline is made of: models in PyTorch, or exported engines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nexus_rt.components.context import ContextEncoder
from nexus_rt.components.text import TextEncoder
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.devices import as_device, as_dtype, dtype_name
from nexus_rt.core.errors import InputError
from nexus_rt.core.log import chose
from nexus_rt.engines.cuda_graphs import ReplayedEngine
from nexus_rt.engines.experts import ExpertsEngine, changed, joined
from nexus_rt.engines.registry import GENERATORS, open_engines
from nexus_rt.engines.text_vae import EngineDecoder, EngineTextEncoder
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.loading import transformer
from nexus_rt.loading.experts import ExpertFolders, GeneratorSource, transformers_of
from nexus_rt.loading.locate import find_text, folder_fingerprint
from nexus_rt.loading.lora import Lora, loras_hash, loras_of
from nexus_rt.loading.pair_folder import PairFolders
from nexus_rt.pipeline.defaults import exported_pair, pair_defaults
from nexus_rt.pipeline.settings import Defaults


@dataclass
class Loaded:
    """What `NexusPipeline` holds; None for a part that is not there.

    space: latent channels and patch size.
    identity: part -> what makes its results its own, whatever path it was read from: weights, dtype
        and what computes it.
    """

    engines: dict[str, Any]
    text: TextEncoder | EngineTextEncoder | None
    vae: VideoDecoder | EngineDecoder | None
    context: ContextEncoder | None
    defaults: Defaults
    space: tuple[int, tuple[int, int, int]]
    identity: dict[str, str] = field(default_factory=dict)

    def replayed(self) -> Loaded:
        """The same with CUDA graphs of the generators' steps.

        Raises:
            InputError: they cannot be recorded here.
        """
        return replace(
            self,
            engines={name: changed(e, ReplayedEngine) for name, e in self.engines.items()},
        )


def default_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, by default "cuda" where there is one.

    Raises:
        InputError: it cannot be used here.
    """
    if device is not None:
        return as_device("device", device)
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    chose("device", chosen, "there is a GPU" if chosen == "cuda" else "PyTorch sees no GPU")
    return torch.device(chosen)


def default_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype, by default bfloat16 on a GPU and float32 on a CPU.

    Raises:
        InputError: models do not compute in it.
    """
    if dtype is not None:
        return as_dtype("torch_dtype", dtype)
    chosen = torch.float32 if device.type == "cpu" else torch.bfloat16
    chose("dtype of generators and encoders", chosen, f"the device is {device}")
    return chosen


def _coders(
    parts: PairFolders, dtype: torch.dtype, device: torch.device, tiling: bool | str
) -> tuple[ContextEncoder | None, TextEncoder | None, VideoDecoder | None]:
    context = None
    if parts.understanding is not None and parts.connector is not None:
        context = ContextEncoder(parts.understanding, parts.connector, dtype, device)
    text = TextEncoder(parts.text, dtype, device, parts.tokenizer) if parts.text else None
    return (
        context,
        text,
        VideoDecoder(parts.vae, torch.float32, device, tiling) if parts.vae else None,
    )


def load_models(
    parts: PairFolders,
    dtype: torch.dtype,
    device: torch.device,
    weights: torch.device,
    kernels: str,
    attention: str,
    tiling: bool | str,
    loras: Mapping[str, Sequence[Lora]],
    kept: str = "dense",
) -> Loaded:
    """A pair in PyTorch; `weights` is where the generators' are read to, `loras` what is merged
    into which of them, `kept` how their matrices are kept (`nexus_rt.loading.packing.WEIGHTS`).

    Raises:
        ModelError: a folder is no model, is damaged, or the connector is of another width.
    """
    defaults = pair_defaults(parts.stated)
    context, text, vae = _coders(parts, dtype, device, tiling)
    if context is not None:
        parts.check_width(context.text_dim)
    if lost := [n for n in loras if n not in parts.generators]:
        raise InputError(
            f"a LoRA is given for the {lost[0]} generator, which is not loaded; pass {lost[0]}="
            " too.",
            code="missing",
            param=lost[0],
        )

    def engine(generator: str, source: GeneratorSource) -> TorchEngine | ExpertsEngine:
        folders = transformers_of(source)
        own = loras_of(generator, folders, loras.get(generator, ()))
        made = {
            expert: TorchEngine(
                transformer.load_transformer(
                    f, dtype, weights, kernels, attention, own[expert], kept
                ),
                device=device,
            )
            for expert, f in folders.items()
        }
        if isinstance(source, ExpertFolders):
            return ExpertsEngine(made, source.boundary)
        return made[""]

    engines = {n: engine(n, source) for n, source in parts.generators.items()}
    config = next(iter(engines.values())).model.config
    computed = f"{dtype_name(dtype)} kernels={kernels} attention={attention}"
    computed += "" if kept == "dense" else f" weights={kept}"
    identity = {
        n: (f"{_fingerprint(generator)} {computed} lora={loras_hash({n: loras.get(n, ())})}")
        for n, generator in parts.generators.items()
    }
    space = config.in_channels, config.patch_size
    return Loaded(
        engines,
        text,
        vae,
        context,
        defaults,
        space,
        identity | _coder_identity(parts, dtype),
    )


def _fingerprint(generator: GeneratorSource) -> str:
    """What identifies a generator's weights: of each expert, and where they change over."""
    files = [folder_fingerprint(f) for f in transformers_of(generator).values()]
    if isinstance(generator, ExpertFolders):
        files.append(f"boundary={generator.boundary:g}")
    return " ".join(files)


def _coder_identity(parts: PairFolders, dtype: torch.dtype) -> dict[str, str]:
    text = parts.text and find_text(parts.text, parts.tokenizer)[0]
    steering = {"understanding": parts.understanding, "connector": parts.connector}
    folders = {"vae": parts.vae, "text_encoder": text, **steering}
    kind = {name: "float32" if name == "vae" else dtype_name(dtype) for name in folders}
    return {
        name: f"{folder_fingerprint(folder)} {kind[name]}"
        for name, folder in folders.items()
        if folder
    }


def load_engines(
    root: Path,
    dtype: torch.dtype,
    device: torch.device,
    tiling: bool | str,
    force: bool,
    options: dict[str, Any],
) -> Loaded:
    """The engines of an exported folder, and PyTorch for what of the pair is no engine.

    Raises:
        ModelError: no engine folder, or one that is damaged, wrong, or built for something else.
    """
    opened = open_engines(root, device, force, **options)
    engines = {n: opened[n] for n in GENERATORS if n in opened}
    parts, defaults = exported_pair(root, engines)
    context, text, vae = _coders(parts, dtype, device, tiling)
    a = next(iter(engines.values())).folder.manifest.architecture
    space = a["in_channels"], tuple(a["patch_size"])
    text, vae = opened.get("text_encoder", text), opened.get("vae", vae)
    identity = _coder_identity(parts, dtype) | {
        name: f"{e.folder.manifest.backend} {e.folder.manifest.identity()} {_artefacts(e)}"
        for name, e in opened.items()
    }
    generators = joined(engines)
    for name in generators:
        experts = [n for n in engines if n.startswith(f"{name}-")]
        if experts:
            identity[name] = " ".join(identity.pop(n) for n in experts)
    return Loaded(generators, text, vae, context, defaults, space, identity)


def _artefacts(engine: Any) -> str:
    """A short hash of an engine's files, as its manifest has them."""
    files = sorted((name, f["sha256"]) for name, f in engine.folder.manifest.files.items())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]
