"""The published form of the blend, as written: what the one-filter form is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_rt.upfb import EPS, BlendConfig, gaussian_taps


def four_filter_blend(v_small: Tensor, v_large: Tensor, w: float) -> Tensor:
    """The published form as written: low and high band of both velocities, each by its own blur,
    then the energy."""
    config = BlendConfig()
    taps = gaussian_taps(*v_small.shape[-2:], config.sigma(w)).float()
    channels = v_small.shape[1]
    kernel = torch.outer(taps, taps).expand(channels, 1, -1, -1)

    def low(v: Tensor) -> Tensor:
        planes = v.transpose(1, 2).flatten(0, 1)  # [B*T, C, H, W]
        out = F.conv2d(planes, kernel, padding=taps.numel() // 2, groups=channels)
        return out.unflatten(0, (v.shape[0], v.shape[2])).transpose(1, 2)

    low_band = w * low(v_small) + (1 - w) * low(v_large)
    high_band = (1 - w) * (v_large - low(v_large)) + config.gamma_hf * w * (v_small - low(v_small))
    u = low_band + high_band

    def rms(v: Tensor) -> Tensor:
        return v.pow(2).mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()

    aligned = v_large * (rms(v_small) / (rms(v_large) + EPS))
    target = (rms(v_small) + rms(aligned)) / 2
    return u * (target / (rms(u) + EPS))
