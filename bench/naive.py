"""The published form of the blend, as written: what the one-filter form is measured against."""

from __future__ import annotations

from torch import Tensor

from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.upfb import published_blend


def four_band_blend(v_small: Tensor, v_large: Tensor, w: float) -> Tensor:
    """The blend of low and high band of both velocities under the published split, with its
    energy."""
    return published_blend(v_small, v_large, w, BlendConfig())
