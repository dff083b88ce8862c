"""The architecture of a Wan transformer, as its `config.json` states it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

import msgspec

from nexus_rt.core import documents
from nexus_rt.core.errors import ModelError

IMAGE_CHANNELS = 36  # of image-to-video models: 16 of noise, 16 of the image, 4 of the mask

Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]
Width = Annotated[int, msgspec.Meta(ge=1, le=2**20)]


class _Stored(msgspec.Struct):
    """The fields of a `config.json` that make a `WanConfig`, with the ranges of any model."""

    num_attention_heads: Count
    # RoPE turns pairs
    attention_head_dim: Annotated[int, msgspec.Meta(ge=2, le=1024, multiple_of=2)]
    ffn_dim: Width
    num_layers: Count
    patch_size: Annotated[
        list[Annotated[int, msgspec.Meta(ge=1, le=64)]], msgspec.Meta(min_length=3, max_length=3)
    ] = msgspec.field(default_factory=lambda: [1, 2, 2])
    in_channels: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    out_channels: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    text_dim: Width = 4096
    freq_dim: Annotated[int, msgspec.Meta(ge=2, le=2**16, multiple_of=2)] = 256
    cross_attn_norm: bool = True
    eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-6
    rope_max_seq_len: Annotated[int, msgspec.Meta(ge=1, le=2**24)] = 1024


@dataclass(frozen=True)
class WanConfig:
    """Architecture, in the words of diffusers' `config.json`; the defaults are Wan2.1-T2V-14B."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: dict) -> WanConfig:
        """Read a diffusers `config.json`, or an original Wan one (`dim`, `num_heads`,
        `model_type`).

        Raises:
            ModelError: the config is of another architecture (image-to-video, other norms).
        """
        if "dim" in config and "num_heads" in config:
            for key in ("dim", "num_heads"):
                documents.check(config[key], Width, f"config.json's {key}")
            if config["dim"] % config["num_heads"]:
                raise ModelError(
                    f"config.json sets dim={config['dim']}, which num_heads={config['num_heads']}"
                    " does not divide.",
                    code="mismatch",
                    param="dim",
                )
            config = {
                **config,
                "num_attention_heads": config["num_heads"],
                "attention_head_dim": config["dim"] // config["num_heads"],
                "in_channels": config.get("in_dim", 16),
                "out_channels": config.get("out_dim", 16),
            }
            if config.get("model_type", "t2v") != "t2v":
                raise ModelError(
                    f"model_type is {config['model_type']!r}; only text-to-video ('t2v') Wan models"
                    " run here.",
                    code="unsupported",
                    param="model_type",
                )
        missing = [
            k
            for k in ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers")
            if k not in config
        ]
        if missing:
            raise ModelError(
                f"config.json lacks {', '.join(missing)}; is this a Wan transformer folder?",
                code="missing",
                param=missing[0],
            )
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if config.get(key) is not None:
                raise ModelError(
                    f"config.json sets {key}={config[key]}: an image-to-video model; use a"
                    " text-to-video one.",
                    code="unsupported",
                    param=key,
                )
        if (
            config.get("in_channels") == IMAGE_CHANNELS
            and config.get("out_channels") != IMAGE_CHANNELS
        ):
            raise ModelError(
                f"config.json sets in_channels={IMAGE_CHANNELS}: an image-to-video model, which"
                " reads the image's channels beside the noise's; use a text-to-video one.",
                code="unsupported",
                param="in_channels",
            )
        if config.get("qk_norm", "rms_norm_across_heads") not in ("rms_norm_across_heads", True):
            raise ModelError(
                f"qk_norm is {config['qk_norm']!r}; expected 'rms_norm_across_heads', as Wan 2.1"
                " has it.",
                code="unsupported",
                param="qk_norm",
            )
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        patch = known.get("patch_size", (1, 2, 2))
        known["patch_size"] = list(patch) if isinstance(patch, list | tuple) else [1, patch, patch]
        stored = documents.check(
            known, _Stored, "config.json", remedy="take the one that belongs to the weights"
        )
        values = {name: getattr(stored, name) for name in known}
        values["patch_size"] = tuple(stored.patch_size)
        values["out_channels"] = stored.out_channels or stored.in_channels
        return cls(**values)
