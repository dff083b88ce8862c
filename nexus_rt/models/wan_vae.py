"""Wan 2.1's VAE as a tree of weights under diffusers' names, for `nexus_rt.models.decoder` to
compute with.

The same parameters as diffusers' `AutoencoderKLWan`, built without importing it: diffusers and what
it imports take longer than a small clip. Only the decoder computes here (`decode_whole`); tiles,
long clips and the encoder are diffusers' own, on the same tensors. Weights are empty until they are
read.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_rt.core import documents
from nexus_rt.core.errors import ModelError

DEFAULTS = {  # of diffusers' AutoencoderKLWan
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "in_channels": 3,
    "out_channels": 3,
    "is_residual": False,
    "patch_size": None,
}


LATENT_FIELDS = (
    "z_dim",
    "latents_mean",
    "latents_std",
    "scale_factor_spatial",
    "scale_factor_temporal",
)


# What AutoencoderKLWan has when a config.json leaves the field out: the published Wan 2.1 VAE's
# statistics.
WAN_VAE = {
    "z_dim": 16,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [
        -0.7571,
        -0.7089,
        -0.9113,
        0.1075,
        -0.1745,
        0.9653,
        -0.1517,
        1.5508,
        0.4134,
        -0.0715,
        0.5517,
        -0.3632,
        -0.1922,
        -0.9497,
        0.2503,
        -0.2921,
    ],
    "latents_std": [
        2.8184,
        1.4541,
        2.3275,
        2.6558,
        1.2196,
        1.7708,
        2.6052,
        2.0743,
        3.2687,
        2.1526,
        2.8652,
        1.5579,
        1.6382,
        1.1253,
        2.8251,
        1.9160,
    ],
}


Factor = Annotated[int, msgspec.Meta(ge=1, le=64)]


class Blocks(msgspec.Struct):
    """What decides how many modules a VAE has; above these it is none, and building it would
    hang."""

    base_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 96
    decoder_base_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    dim_mult: Annotated[list[Factor], msgspec.Meta(min_length=1, max_length=8)] = msgspec.field(
        default_factory=lambda: [1]
    )
    num_res_blocks: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    attn_scales: Annotated[list[float], msgspec.Meta(max_length=16)] = msgspec.field(
        default_factory=list
    )
    temperal_downsample: Annotated[list[bool], msgspec.Meta(max_length=8)] = msgspec.field(
        default_factory=list
    )


FIELDS = {  # of AutoencoderKLWan's config
    *Blocks.__struct_fields__,
    *LATENT_FIELDS,
    *("in_channels", "out_channels", "is_residual", "patch_size", "dropout"),
}


class _Space(msgspec.Struct):
    z_dim: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    latents_mean: list[Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]]
    latents_std: list[Annotated[float, msgspec.Meta(gt=0, le=1e6)]]
    scale_factor_spatial: Annotated[int, msgspec.Meta(ge=1, le=128)]
    scale_factor_temporal: Annotated[int, msgspec.Meta(ge=1, le=64)]


def check_space(space: dict[str, Any], where: str) -> None:
    """Raise unless a latent space's numbers belong together; where: for errors."""
    stored = documents.check(space, _Space, where)
    if not len(stored.latents_mean) == len(stored.latents_std) == stored.z_dim:
        raise ModelError(
            f"{where} has {len(stored.latents_mean)} means and {len(stored.latents_std)} deviations"
            f" of latents for z_dim={stored.z_dim} channels; expected one of each a channel.",
            code="mismatch",
        )


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class CausalConv3d(nn.Module):
    """A convolution that sees no later frame; `_padding` as diffusers keeps it: (left, right, top,
    bottom, before, after)."""

    def __init__(
        self,
        inner: int,
        outer: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        pad: tuple[int, int, int] = (1, 1, 1),
    ):
        super().__init__()
        self.weight, self.bias = _empty(outer, inner, *kernel), _empty(outer)
        self._padding = (pad[2], pad[2], pad[1], pad[1], 2 * pad[0], 0)


class Conv2d(nn.Module):
    """A convolution of frames."""

    def __init__(self, inner: int, outer: int, kernel: int, padding: int = 0) -> None:
        super().__init__()
        self.weight, self.bias, self.padding = (
            _empty(outer, inner, kernel, kernel),
            _empty(outer),
            padding,
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class Norm(nn.Module):
    """x over its length along the channels, times their root and gamma; dims: axes after the
    channels."""

    def __init__(self, dim: int, dims: int) -> None:
        super().__init__()
        self.gamma, self.scale = _empty(dim, *[1] * dims), dim**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(inner, 3), CausalConv3d(inner, outer)
        self.norm2, self.conv2 = Norm(outer, 3), CausalConv3d(outer, outer)
        self.conv_shortcut = (
            nn.Identity() if inner == outer else CausalConv3d(inner, outer, (1, 1, 1), (0, 0, 0))
        )


class AttentionBlock(nn.Module):
    """Attention of one head within each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.to_qkv, self.proj = (
            Norm(dim, 2),
            Conv2d(dim, 3 * dim, 1),
            Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] to the same shape."""
        frames = x.transpose(1, 2).flatten(0, 1)  # [B T, C, H, W]
        # [B T, 1, H W, 3 C]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1)
        out = F.scaled_dot_product_attention(*(t.contiguous() for t in qkv.chunk(3, -1)))
        out = self.proj(out.squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:]))
        return out.unflatten(0, (x.shape[0], -1)).transpose(1, 2) + x


