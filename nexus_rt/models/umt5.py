"""UMT5's encoder (arXiv 2304.09151), Wan's text encoder, under transformers' parameter names.

It differs from T5 (arXiv 1910.10683) in that every layer has its own relative position bias.
Written here because importing transformers' models takes longer than a small clip; agrees with
`transformers.UMT5EncoderModel`.
"""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor, nn

from nexus_rt.core.errors import ModelError
from nexus_rt.models.layers import ACTIVATIONS, Embedding, Linear, RMSNorm, check_positive

SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"


class Umt5Config(msgspec.Struct, frozen=True):
    """The fields of transformers' `UMT5Config` that an encoder computes with, and its defaults."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        check_positive(self)
        # Half of the buckets look each way, and half of those are single positions.
        if (
            self.relative_attention_num_buckets < 4
            or self.relative_attention_max_distance <= self._exact
        ):
            raise ModelError(
                f"relative_attention_num_buckets={self.relative_attention_num_buckets} with"
                f" relative_attention_max_distance={self.relative_attention_max_distance}; expected"
                " at least 4 buckets and a distance above a quarter of them.",
                code="out_of_range",
                param="relative_attention_num_buckets",
            )
        if self.activation not in ACTIVATIONS:
            raise ModelError(
                f"feed_forward_proj is {self.feed_forward_proj[:80]!r}; expected one of"
                f" {', '.join(ACTIVATIONS)}, or gated-...",
                code="unknown_name",
                param="feed_forward_proj",
            )

    @property
    def _exact(self) -> int:
        return self.relative_attention_num_buckets // 4

    @property
    def activation(self) -> str:
        """The name of the feed-forward layers' activation: T5's "gated-gelu" is the tanh
        approximation."""
        return (
            "gelu_new"
            if self.feed_forward_proj == "gated-gelu"
            else self.feed_forward_proj.removeprefix("gated-")
        )


class SelfAttention(nn.Module):
    """Attention without a scale, plus the layer's own relative position bias."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.heads, inner = config.num_heads, config.num_heads * config.d_kv
        self.q, self.k, self.v = (Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = Embedding(
            config.relative_attention_num_buckets, config.num_heads
        )

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, D], buckets [L, L] int64, additive mask [B, 1, 1, L] -> [B, L, D]."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        bias = self.relative_attention_bias(buckets).permute(2, 0, 1)
        scores = q @ k.transpose(-1, -2) + bias + mask
        # In the layer's precision, as transformers': a float32 softmax would be another model's
        # numbers.
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, activation (times a second linear where gated), linear."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.activation = config.activation
        if config.feed_forward_proj.startswith("gated-"):
            self.wi_0, self.wi_1 = (
                Linear(config.d_model, config.d_ff, bias=False) for _ in range(2)
            )
        else:
            self.wi = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        inner = act(self.wi_0(x)) * self.wi_1(x) if hasattr(self, "wi_0") else act(self.wi(x))
        # kept in float32 beside float16, whose range it leaves
        return self.wo(inner.to(self.wo.weight.dtype))


class Sublayer(nn.Module):
    """x + layer(norm(x)), the layer under transformers' name for it."""

    def __init__(self, name: str, layer: nn.Module, config: Umt5Config) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        x = x + getattr(self, self.name)(self.layer_norm(x), *args)
        if x.dtype == torch.float16:  # an overflow stays finite, as in transformers
            most = torch.finfo(torch.float16).max
            x = x.clamp(-(most - 1000), most - 1000) if x.isinf().any() else x
        return x


class Block(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [
                Sublayer("SelfAttention", SelfAttention(config), config),
                Sublayer("DenseReluDense", FeedForward(config), config),
            ]
        )

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, buckets, mask))


class Stack(nn.Module):
    """Blocks and the last norm."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.block = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class Umt5Encoder(nn.Module):
    """Token ids and mask [B, L] int64 to the last hidden states [B, L, D]."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.shared(ids)
        additive = (1 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        buckets = position_buckets(ids.shape[1], self.config, ids.device)
        for block in self.encoder.block:
            x = block(x, buckets, additive)
        return self.encoder.final_layer_norm(x)


def position_buckets(length: int, config: Umt5Config, device: torch.device) -> Tensor:
    """The bucket [L, L], int64, of each key's position relative to each query's (T5, section 2.1):
    half of the buckets for keys behind and half for keys ahead, in each half one a position at
    first, then logarithmically wider ones.
    """
    position = torch.arange(length, device=device)
    offset = position[None] - position[:, None]
    half, distance = config.relative_attention_num_buckets // 2, offset.abs()
    exact = half // 2
    wide = torch.log(distance.clamp_min(1).float() / exact) / math.log(
        config.relative_attention_max_distance / exact
    )
    far = (exact + (wide * (half - exact)).long()).clamp_max(half - 1)
    return torch.where(offset > 0, half, 0) + torch.where(distance < exact, distance, far)
