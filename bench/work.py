"""What a forward and a decoding are: operations by the formulas of the layers, operations counted
on the meta device, and bytes. Nothing is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nexus_rt.core.size import ClipSize
from nexus_rt.models.decoder import decode_whole
from nexus_rt.models.wan import WanTransformer
from nexus_rt.models.wan_config import WanConfig
from nexus_rt.models.wan_vae import WanVae


@dataclass(frozen=True)
class Work:
    """Of one forward of some samples: operations of linear layers and attention, by what multiplies
    them, and bytes of what is bound by memory."""

    linear: float = 0.0
    linear_fp8: float = 0.0
    attention: float = 0.0
    attention_fp8: float = 0.0
    bytes: float = 0.0

    def __mul__(self, samples: float) -> Work:
        return Work(**{f.name: samples * getattr(self, f.name) for f in fields(self)})


def attention_flops(queries: int, keys: int, dim: int) -> int:
    """Operations of attention of one sample over all heads, `dim` wide together."""
    return 4 * queries * keys * dim


def forward_work(
    config: WanConfig,
    size: ClipSize,
    fp8: str | None = None,
    fp8_attention: bool = False,
    text: int = 41,
) -> Work:
    """One forward of one sample, its context prepared.

    Args:
        fp8: "fp8-dynamic" (all blocks but the first and the last) or "fp8-dynamic-all".
        text: keys of the cross-attention; those of a prompt of 40 words and one for its padding.
    """
    length, dim, layers = size.tokens(config.patch_size), config.dim, config.num_layers
    block = 2 * length * (6 * dim * dim + 2 * dim * config.ffn_dim)
    small = {"fp8-dynamic": layers - 2 if layers > 2 else layers, "fp8-dynamic-all": layers}.get(
        fp8 or "", 0
    )
    patch = math.prod(config.patch_size)
    ends = 2 * length * dim * patch * (config.in_channels + config.out_channels)
    own = attention_flops(length, length, dim) * layers
    cross = attention_flops(length, text, dim) * layers
    # elements of a block, of 2 bytes: three norms with their residuals, Q and K normed and turned,
    # the cross-attention's Q normed
    moved = (4 + 4 + 4 + 4 + 2) * length * dim * 2 * layers
    return Work(
        linear=block * (layers - small) + ends,
        linear_fp8=block * small,
        attention=cross + (0 if fp8_attention else own),
        attention_fp8=own if fp8_attention else 0,
        bytes=moved,
    )


def weight_bytes(config: WanConfig, element: int = 2, kept: Sequence[str] = ()) -> int:
    """Bytes of a transformer's parameters, of which those with one of `kept` in their names are
    in float32, the others of `element` bytes."""
    with torch.device("meta"):
        named = WanTransformer(config).named_parameters()
    return sum(p.numel() * (4 if any(k in name for k in kept) else element) for name, p in named)


@torch.no_grad()
def forward_flops(config: dict[str, Any], size: ClipSize, tokens: int = 512) -> int:
    """Multiplications and additions of one forward of one sample, counted operation by
    operation."""
    with torch.device("meta"):
        model = WanTransformer(WanConfig(**config)).use_kernels("torch", "sdpa").eval()
        t, h, w = size.latent
        latents = torch.empty(1, model.config.in_channels, t, h, w)
        context = model.prepare_context(
            torch.empty(1, tokens, model.config.text_dim), collapse=False
        )
        timestep = torch.empty(())
    with FlopCounterMode(display=False) as counter:
        model(latents, timestep, context)
    return counter.get_total_flops()


@torch.no_grad()
def decode_flops(size: ClipSize, config: dict[str, Any] | None = None) -> int:
    """Multiplications and additions of Wan's VAE decoding one clip; frame by frame they are as
    many."""
    with torch.device("meta"):
        vae = WanVae(config or {})
        z = torch.empty(1, vae.config.z_dim, *size.latent)
    with FlopCounterMode(display=False) as counter:
        decode_whole(vae, z)
    return counter.get_total_flops()
