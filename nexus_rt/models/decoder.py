"""A whole clip through Wan's VAE decoder in one pass: for clips small enough that what lies between
its layers fits.

diffusers decodes a latent frame at a time and keeps, for every convolution over time, the two
frames before; the values are those of one pass in which nothing, which is zeros, comes before the
first frame, and in which the first frame goes round every doubling of time. On a CPU the
convolutions are oneDNN's whatever their size: PyTorch gives those of one clip of few channels to a
loop that takes ten to eighty times as long. The modules are diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def can_decode_whole(vae: Any) -> bool:
    """Whether a VAE is of the kind that `decode_whole` knows: Wan 2.1's, without patches or
    residual up-sampling."""
    return vae.config.patch_size is None and not vae.config.is_residual


def _conv(conv: Any, x: Tensor) -> Tensor:
    """A causal convolution: as many empty frames before the first as the kernel looks back."""
    left, _, top, _, before, _ = conv._padding
    if before:
        b, c, t, h, w = x.shape
        whole = torch.empty(
            (b, c, t + before, h, w),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last_3d,
        )
        whole[:, :, :before] = 0
        whole[:, :, before:] = x
        x = whole
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(
            x, conv.weight, conv.bias, (0, top, left), (1, 1, 1), (1, 1, 1), 1
        )
    return F.conv3d(x, conv.weight, conv.bias, padding=(0, top, left))


def _norm(norm: Any, x: Tensor) -> Tensor:
    """x over its length along the channels, times their root and gamma."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    return (x * length.reciprocal_().to(x.dtype)).mul_(norm.scale * norm.gamma)


def _resnet(block: Any, x: Tensor) -> Tensor:
    out = _conv(block.conv1, F.silu(_norm(block.norm1, x), inplace=True))
    out = _conv(block.conv2, F.silu(_norm(block.norm2, out), inplace=True))
    return out.add_(
        x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x)
    )


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] to [B T, C, H, W]; a view in channels-last layout."""
    return x.transpose(1, 2).flatten(0, 1)


def _upsample(block: Any, x: Tensor) -> Tensor:
    """Twice as high and wide; in "upsample3d" every frame but the first becomes two."""
    b, c, t = x.shape[:3]
    if block.mode == "upsample3d" and t > 1:
        pairs = _conv(block.time_conv, x[:, :, 1:])  # [B, 2 C, T-1, H, W]
        pairs = pairs.unflatten(1, (2, c)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        x = torch.cat([x[:, :, :1], pairs], 2)
    x = block.resample(_frames(x))
    return x.unflatten(0, (b, -1)).transpose(1, 2)


@torch.no_grad()
def decode_whole(vae: Any, z: Tensor) -> Tensor:
    """The VAE's own latents [B, C, T, H, W] to frames [B, 3, 4 (T-1) + 1, 8 H, 8 W] in [-1, 1]."""
    decoder = vae.decoder
    x = _conv(decoder.conv_in, _conv(vae.post_quant_conv, z))
    first, *rest = decoder.mid_block.resnets
    x = _resnet(first, x)
    for attention, resnet in zip(decoder.mid_block.attentions, rest, strict=True):
        x = _resnet(resnet, x if attention is None else attention(x))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        if block.upsamplers is not None:
            x = _upsample(block.upsamplers[0], x)
    x = _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, x), inplace=True))
    return x.clamp_(-1, 1)
