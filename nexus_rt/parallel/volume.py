"""Bytes that a process sends to others in one step, from the shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nexus_rt.core.size import ClipSize
from nexus_rt.models.wan_config import WanConfig
from nexus_rt.parallel.layout import Layout

ELEMENT = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Volume:
    """Bytes sent by one process in a step of one generator, by what they are for.

    tokens: Q, K, V and the output of every self-attention, and the velocity's tokens. guidance: its
    half of a guided step. velocity: to the half that has the other generator.
    """

    tokens: int = 0
    guidance: int = 0
    velocity: int = 0

    @property
    def total(self) -> int:
        return self.tokens + self.guidance + self.velocity


def step_volume(layout: Layout, config: WanConfig, size: ClipSize, guided: bool) -> Volume:
    """Volume of a step of one sample."""
    n, samples = layout.ulysses, 2 if guided else 1
    halved = layout.cfg == 2 and guided
    own = 1 if halved else samples  # samples that a process computes
    share = -(-size.tokens(config.patch_size) // n)  # tokens of a process
    elsewhere = (n - 1) / n
    attention = 4 * share * config.dim * elsewhere * config.num_layers
    head = share * config.out_channels * math.prod(config.patch_size) * (n - 1)
    plane = config.out_channels * size.cells
    return Volume(
        int(own * ELEMENT * (attention + head)) if n > 1 else 0,
        plane * ELEMENT if halved else 0,
        4 * samples * plane if layout.pair == 2 else 0,  # float32
    )
