"""A Llama language model without its head, under transformers' parameter names: the understanding
model of the published checkpoints and of the miniature pair.

Read for its hidden states, and for short greedy answers. Written here because importing
transformers' models takes longer than a small clip; agrees with
`transformers.LlamaModel`. Other architectures, and quantised ones, are transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_rt.core.documents import check
from nexus_rt.core.errors import ModelError
from nexus_rt.models.layers import ACTIVATIONS, Embedding, Linear, RMSNorm, check_positive

ROPE_TYPES = ("default", "linear", "llama3")


class Rope(msgspec.Struct, frozen=True):
    """Rotary frequencies: `rope_parameters` of transformers 5, or `rope_scaling` beside a
    `rope_theta` of version 4."""

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        numbers = [getattr(self, name) for name in self.__struct_fields__ if name != "rope_type"]
        if (
            self.rope_type not in ROPE_TYPES
            or min(numbers) <= 0
            or self.high_freq_factor <= self.low_freq_factor
        ):
            raise ModelError(
                f"{self} is no rotary embedding of Llama's; download the folder again.",
                code="invalid_value",
            )

    def frequencies(self, dim: int, device: torch.device) -> Tensor:
        """Radians a position [dim / 2], float32; "llama3" slows down the low ones (Llama 3.1's
        report, arXiv 2407.21783)."""
        plain = 1.0 / self.rope_theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
        if self.rope_type == "default":
            return plain
        if self.rope_type == "linear":
            return plain / self.factor
        # within the context of the pretraining
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        share = (
            (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        ).clamp(0, 1)
        return plain * (share + (1 - share) / self.factor)


class LlamaConfig(msgspec.Struct, frozen=True):
    """The fields of transformers' `LlamaConfig` that the backbone computes with, and its
    defaults."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_positive(self)
        if self.num_attention_heads % self.kv_heads or (
            self.head_dim is None and self.hidden_size % self.num_attention_heads
        ):
            raise ModelError(
                f"{self.num_attention_heads} attention heads do not divide"
                f" hidden_size={self.hidden_size}, or are no multiple of"
                f" num_key_value_heads={self.kv_heads}.",
                code="mismatch",
                param="num_attention_heads",
            )
        if self.width % 2:
            raise ModelError(
                f"heads are {self.width} wide; rotary embeddings need an even width.",
                code="invalid_value",
                param="head_dim",
            )

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width(self) -> int:
        """Elements of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> Rope:
        scaling = dict(self.rope_parameters or self.rope_scaling or {})
        scaling.setdefault("rope_type", scaling.pop("type", "default"))
        scaling.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        return check(
            {"rope_theta": self.rope_theta, **scaling},
            Rope,
            "the rotary embedding",
            remedy="download the folder again",
        )


def is_native(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of a model that this file computes."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or "partial_rotary_factor" in rope:
        return False
    return (
        config.get("model_type") == "llama"
        and config.get("architectures") in (["LlamaForCausalLM"], ["LlamaModel"])
        and rope.get("rope_type", rope.get("type", "default")) in ROPE_TYPES
        and str(config.get("hidden_act", "silu")) in ACTIVATIONS
        and not config.get("quantization_config")
    )


class Attention(nn.Module):
    """Causal self-attention with rotary embeddings, a key head for every few query heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = (
            config.num_attention_heads,
            config.kv_heads,
            config.width,
        )
        rows = (self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width)
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(config.hidden_size, n, bias=config.attention_bias) for n in rows
        )
        self.o_proj = Linear(
            self.heads * self.width, config.hidden_size, bias=config.attention_bias
        )

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: list[Tensor] | None = None,
    ) -> Tensor:
        """x [B, L, D], cosines and sines [L, width], mask [B, 1, L, L + P] of bool -> [B, L, D].

        cache: keys and values of P earlier tokens (empty before the first), which gets these.
        """
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (_rotate(t, *rope) for t in (q, k))
        if cache is not None:
            if cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v), strict=True))
            cache[:] = [k, v]
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [B, H, L, width]; a pair is two numbers half a head apart."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Mlp(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        wide, inner, self.activation = (
            config.hidden_size,
            config.intermediate_size,
            ACTIVATIONS[config.hidden_act],
        )
        self.gate_proj, self.up_proj = (Linear(wide, inner, bias=config.mlp_bias) for _ in range(2))
        self.down_proj = Linear(inner, wide, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: list[Tensor] | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaBackbone(nn.Module):
    """Token ids and mask [B, L] int64 to the last hidden states [B, L, D]; a masked token is
    attended to nowhere."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config, self.rope = config, config.rope
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor, cache: list[list[Tensor]] | None = None) -> Tensor:
        """cache: a list for each layer, empty before the first call; mask then covers the earlier
        tokens too."""
        x, length = self.embed_tokens(ids), mask.shape[1]
        earlier = length - ids.shape[1]
        angles = torch.outer(
            torch.arange(earlier, length, device=ids.device).float(),
            self.rope.frequencies(self.config.width, ids.device),
        )
        angles = torch.cat([angles, angles], -1)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        causal = torch.ones(length - earlier, length, dtype=torch.bool, device=ids.device)
        visible = causal.tril(earlier) & mask[:, None, None].bool()
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, visible, None if cache is None else cache[i])
        return self.norm(x)


def greedy(
    model: LlamaBackbone,
    head: Tensor,
    ids: list[int],
    stop: set[int],
    limit: int,
    proceed: Callable[[], None] = lambda: None,
) -> list[int]:
    """Greedy continuation of token ids, without its stop token.

    Args:
        head: [vocabulary, D], the logits' weight.
        limit: most new tokens.
        proceed: called before every token; raises to end.
    """
    device, cache = head.device, [[] for _ in model.layers]  # type: ignore[var-annotated]
    new: list[int] = []
    row = torch.tensor([ids], device=device)
    while len(new) < limit:
        proceed()
        mask = torch.ones(1, len(ids) + len(new), dtype=torch.long, device=device)
        hidden = model(row, mask, cache)[0, -1]
        token = int((head @ hidden).argmax())
        if token in stop:
            break
        new.append(token)
        row = torch.tensor([[token]], device=device)
    return new
