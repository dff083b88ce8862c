"""What can be exported: a generator, the VAE's decoder, the text encoder.

A part says what identifies its engine, traces its graphs, and answers the parity gate's questions
by PyTorch in float32 or by an engine.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nexus_rt.components.text import TextEncoder
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import InputError, ModelError, choose
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.exported_engine import DTYPES, GRAPHS
from nexus_rt.engines.folder import trusted_hash
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.export import parity
from nexus_rt.export.dynamic_shapes import Traced
from nexus_rt.export.graph import trace
from nexus_rt.export.text_vae import decoder_states, trace_decoder, trace_text
from nexus_rt.loading import transformer
from nexus_rt.loading.experts import ExpertFolders, GeneratorSource, transformers_of
from nexus_rt.loading.locate import find_text
from nexus_rt.loading.lora import Lora, loras_hash, loras_of
from nexus_rt.loading.pair_folder import PairFolders
from nexus_rt.loading.umt5 import umt5_settings
from nexus_rt.loading.vae import vae_config, vae_space
from nexus_rt.memory.streaming import BlockStream
from nexus_rt.models.wan import WanTransformer

NAMES = ("small", "large", "vae", "text_encoder")  # of what can be exported
WEIGHTS = (".safetensors", ".sft", ".gguf", ".bin", ".pth", ".pt")


class Component(ABC):
    """Something that becomes an engine.

    name: as in `Manifest.part`. source: folder or file that it is loaded from. sized: whether an
        engine is for certain sizes.
    """

    name: str
    source: Path
    sized = True

    @property
    def folder(self) -> Path:
        """Of its weights."""
        return self.source

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """What its engine must have been made of, for the manifest."""

    @abstractmethod
    def graphs(self) -> dict[str, list[str]]:
        """Names of the graphs, and of their inputs in order."""

    def options(self) -> dict[str, Any]:
        """What the runtime needs to know besides."""
        return {}

    def merged(self) -> str | None:
        """A hash of what is merged into the weights, or None."""
        return None

    def precision(self, wanted: str) -> str:
        """The precision it is built in where the generators' is `wanted`."""
        return wanted

    @abstractmethod
    def trace(
        self,
        precision: str,
        buckets: list[ClipSize],
        device: torch.device,
        kernels: tuple[str, str],
    ) -> dict[str, Traced]:
        """The graphs by name; kernels: of a generator, and its attention."""

    @abstractmethod
    def answers(self, engine: Any, buckets: list[ClipSize], device: torch.device) -> parity.Answers:
        """The parity gate's answers, by an engine, or by PyTorch in float32 (None)."""


def _weights(source: Path) -> list[Path]:
    """A folder's files of weights, or a file itself."""
    return [source] if source.is_file() else [p for p in source.iterdir() if p.suffix in WEIGHTS]


def weights_hash(source: Path) -> str:
    """One hash of the weights of a folder or file, by name and content."""
    digest = hashlib.sha256()
    files = sorted(_weights(source))
    if not files:
        raise ModelError(
            f"{source} holds no weights ({', '.join(WEIGHTS)}); expected a model's folder.",
            code="missing",
        )
    for path in files:
        digest.update(f"{path.name} {trusted_hash(path)}\n".encode())
    return digest.hexdigest()


def weights_bytes(source: Path) -> int:
    return sum(p.stat().st_size for p in _weights(source))


def _architecture(folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(transformer.load_config(folder))))


def _reference(folder: Path, device: torch.device, loras: Sequence[Lora] = ()) -> WanTransformer:
    """A generator that computes in float32 from weights held as they are stored: its blocks are
    widened as they run.

    With LoRAs the weights are their sums in float32, as a float32 engine has them: rounded to what
    is stored, they would be another model.
    """
    stored = torch.float32 if loras else transformer.stored_dtype(folder)
    if stored.itemsize >= 4 and device.type == "cpu":
        return transformer.load_transformer(folder, torch.float32, device, "torch", loras=loras)
    model = transformer.load_transformer(folder, stored, "cpu", "torch", loras=loras)
    BlockStream(model, device, torch.float32)
    return model


@dataclass(frozen=True)
class GeneratorComponent(Component):
    """A generator: name "small" or "large", folder or file of its transformer, what is merged into
    it; or an expert of one, such as "large-high", and where the two change over."""

    name: str
    source: Path
    loras: tuple[Lora, ...] = ()
    boundary: float | None = None

    @property
    def folder(self) -> Path:
        return transformer.transformer_folder(self.source)

    def architecture(self) -> dict[str, Any]:
        return _architecture(self.folder)

    def graphs(self) -> dict[str, list[str]]:
        return {graph: list(inputs) for graph, inputs in GRAPHS.items()}

    def options(self) -> dict[str, Any]:
        return {} if self.boundary is None else {"boundary": self.boundary}

    def merged(self) -> str | None:
        return loras_hash({self.name: self.loras})

    def trace(
        self,
        precision: str,
        buckets: list[ClipSize],
        device: torch.device,
        kernels: tuple[str, str],
    ) -> dict[str, Traced]:
        return trace(
            transformer.load_transformer(
                self.folder, DTYPES[precision], device, *kernels, self.loras
            ),
            buckets,
        )

    def answers(self, engine: Any, buckets: list[ClipSize], device: torch.device) -> parity.Answers:
        by = engine or TorchEngine(_reference(self.folder, device, self.loras))
        return parity.generator_answers(by, self.architecture(), buckets, device)


