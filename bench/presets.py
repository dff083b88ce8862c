"""What is measured: a pair, its size and steps; real weights where they are given, else random ones
of the true architecture, whose latency is that of the real ones and whose pictures are nothing."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_rt.bench.architectures import SIZES, WAN
from nexus_rt.bench.work import weight_bytes
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import choose
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.loading.checkpoint import KEEP_FP32
from nexus_rt.models.wan import WanTransformer
from nexus_rt.models.wan_config import WanConfig
from nexus_rt.models.wan_vae import WAN_VAE, in_channels_last
from nexus_rt.pipeline.assemble import Loaded
from nexus_rt.pipeline.memory_use import activation_bytes
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.pipeline.settings import Defaults

PROMPT = (
    "the shape that rolls, in the colour of the sky, striped, moves the opposite way of right on a"
    " sand background"
)
WORDS = 40  # of a random prompt's 512 tokens, those that are not padding


@dataclass(frozen=True)
class Preset:
    """size None: the pair's own. configs: architectures of the random generators; None for the pair
    that is shipped."""

    name: str
    size: ClipSize | None = None
    configs: dict[str, dict[str, Any]] | None = None


PRESETS = {
    "mini": Preset("mini"),
    **{f"wan-{name}": Preset(f"wan-{name}", size, WAN) for name, size in SIZES.items()},
}


def find_preset(name: str) -> Preset:
    """The preset of a name; an `InputError` names those there are."""
    return PRESETS[choose("preset", name, PRESETS)]


def random_transformer(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> WanTransformer:
    """A Wan transformer of random weights, made on the device: norms at one, the rest small."""
    with torch.device("meta"):
        model = WanTransformer(WanConfig(**config))
    for name, parameter in list(model.named_parameters()):
        kept = torch.float32 if any(part in name for part in KEEP_FP32) else dtype
        value = torch.empty(parameter.shape, dtype=kept, device=device)
        value.fill_(1.0) if "norm" in name and name.endswith("weight") else value.normal_(std=0.02)
        owner, leaf = name.rpartition(".")[::2]
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return model.eval()


class RandomDecoder(VideoDecoder):
    """Wan's VAE decoder with random weights, the same in every dtype, laid out as stored ones."""

    def __init__(
        self,
        device: torch.device,
        config: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.tiling = config or {}, "auto"
        super(VideoDecoder, self).__init__(WAN_VAE, dtype, device)

    @property
    def nbytes(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() * self.dtype.itemsize for p in self._make().parameters())

    def working_bytes(self, size: ClipSize) -> int:
        return 6 * self.config.get("base_dim", 96) * 4 * size.width * size.height * 4

    def _make(self) -> nn.Module:
        import diffusers

        made: Any = diffusers.AutoencoderKLWan(**self.config)
        return made

    def _read(self) -> nn.Module:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            with torch.device(self.device):
                # PyTorch's own cast: diffusers' warns of parts that it keeps, which are none
                model = nn.Module.to(self._make().eval(), dtype=self.dtype)
        return in_channels_last(model)


def random_pipeline(
    configs: dict[str, dict[str, Any]],
    dtype: torch.dtype,
    device: torch.device,
    size: ClipSize,
    kernels: str = "auto",
    attention: str = "auto",
    decoder: dict[str, Any] | None = None,
) -> NexusPipeline:
    """A pipeline of random generators and, where diffusers is installed, a random VAE; it takes
    embeddings, no prompts."""
    models = {
        n: random_transformer(c, dtype, device).use_kernels(kernels, attention)
        for n, c in configs.items()
    }
    config = next(iter(models.values())).config
    try:
        from diffusers import AutoencoderKLWan  # noqa: F401
    except Exception:  # not installed, or not for the packages that are here
        vae: Any = None
    else:
        vae = RandomDecoder(device, decoder)
    defaults = Defaults(height=size.height, width=size.width, num_frames=size.frames)
    engines = {name: TorchEngine(model) for name, model in models.items()}
    loaded = Loaded(engines, None, vae, None, defaults, (config.in_channels, config.patch_size))
    return NexusPipeline(loaded, device, kernels=kernels)


def random_prompt(pipe: NexusPipeline, dtype: torch.dtype) -> dict[str, Tensor]:
    """Embeddings of a prompt of `WORDS` tokens and of an empty one, as arguments of a call."""
    width = next(iter(pipe.engines.values())).model.config.text_dim
    generator = torch.Generator().manual_seed(5)
    embeds = torch.zeros(2, 512, width)
    embeds[0, :WORDS] = torch.randn(WORDS, width, generator=generator)
    embeds[1, :1] = torch.randn(1, width, generator=generator)
    embeds, none = embeds.to(pipe.device, dtype).split(1)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": none}


@dataclass(frozen=True)
class Need:
    """Bytes a random pair takes, by part, and those that are free."""

    parts: dict[str, int]
    working: int
    free: int

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + self.working

    @property
    def short(self) -> int:
        return max(0, self.total - self.free)

    def sentence(self, preset: str, device: torch.device) -> str:
        """What is missing, and what would do."""
        sizes = ", ".join(
            f"{name} {size / 1e9:.1f}"
            for name, size in {**self.parts, "working": self.working}.items()
        )
        alone = min(self.parts, key=self.parts.__getitem__) if self.parts else ""
        small = self.parts.get(alone, 0) + self.working
        would = f"a device with {self.total / 1e9:.1f} GB"
        if small <= self.free and len(self.parts) > 1:
            would += f", or --plans {alone} ({small / 1e9:.1f} GB)"
        return (
            f"preset {preset} takes {self.total / 1e9:.1f} GB ({sizes}) and {self.free / 1e9:.1f}"
            f" GB are free on {device}: {self.short:,} bytes too few. What would do: {would}, or"
            " --estimate always"
        )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def need_of(
    configs: dict[str, dict[str, Any]], dtype: torch.dtype, device: torch.device, size: ClipSize
) -> Need:
    """What random generators of these architectures take at a size, guided; the VAE works when they
    do not."""
    parts, working = {}, 0
    for name, config in configs.items():
        architecture = WanConfig(**config)
        parts[name] = weight_bytes(architecture, dtype.itemsize, KEEP_FP32)
        working = max(working, activation_bytes(asdict(architecture), size, 2, dtype.itemsize))
    return Need(parts, working, free_bytes(device))
