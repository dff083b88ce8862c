"""What exported engines share: sizes, the sessions a backend gives them, and the generator they
make.

An engine is a part of a pair (its role) on the sessions of a backend: the role knows what its
graphs mean, the backend how to run them. `nexus_rt.engines.registry` puts the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError
from nexus_rt.core.size import BuiltSizes, ClipSize
from nexus_rt.method.engine import warmup_noise
from nexus_rt.models.wan import collapse_padding

if TYPE_CHECKING:
    from nexus_rt.engines.folder import EngineFolder

# an engine's graphs and their inputs, in order; the VAE's further states follow its latents
# (nexus_rt.export.text_vae)
CONTEXT = ("embeds",)
VELOCITY = ("latents", "timestep", "keys", "values", "bias")
GRAPHS = {"context": CONTEXT, "velocity": VELOCITY}
# what an engine's tensors are in; int8 is of its matrices, and what goes between them is float32
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
}


@dataclass
class EngineContext:
    """A prompt as an exported engine reads it: keys, values [layers, N, L, heads, head_dim], bias
    [N, L] float32."""

    keys: Tensor | None
    values: Tensor | None
    bias: Tensor | None
    # instead of the three, where a run takes fewer samples
    parts: list[EngineContext] = field(default_factory=list)

    @property
    def batch(self) -> int:
        return sum(p.batch for p in self.parts) if self.bias is None else self.bias.shape[0]


class Sessions:
    """The graphs of an engine folder on a backend, which adds `resident`, `load`, `unload` and
    `run`.

    Loading is put off to the first use, so that a plan's engines can be opened, priced and moved
    without their weights.
    """

    most: int | None = None  # samples that one run takes; None: any number

    def __init__(self, folder: EngineFolder, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.graphs: dict[str, list[str]] = folder.manifest.graphs

    @property
    def resident(self) -> bool:
        """Whether they are loaded."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the artefacts and make them ready; nothing where that is done."""
        raise NotImplementedError

    def unload(self) -> None:
        """Give back the memory; the next call loads again."""
        raise NotImplementedError

    def run(self, graph: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Run a graph, filling `outputs`; all tensors contiguous and on the device, in the graph's
        order."""
        raise NotImplementedError


class Exported:
    """An engine folder on its backend's sessions; a role adds what its graphs are for."""

    bound = 3  # how many of width, height and frames its graphs were built for

    def __init__(self, sessions: Sessions) -> None:
        self.sessions, self.folder, self.device = sessions, sessions.folder, sessions.device
        self.dtype = DTYPES[self.folder.manifest.precision]
        self.buckets = [ClipSize(*b) for b in self.folder.manifest.buckets]

    @property
    def nbytes(self) -> int:
        """Bytes of the artefacts, which are the weights but for some kilobytes."""
        return self.folder.nbytes

    @property
    def resident(self) -> bool:
        return self.sessions.resident

    def load(self) -> None:
        self.sessions.load()

    def unload(self) -> None:
        self.sessions.unload()

    def together(self, samples: int) -> list[slice]:
        """Samples 0.. in runs of as many as the engine takes at once."""
        most = self.sessions.most or max(1, samples)
        return [slice(i, min(i + most, samples)) for i in range(0, samples, most)]

    @property
    def built_sizes(self) -> tuple[BuiltSizes, ...]:
        """What it was built for."""
        m = self.folder.manifest
        return (BuiltSizes(m.part, tuple(self.buckets), bool(m.options.get("range")), self.bound),)

    def check_size(self, size: ClipSize) -> None:
        """Raise an `InputError` that names the sizes unless the engine was built for this one."""
        for sizes in self.built_sizes:
            sizes.check(size)


class ExportedEngine(Exported):
    """A generator behind the engine protocol: graphs "context" and "velocity"."""

    def warmup(
        self, latent: tuple[int, int, int] | None = None, batch: int = 2, tokens: int = 24
    ) -> None:
        """One step on noise at a latent size (T, H, W; the first it was built for by default), so
        that the first real one is as fast as the rest."""
        a, latent = self.folder.manifest.architecture, latent or self.buckets[0].latent
        sizes = latent, a["in_channels"], a["text_dim"], batch, tokens
        latents, embeddings = warmup_noise(*sizes, self.device)
        self.velocity(latents, torch.tensor(500.0, device=self.device), self.prepare(embeddings))

    def published_numerics(self, on: bool) -> None:
        """What a float32 engine computes anyway.

        Raises:
            InputError: a narrower engine, which cannot be asked for it.
        """
        if on and self.dtype != torch.float32:
            raise InputError(
                f"the {self.folder.manifest.part} engine computes in"
                f" {self.folder.manifest.precision} alone and the published code in float32 beside"
                " it; export with --precision fp32, or use PyTorch.",
                code="unsupported",
                param="numerics",
            )

    @torch.no_grad()
    def prepare(self, context: Tensor) -> EngineContext:
        width = self.folder.manifest.architecture["text_dim"]
        if context.ndim != 3 or context.shape[-1] != width:
            raise InputError(
                f"context has shape {tuple(context.shape)}; expected [batch, tokens, {width}].",
                code="mismatch",
                param="context",
            )
        self.load()
        parts = [self._prepare(context[run]) for run in self.together(len(context))]
        return parts[0] if len(parts) == 1 else EngineContext(None, None, None, parts)

    def _prepare(self, embeds: Tensor) -> EngineContext:
        """The samples of one run: [N, L, text_dim], their zero padding counted once."""
        a = self.folder.manifest.architecture
        embeds, bias = collapse_padding(embeds.to(self.device, self.dtype), at_least=2)
        bias = (
            torch.zeros(embeds.shape[:2], device=self.device)
            if bias is None
            else bias.float().contiguous()
        )
        heads = a["num_attention_heads"], a["attention_head_dim"]
        shape = (a["num_layers"], *embeds.shape[:2], *heads)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self.sessions.run(
            "context", {"embeds": embeds.contiguous()}, {"keys": keys, "values": values}
        )
        return EngineContext(keys, values, bias)

    @torch.no_grad()
    def velocity(self, latents: Tensor, timestep: Tensor, context: EngineContext) -> Tensor:
        self.check_size(ClipSize.of(latents))
        self.load()
        repeats = context.batch // latents.shape[0]
        latents = (
            latents.float().repeat(repeats, 1, 1, 1, 1)
            if repeats > 1
            else latents.float().contiguous()
        )
        channels = self.folder.manifest.architecture["out_channels"]
        out = torch.empty(latents.shape[0], channels, *latents.shape[2:], device=self.device)
        timestep = timestep.float().reshape(()).to(self.device)
        parts = context.parts or [context]
        counts = [p.batch for p in parts]
        for part, x, velocity in zip(parts, latents.split(counts), out.split(counts), strict=True):
            inputs = {
                "latents": x,
                "timestep": timestep,
                "keys": part.keys,
                "values": part.values,
                "bias": part.bias,
            }
            self.sessions.run("velocity", inputs, {"velocity": velocity})
        return out