@dataclass(frozen=True)
class DecoderComponent(Component):
    """The VAE's decoder. It is built in float32 where bfloat16 is asked for: eight bits would band
    the colours."""

    source: Path
    name = "vae"

    def decoder(self, dtype: torch.dtype, device: torch.device) -> VideoDecoder:
        """The decoder in PyTorch."""
        return VideoDecoder(self.source, dtype, device, tiling=False)

    def architecture(self) -> dict[str, Any]:
        return vae_space(self.source)

    def graphs(self) -> dict[str, list[str]]:
        return {
            "first": ["latents"],
            "next": ["latents", *(f"state_{i}" for i in range(len(self.options()["states"])))],
        }

    def options(self) -> dict[str, Any]:
        from diffusers import AutoencoderKLWan

        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(vae_config(self.source))
        return {"states": [list(s) for s in decoder_states(vae)]}

    def precision(self, wanted: str) -> str:
        return "fp32" if wanted in ("bf16", "int8") else wanted

    def trace(
        self,
        precision: str,
        buckets: list[ClipSize],
        device: torch.device,
        kernels: tuple[str, str],
    ) -> dict[str, Traced]:
        decoder = self.decoder(DTYPES[precision], device)
        decoder.load()
        return trace_decoder(decoder.model, buckets)

    def answers(self, engine: Any, buckets: list[ClipSize], device: torch.device) -> parity.Answers:
        return parity.decoder_answers(engine or self.decoder(torch.float32, device), buckets)


@dataclass(frozen=True)
class TextComponent(Component):
    """The text encoder, as `nexus_rt.loading.locate.find_text` finds it."""

    source: Path
    tokenizer: Path | None = None
    name = "text_encoder"
    sized = False

    @property
    def folder(self) -> Path:
        return find_text(self.source, self.tokenizer)[0]

    def encoder(self, dtype: torch.dtype, device: torch.device) -> TextEncoder:
        """The encoder in PyTorch."""
        return TextEncoder(self.source, dtype, device, self.tokenizer)

    def architecture(self) -> dict[str, Any]:
        config = umt5_settings(self.folder)
        return {
            k: config[k]
            for k in ("model_type", "d_model", "vocab_size", "num_layers")
            if k in config
        }

    def graphs(self) -> dict[str, list[str]]:
        return {"encode": ["ids", "mask"]}

    def precision(self, wanted: str) -> str:
        if wanted == "int8":
            return "fp32"
        if wanted == "fp16":
            raise InputError(
                "the text encoder is not exported in fp16: UMT5's activations leave its range."
                " Export it with --precision fp32 (or bf16 on a GPU), or leave it out of --parts.",
                code="unsupported",
                param="precision",
            )
        return wanted

    def trace(
        self,
        precision: str,
        buckets: list[ClipSize],
        device: torch.device,
        kernels: tuple[str, str],
    ) -> dict[str, Traced]:
        encoder = self.encoder(DTYPES[precision], device)
        encoder.load()
        return trace_text(encoder.model)

    def answers(self, engine: Any, buckets: list[ClipSize], device: torch.device) -> parity.Answers:
        vocabulary = self.architecture()["vocab_size"]
        return parity.text_answers(engine or self.encoder(torch.float32, device), vocabulary)


def chosen_components(
    pair: PairFolders,
    names: str | None,
    loras: Mapping[str, tuple[Lora, ...]] | None = None,
) -> list[Component]:
    """Components of a pair to export: those named, or its generators, with what is merged into
    them.

    Raises:
        InputError: an unknown part, or one that the pair has not.
    """
    chosen = [n.strip() for n in names.split(",")] if names else list(pair.generators)
    parts: list[Component] = []
    for name in dict.fromkeys(choose("part", n, NAMES) for n in chosen):
        if name == "vae" and pair.vae is not None:
            parts.append(DecoderComponent(pair.vae))
        elif name == "text_encoder" and pair.text is not None:
            parts.append(TextComponent(pair.text, pair.tokenizer))
        elif name in pair.generators:
            parts += _generators(name, pair.generators[name], (loras or {}).get(name, ()))
        else:
            raise InputError(
                f"there is no {name} here to export; pass --{name.replace('_', '-')}, or other"
                " --parts.",
                code="missing",
                param=name,
            )
    return parts


def _generators(name: str, source: GeneratorSource, loras: Sequence[Lora]) -> list[Component]:
    """A generator's engines: one, or one for each expert."""
    folders = transformers_of(source)
    own = loras_of(name, folders, loras)
    boundary = source.boundary if isinstance(source, ExpertFolders) else None
    return [
        GeneratorComponent(f"{name}-{e}" if e else name, folder, tuple(own[e]), boundary)
        for e, folder in folders.items()
    ]


def folders_beside(pair: PairFolders, parts: list[Component]) -> dict[str, Path]:
    """What a folder of engines needs besides them: encoders and VAE that are not exported, and the
    tokenizer."""
    folders = {"vae": pair.vae, "understanding": pair.understanding, "connector": pair.connector}
    if pair.text is not None:
        folders |= dict(
            zip(("text_encoder", "tokenizer"), find_text(pair.text, pair.tokenizer), strict=True)
        )
    exported = {p.name for p in parts}
    beside = {name: f for name, f in folders.items() if f is not None and name not in exported}
    for name, folder in beside.items():
        if folder.is_file():
            raise InputError(
                f"the {name.replace('_', ' ')} is a single file, {folder}, and engines stand beside"
                " folders; make one of it first: `nexus-rt convert wan`.",
                code="unsupported",
                param=name,
            )
    return beside