class Double(nn.Module):
    def forward(self, frames: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C, 2 H, 2 W]."""
        return F.interpolate(frames.float(), scale_factor=2.0, mode="nearest-exact").to(
            frames.dtype
        )


class Resample(nn.Module):
    """Half or twice as high and wide; the 3-D modes have a convolution over time as well."""

    def __init__(self, dim: int, mode: str) -> None:
        super().__init__()
        self.mode = mode
        up = mode.startswith("up")
        self.resample = nn.Sequential(
            Double() if up else nn.Identity(), Conv2d(dim, dim // 2 if up else dim, 3, 1)
        )
        if mode.endswith("3d"):
            self.time_conv = CausalConv3d(dim, 2 * dim if up else dim, (3, 1, 1), (int(up), 0, 0))


class MidBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])


class UpBlock(nn.Module):
    def __init__(self, inner: int, outer: int, count: int, mode: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(inner if i == 0 else outer, outer) for i in range(count + 1)]
        )
        self.upsamplers = nn.ModuleList([Resample(outer, mode)]) if mode else None


class Encoder(nn.Module):
    """Weights alone: it is run by diffusers."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        dims = [c.base_dim * m for m in (1, *c.dim_mult)]
        self.conv_in, scale = CausalConv3d(c.in_channels, dims[0]), 1.0
        blocks: list[nn.Module] = []
        for i, (inner, outer) in enumerate(pairwise(dims)):
            for k in range(c.num_res_blocks):
                blocks.append(ResidualBlock(inner if k == 0 else outer, outer))
                if scale in c.attn_scales:
                    blocks.append(AttentionBlock(outer))
            if i != len(c.dim_mult) - 1:
                blocks.append(
                    Resample(outer, "downsample3d" if c.temperal_downsample[i] else "downsample2d")
                )
                scale /= 2
        self.down_blocks, self.mid_block = nn.ModuleList(blocks), MidBlock(dims[-1])
        self.norm_out, self.conv_out = Norm(dims[-1], 3), CausalConv3d(dims[-1], 2 * c.z_dim)


class Decoder(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        base = c.decoder_base_dim or c.base_dim
        dims = [base * m for m in (c.dim_mult[-1], *c.dim_mult[::-1])]
        self.conv_in, self.mid_block, blocks = CausalConv3d(c.z_dim, dims[0]), MidBlock(dims[0]), []
        for i, (inner, outer) in enumerate(pairwise(dims)):
            last = i == len(c.dim_mult) - 1
            mode = (
                None if last else "upsample3d" if c.temperal_downsample[::-1][i] else "upsample2d"
            )
            blocks.append(UpBlock(inner if i == 0 else inner // 2, outer, c.num_res_blocks, mode))
        self.up_blocks = nn.ModuleList(blocks)
        self.norm_out, self.conv_out = Norm(dims[-1], 3), CausalConv3d(dims[-1], c.out_channels)


class WanVae(nn.Module):
    """The weights of an `AutoencoderKLWan` of Wan 2.1's kind.

    Args:
        config: its `config.json`; `is_plain` says whether it is of this kind.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        c = self.config = SimpleNamespace(**{k: config.get(k, v) for k, v in DEFAULTS.items()})
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        ones = (1, 1, 1), (0, 0, 0)
        self.quant_conv = CausalConv3d(2 * c.z_dim, 2 * c.z_dim, *ones)
        self.post_quant_conv = CausalConv3d(c.z_dim, c.z_dim, *ones)


def is_plain(config: dict[str, Any]) -> bool:
    """Whether a config is of Wan 2.1's kind: no patches, no residual up-sampling, a scale for every
    doubling."""
    c: dict[str, Any] = {k: config.get(k, v) for k, v in DEFAULTS.items()}
    return (
        c["patch_size"] is None
        and not c["is_residual"]
        and len(c["temperal_downsample"]) >= len(c["dim_mult"]) - 1
    )


def in_channels_last(model: torch.nn.Module) -> torch.nn.Module:
    """A VAE with its 3-D convolutions' weights in the layout in which a CPU is about twice as
    fast."""
    for parameter in model.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return model
