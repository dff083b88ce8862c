"""Configs read off the names and shapes of a checkpoint that has no `config.json`: single files of
Wan transformers, UMT5 encoders and VAEs; and the names that they have in diffusers and
transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.models.wan_config import IMAGE_CHANNELS, WanConfig

Shapes = Mapping[str, tuple[int, ...]]

VARIANTS = (  # parts of names -> the model that has them
    (r"(^|\.)(img_emb|image_embedder)\.|\.(k_img|v_img|add_k_proj)\.", "an image-to-video model"),
    (r"(^|\.)vace_(blocks|patch_embedding)\.", "a VACE (editing) model"),
    (r"(^|\.)(casual_audio_encoder|audio_injector|cond_encoder)\.", "a speech-to-video model"),
    (r"(^|\.)(face_adapter|face_encoder|motion_encoder|pose_patch_embedding)\.", "Wan-Animate"),
    (r"(^|\.)(control_adapter|ref_conv)\.", "a Fun-Control (camera or reference) model"),
)
OTHERS = (  # parts of names -> another family
    (r"(^|\.)double_blocks\.", "HunyuanVideo or FLUX"),
    (r"(^|\.)(joint_blocks|context_embedder)\.", "Stable Diffusion 3"),
    (r"(^|\.)(input_blocks|down_blocks)\.", "a U-Net (Stable Diffusion)"),
    (r"(^|\.)transformer_blocks\.", "another diffusion transformer (LTX, CogVideoX or FLUX)"),
    (r"(^|\.)layers\.\d+\.(attention|adaLN)", "another diffusion transformer (Lumina or Z-Image)"),
)
HEAD = 128  # wide as in every published Wan


def check_variant(names: Iterable[str], where: Path | str) -> None:
    """Raise where names are of a Wan model for another task than text-to-video."""
    for name in names:
        for pattern, kind in VARIANTS:
            if re.search(pattern, name):
                raise ModelError(
                    f"{where} is {kind}: it holds {shorten(name, 120)}; text-to-video Wan models"
                    f" run"
                    " here, such as Wan2.1-T2V or Wan2.2-T2V-A14B.",
                    code="unsupported",
                )


def _count(shapes: Shapes, pattern: str) -> int:
    """How many blocks the names of a pattern with one number count; a number far beyond them
    counts as one, so that nothing is built for a name alone."""
    found = {int(m[1]) for name in shapes if (m := re.search(pattern, name))}
    return min(1 + max(found, default=-1), 2 * len(found))


def wan_config(shapes: Shapes, where: Path | str) -> WanConfig:
    """The architecture of a whole Wan transformer, given its shapes in diffusers' names.

    Heads are 128 wide, as in every published one.

    Raises:
        ModelError: another task's or family's model, or shapes that are no Wan transformer's.
    """
    check_variant(shapes, where)
    try:
        patch = shapes["patch_embedding.weight"]
        text = shapes["condition_embedder.text_embedder.linear_1.weight"]
        ffn = shapes["blocks.0.ffn.net.0.proj.weight"]
        time = shapes["condition_embedder.time_embedder.linear_1.weight"]
        out = shapes["proj_out.weight"]
        dim, channels = patch[0], patch[1]
        size = (patch[2], patch[3], patch[4])
        fields = dict(
            patch_size=list(size),
            in_channels=channels,
            out_channels=out[0] // math.prod(size),
            text_dim=text[1],
            freq_dim=time[1],
            ffn_dim=ffn[0],
        )
    except KeyError as error:
        family = _family(shapes)
        raise ModelError(
            f"{where} is not a Wan transformer: it lacks {error.args[0]}{family}; expected a"
            " text-to-video Wan checkpoint."
        ) from None
    except (IndexError, ZeroDivisionError):
        raise ModelError(
            f"{where}: the weights are of no shapes that a Wan transformer has, such as a patch"
            f" embedding of {shorten(shapes['patch_embedding.weight'], 80)}; get the file again.",
            code="mismatch",
        ) from None
    if channels == IMAGE_CHANNELS and fields["out_channels"] != channels:
        raise ModelError(
            f"{where} is an image-to-video model: it reads {channels} channels, the image's beside"
            " the noise's; text-to-video Wan models run here.",
            code="unsupported",
        )
    head = HEAD if dim % HEAD == 0 else dim
    return WanConfig.from_dict(
        {
            **fields,
            "num_attention_heads": dim // head,
            "attention_head_dim": head,
            "num_layers": _count(shapes, r"^blocks\.(\d{1,6})\."),
            "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        }
    )


def _family(names: Iterable[str]) -> str:
    """What other family's names these are, in words."""
    for name in names:
        for pattern, family in OTHERS:
            if re.search(pattern, name):
                return f" and looks like {family}"
    return ""


def wan_vae_config(shapes: Shapes, where: Path | str) -> dict[str, Any]:
    """diffusers' `config.json` of Wan 2.1's VAE, given its shapes in diffusers' names.

    Raises:
        ModelError: no VAE of Wan 2.1's kind.
    """
    if any(re.search(r"\.(avg_shortcut|upsamples\.\d+\.upsamples)\.", name) for name in shapes):
        raise ModelError(
            f"{where} is Wan 2.2's VAE (48 channels, of the TI2V-5B model); Wan 2.1 and"
            " Wan2.2-T2V-A14B draw in Wan 2.1's latent space: expected Wan2.1_VAE.",
            code="unsupported",
        )
    try:
        base, latent = shapes["encoder.conv_in.weight"], shapes["post_quant_conv.weight"]
        return {"_class_name": "AutoencoderKLWan", "base_dim": base[0], "z_dim": latent[0]}
    except (KeyError, IndexError) as error:
        raise ModelError(
            f"{where} is no Wan VAE: it lacks {error}; expected Wan2.1_VAE, or diffusers'"
            " AutoencoderKLWan."
        ) from None


def umt5_config(shapes: Shapes, where: Path | str) -> dict[str, Any]:
    """transformers' `config.json` of a UMT5 encoder, given its shapes in transformers' names.

    Raises:
        ModelError: no UMT5 encoder's.
    """
    attention = "encoder.block.0.layer.0.SelfAttention"
    try:
        bias = shapes[f"{attention}.relative_attention_bias.weight"]
        query = shapes[f"{attention}.q.weight"]
        up = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"]
        vocabulary = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
        return {
            "model_type": "umt5",
            "architectures": ["UMT5EncoderModel"],
            "vocab_size": vocabulary[0],
            "d_model": vocabulary[1],
            "d_kv": query[0] // bias[1],
            "d_ff": up[0],
            "num_layers": _count(shapes, r"^encoder\.block\.(\d{1,6})\."),
            "num_heads": bias[1],
            "relative_attention_num_buckets": bias[0],
            "dropout_rate": 0.0,
            "feed_forward_proj": "gated-gelu",
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        plain = any("SelfAttention.q." in name for name in shapes)
        hint = " (a T5, whose layers share one position bias)" if plain else ""
        raise ModelError(
            f"{where} is no UMT5 encoder of Wan's{hint}: it lacks {error}; expected"
            " umt5-xxl's encoder, such as models_t5_umt5-xxl-enc-bf16."
        ) from None
