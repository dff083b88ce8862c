"""What the exported backends share: sizes, the prompt's part prepared once, and the checks before a step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nexus_rt.errors import InputError
from nexus_rt.models.wan import collapse_padding

if TYPE_CHECKING:
    from nexus_rt.engines.folder import EngineFolder

GRAPHS = {"context": ("embeds",), "velocity": ("latents", "timestep", "keys", "values", "bias")}  # and their inputs
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Bucket(NamedTuple):
    """A clip's size in pixels and frames."""

    width: int
    height: int
    frames: int

    @property
    def latent(self) -> tuple[int, int, int]:
        """T, H, W of its latents (Wan's VAE: 8 pixels and 4 frames a cell)."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """ "832x480x81" and the like.

        Raises:
            InputError: not three numbers, sides that are not multiples of 16, frames other than 4k+1.
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if not found:
            raise InputError(f"size {text!r} is not WIDTHxHEIGHTxFRAMES, such as 832x480x81.")
        size = cls(*map(int, found.groups()))
        if min(size) < 1 or size.width % 16 or size.height % 16 or size.frames % 4 != 1:
            raise InputError(f"size {size} cannot be made: sides are multiples of 16, and frames 4k+1, such as 832x480x81.")
        return size


@dataclass
class EngineContext:
    """A prompt as an exported engine reads it: keys, values [layers, N, L, heads, head_dim], bias [N, L] float32."""

    keys: Tensor
    values: Tensor
    bias: Tensor

    @property
    def batch(self) -> int:
        return self.bias.shape[0]


class ExportedEngine:
    """An engine folder behind the engine protocol; a backend adds `load`, `unload` and `_run`.

    Loading is put off to the first use, so that a plan's engines can be opened, priced and moved without their weights.
    """

    def __init__(self, folder: EngineFolder, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.dtype = DTYPES[folder.manifest.precision]
        self.buckets = [Bucket(*b) for b in folder.manifest.buckets]

    @property
    def nbytes(self) -> int:
        """Bytes of the artefacts, which are the weights but for some kilobytes."""
        return self.folder.nbytes

    @property
    def resident(self) -> bool:
        """Whether it is loaded."""
        raise NotImplementedError

    def load(self) -> None:
        """Read the artefacts and make them ready; nothing where that is done."""
        raise NotImplementedError

    def unload(self) -> None:
        """Give back the memory; the next call loads again."""
        raise NotImplementedError

    def _run(self, graph: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Run "context" or "velocity", filling `outputs`; all tensors contiguous and on the engine's device."""
        raise NotImplementedError

    def warmup(self, latent: tuple[int, int, int] | None = None, batch: int = 2, tokens: int = 24) -> None:
        """One step on noise at a latent size (T, H, W; the first it was built for by default), so that the first real
        one is as fast as the rest."""
        a = self.folder.manifest.architecture
        context = self.prepare(torch.randn(batch, tokens, a["text_dim"], device=self.device))
        latents = torch.randn(batch, a["in_channels"], *(latent or self.buckets[0].latent), device=self.device)
        self.velocity(latents, torch.tensor(500.0, device=self.device), context)

    @torch.no_grad()
    def prepare(self, context: Tensor) -> EngineContext:
        a = self.folder.manifest.architecture
        if context.ndim != 3 or context.shape[-1] != a["text_dim"]:
            raise InputError(f"context has shape {tuple(context.shape)}; expected [batch, tokens, {a['text_dim']}].")
        self.load()
        embeds, bias = collapse_padding(context.to(self.device, self.dtype), at_least=2)
        bias = torch.zeros(embeds.shape[:2], device=self.device) if bias is None else bias.float().contiguous()
        shape = (a["num_layers"], *embeds.shape[:2], a["num_attention_heads"], a["attention_head_dim"])
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self._run("context", {"embeds": embeds.contiguous()}, {"keys": keys, "values": values})
        return EngineContext(keys, values, bias)

    @torch.no_grad()
    def velocity(self, latents: Tensor, timestep: Tensor, context: EngineContext) -> Tensor:
        self.check(latents)
        self.load()
        repeats = context.batch // latents.shape[0]
        latents = latents.float().repeat(repeats, 1, 1, 1, 1) if repeats > 1 else latents.float().contiguous()
        channels = self.folder.manifest.architecture["out_channels"]
        out = torch.empty(latents.shape[0], channels, *latents.shape[2:], device=self.device)
        inputs = {"latents": latents, "timestep": timestep.float().reshape(()).to(self.device), "keys": context.keys,
                  "values": context.values, "bias": context.bias}  # fmt: skip
        self._run("velocity", inputs, {"velocity": out})
        return out

    def check(self, latents: Tensor) -> None:
        """Raise an `InputError` that names the sizes unless the engine was built for these latents."""
        t, h, w = latents.shape[2:]
        self.check_size(Bucket(8 * w, 8 * h, 4 * t - 3))

    def check_size(self, size: Bucket) -> None:
        """The same for a clip's size."""
        if size not in self.buckets:
            raise InputError(
                f"size {size} is none that this {self.folder.manifest.generator} engine was built for: "
                f"{', '.join(map(str, self.buckets))}; generate one of them, or export with --sizes."
            )
