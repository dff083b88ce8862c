"""Architectures of the random generators that are measured: Wan 2.1's two, and one to try with."""

from typing import Any

from nexus_rt.core.size import ClipSize

WAN_1_3B: dict[str, Any] = dict(
    num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
)
WAN_14B: dict[str, Any] = dict(
    num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40
)
DRY: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=32, ffn_dim=96, num_layers=2, text_dim=48, freq_dim=32
)
WAN = {"small": WAN_1_3B, "large": WAN_14B}
SIZES = {"480p": ClipSize(832, 480, 81), "720p": ClipSize(1280, 720, 81)}  # of Wan's clips
