"""Names of parameters in the layouts that checkpoints are published in, as diffusers' or
transformers' and as ours: Wan's transformers, UMT5 encoders, Wan 2.1's VAE."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

from nexus_rt.models.wan import FUSED

ORIGINAL_NAMES = [  # Wan's own names -> diffusers', as diffusers' conversion script maps them
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (
        r"\.norm3\.",
        ".norm2.",
    ),  # Wan counts its norms 1, 3, 2: the affine one before cross-attention is its third
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn[12])\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn[12])\.o\.", r".\1.to_out.0."),
]


# What a transformer's names begin with where it was saved as part of something: `diffusion_model`
# by ComfyUI, `transformer_2` by diffusers, `pipe.dit` by DiffSynth.
HOLDERS = re.compile(r"^(?:(?:model|diffusion_model|transformer(?:_2)?|pipe|dit)\.)+")


def diffusers_name(name: str) -> str:
    """A parameter's name in diffusers' layout, given either layout's, with or without the names of
    what held the transformer."""
    name = HOLDERS.sub("", name)
    for pattern, replacement in ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def fused_place(name: str, shape: Callable[[str], tuple[int, ...]]) -> tuple[str, slice | None]:
    """Where diffusers' parameter `name` lies in our model: our name, and its rows there (None: all
    of them)."""
    for ours, theirs in FUSED.items():
        for i, part in enumerate(theirs):
            if f".{part}." in name:
                target = name.replace(part, ours)
                rows = shape(target)[0] // len(theirs)
                return target, slice(i * rows, (i + 1) * rows)
    return name, None


def fused_parts(name: str) -> tuple[str, ...]:
    """Our parameter's names in diffusers' layout: those it is made of, or itself."""
    for ours, theirs in FUSED.items():
        if f".{ours}." in name:
            return tuple(name.replace(ours, part) for part in theirs)
    return (name,)


def diffusers_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes our parameters have in a diffusers checkpoint."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        parts = fused_parts(name)
        rows = parameter.shape[0] // len(parts)
        shapes |= dict.fromkeys(parts, (rows, *parameter.shape[1:]))
    return shapes


def to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in diffusers' names: the fused projections split (views, not copies)."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = fused_parts(name)
        out.update(
            zip(parts, tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,), strict=True)
        )
    return out


T5_NAMES = [  # Wan's own UMT5 -> transformers' UMT5EncoderModel
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
    # llama.cpp's, as GGUF files have them
    (r"^token_embd\.", "shared."),
    (r"^enc\.output_norm\.", "encoder.final_layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_norm\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^enc\.blk\.(\d+)\.ffn_norm\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^enc\.blk\.(\d+)\.attn_([qkvo])\.", r"encoder.block.\1.layer.0.SelfAttention.\2."),
    (
        r"^enc\.blk\.(\d+)\.attn_rel_b\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^enc\.blk\.(\d+)\.ffn_gate\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^enc\.blk\.(\d+)\.ffn_up\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^enc\.blk\.(\d+)\.ffn_down\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
]


def t5_name(name: str) -> str:
    """A parameter of a UMT5 encoder in transformers' names, given Wan's own, llama.cpp's or
    theirs."""
    name = re.sub(
        r"^(?:(?:model|text_encoder|(?:text_encoders?\.)?umt5xxl\.transformer)\.)+", "", name
    )
    for pattern, replacement in T5_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


VAE_NAMES = [  # Wan's own VAE -> diffusers' AutoencoderKLWan
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"^(encoder|decoder)\.middle\.0\.", r"\1.mid_block.resnets.0."),
    (r"^(encoder|decoder)\.middle\.1\.", r"\1.mid_block.attentions.0."),
    (r"^(encoder|decoder)\.middle\.2\.", r"\1.mid_block.resnets.1."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
]


RESIDUALS = 2  # of a stage; the decoder has one more, and then its up-sampler


def vae_name(name: str) -> str:
    """A parameter of Wan 2.1's VAE in diffusers' names, given Wan's own or theirs."""
    name = re.sub(r"^(?:(?:vae|first_stage_model)\.)+", "", name)
    for pattern, replacement in VAE_NAMES:
        name = re.sub(pattern, replacement, name)
    if match := re.match(r"^decoder\.upsamples\.(\d+)\.(.*)", name):
        stage, place = divmod(int(match[1]), RESIDUALS + 2)
        inner = f"resnets.{place}" if place <= RESIDUALS else "upsamplers.0"
        name = f"decoder.up_blocks.{stage}.{inner}.{match[2]}"
    return name
