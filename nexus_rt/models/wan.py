"""The Wan 2.1 text-to-video diffusion transformer, written for inference.

The same function as diffusers' `WanTransformer3DModel` and Wan's own `WanModel`, with four
differences that do not change its value: Q, K and V of self-attention are one projection; RoPE
tables are real-valued and cached per grid; the cross-attention keys and values of every block are
computed once per context (`prepare_context`) and not at every step; and the zero padding of a
context, whose keys are all equal, is kept as one key that counts as many (an additive log-count in
the softmax), so that 512 padded tokens cost as many keys as the prompt has words.

Parameters carry diffusers' names, but for the fused ones: `FUSED` says which of theirs make one of
ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_rt.core.errors import InputError, choose
from nexus_rt.models.layers import Conv3d, Linear
from nexus_rt.models.quantized import QuantizedLinear, takes_rows
from nexus_rt.models.quantized_products import Rows8
from nexus_rt.models.wan_config import WanConfig
from nexus_rt.ops.attention import ATTENTION_BACKENDS, ATTENTION_NAMES, attend, takes_bias
from nexus_rt.ops.block_ops import TORCH, Ops, choose_ops, tanh_gelu

# our parameter prefix -> diffusers' parameter prefixes, concatenated along the first dimension
FUSED = {
    "attn1.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn2.to_kv": ("attn2.to_k", "attn2.to_v"),
}
# kept in float32 whatever the model's dtype, as diffusers' `_keep_in_fp32_modules` does
KEEP_FP32 = ("time_embedder", "scale_shift_table", "norm2")


@dataclass
class WanContext:
    """A prompt as the transformer reads it: cross-attention keys and values of every block.

    keys, values: one [N, L', heads, head_dim] a block. bias: [N, L'] float32 added to the scores
    (log of how many tokens a key stands for, -inf for none), or None where every token is its own
    key. N is the batch of a step: B samples, or 2B when each has its unconditional twin behind it.
    """

    keys: list[Tensor]
    values: list[Tensor]
    bias: Tensor | None

    @property
    def batch(self) -> int:
        return self.keys[0].shape[0]


def collapse_padding(context: Tensor, at_least: int = 1) -> tuple[Tensor, Tensor | None]:
    """Keep one of the zero rows that end each sample of `context` [N, L, D], and say how many it
    stands for.

    `at_least` tokens are kept, so that a caller can have one length for many prompts.

    Returns the shorter context [N, L', D] and the additive bias [N, L'] in float32 (None if nothing
    collapses).
    """
    length = context.shape[1]
    used = (context != 0).any(-1)  # [N, L]
    # tokens up to the last that is not zero
    real = (used * torch.arange(1, length + 1, device=context.device)).amax(1)
    kept = max(at_least, int(real.max()) + 1)
    if kept >= length:
        return context, None
    position = torch.arange(kept, device=context.device)[None]
    count = torch.where(
        position < real[:, None],
        1.0,
        torch.where(position == real[:, None], length - real[:, None], 0.0),
    )
    return context[:, :kept], count.log()


def _table(rows: int, dim: int) -> nn.Parameter:
    """A modulation table [1, rows, dim], random but for the meta device."""
    table = torch.empty(1, rows, dim)
    return nn.Parameter(table if table.is_meta else table.normal_() / dim**0.5)


class Attention(nn.Module):
    """Wan's attention: RMSNorm of Q and K over all heads together, then heads."""

    def __init__(self, config: WanConfig, cross: bool) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.cross, self.eps = config.num_attention_heads, cross, config.eps
        self.ops: Ops = TORCH
        self.backend: str = "auto"
        self.sequence: Any = None  # tokens that other processes have (nexus_rt.parallel.sequence)
        if cross:
            self.to_q = Linear(dim, dim)
            self.to_kv = Linear(dim, 2 * dim)
        else:
            self.to_qkv = Linear(dim, 3 * dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values [N, L, heads, head_dim] of an embedded context [N, L,
        dim]."""
        k, v = self.to_kv(context).chunk(2, -1)
        return self._heads(self.norm_k(k)), self._heads(v).contiguous()

    def self_attention(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The layer's output, of its own `to_qkv` of the tokens."""
        return self.to_out[0](self._attend_qkv(qkv, rope))

    def _attend_qkv(self, qkv: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        # a frame of its own: Q and K are gone before the output projection
        q, k = self.ops.qk_norm_rope(
            qkv, self.norm_q.weight, self.norm_k.weight, *rope, self.heads, self.eps
        )
        v = self._heads(qkv.chunk(3, -1)[2])
        if self.sequence is None:
            return attend(q, k, v, None, self.backend).flatten(2)
        q, k, v = self.sequence.heads((q, k, v))
        return self.sequence.tokens(attend(q, k, v, None, self.backend)).flatten(2)

    def cross_attention(
        self, x: Tensor | Rows8, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> Tensor:
        q = self._heads(self.norm_q(self.to_q(x)))
        return self.to_out[0](attend(q, k, v, bias, self.backend).flatten(2))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear; `net.0.proj` and `net.2` as diffusers names them."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.ops = TORCH
        self.net = nn.ModuleDict(
            {"0": nn.ModuleDict({"proj": Linear(dim, inner)}), "2": Linear(inner, dim)}
        )

    @property
    def second(self) -> Linear:
        """The linear layer after the activation."""
        return cast(Linear, self.net["2"])

    @property
    def first(self) -> Linear:
        """The linear layer before it."""
        return cast(Linear, cast(nn.ModuleDict, self.net["0"])["proj"])

    def forward(self, x: Tensor | Rows8) -> Tensor:
        first = self.first
        if isinstance(first, QuantizedLinear):
            inner, second = first(x), self.second
            if takes_rows(second) and self.ops.quantise_rows is not None:
                values, scales = self.ops.quantise_rows(inner, True)
                return second(Rows8(values, scales, inner.shape))
            return second(tanh_gelu(inner))
        return self.second(self.ops.linear_gelu(x, first.weight, first.bias))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by the
    timestep."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.eps, self.ops = config.eps, TORCH
        self.attn1 = Attention(config, cross=False)
        self.attn2 = Attention(config, cross=True)
        self.norm2 = (
            nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else nn.Identity()
        )
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.scale_shift_table = _table(6, config.dim)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block, its residuals added where the next norm reads them.

        Args:
            x, y, gate: the residual stream [N, L, dim] and what the block before still has to add,
                `gate * y`.
            modulation: of the timestep [M, 6, dim], M = N or 1.

        Returns:
            The stream, and this block's own y and gate.
        """
        table = (self.scale_shift_table + modulation).transpose(0, 1).contiguous()
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(0)  # [M, dim] each
        x, h = self._into(self.attn1.to_qkv, x, scale1, shift1, y, gate)
        qkv = self.attn1.to_qkv(h)
        del h  # here and below: what is dead is not kept beside the widest point
        attended = self.attn1.self_attention(qkv, rope)
        del qkv
        # an affine norm is a modulation by weight - 1 and bias
        if isinstance(self.norm2, nn.LayerNorm):
            scale, shift = self.norm2.weight[None] - 1, self.norm2.bias[None]
            x, h = self._into(self.attn2.to_q, x, scale, shift, attended, gate1)
        else:
            x = torch.addcmul(x.float(), attended.float(), gate1.unsqueeze(1)).to(x.dtype)
            h = x.to(self._dtype)
        attended = self.attn2.cross_attention(h, k, v, bias)
        x, h = self._into(self.ffn.first, x, scale2, shift2, attended)
        del attended
        return x, self.ffn(h), gate2

    @property
    def _dtype(self) -> torch.dtype:
        """What its products compute in."""
        return cast(torch.dtype, self.ffn.second.compute_dtype)

    def _into(
        self,
        layer: nn.Module,
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        y: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """The stream with `gate * y`, and its modulated norm as a layer takes it: in 8-bit rows
        where it multiplies those. A float32 stream beside narrower weights is the published
        numerics, and PyTorch's alone."""
        ops = self.ops if x.dtype == self._dtype else TORCH
        if ops.modulate_rows is not None and takes_rows(layer):
            x, (values, scales) = ops.modulate_rows(x, scale, shift, self.eps, y, gate)
            return x, Rows8(values, scales, x.shape)
        x, h = ops.modulate(x, scale, shift, self.eps, y, gate)
        return x, h.to(self._dtype)


def _linear_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


class ConditionEmbedder(nn.Module):
    """Timestep and text embeddings, under diffusers' parameter names."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        pair = lambda inner: nn.ModuleDict(
            {"linear_1": Linear(inner, dim), "linear_2": Linear(dim, dim)}
        )
        self.freq_dim = config.freq_dim
        self.time_embedder = pair(config.freq_dim)
        self.time_proj = Linear(dim, 6 * dim)
        self.text_embedder = pair(config.text_dim)

    def time(self, timestep: Tensor, wide: bool = False) -> tuple[Tensor, Tensor]:
        """timestep [M] -> embedding [M, dim] and modulation [M, 6, dim], float32; wide: projected
        in float32 too."""
        half = self.freq_dim // 2
        freq = torch.exp(
            -math.log(10000.0)
            * torch.arange(half, dtype=torch.float32, device=timestep.device)
            / half
        )
        angle = timestep.float()[:, None] * freq
        h = torch.cat([angle.cos(), angle.sin()], -1).to(
            cast(Linear, self.time_embedder["linear_1"]).weight.dtype
        )
        h = self.time_embedder["linear_2"](F.silu(self.time_embedder["linear_1"](h)))
        if wide:
            return h, _linear_float32(self.time_proj, F.silu(h.float())).unflatten(1, (6, -1))
        h = h.to(self.time_proj.weight.dtype)
        return h, self.time_proj(F.silu(h)).unflatten(1, (6, -1)).float()

    def text(self, context: Tensor) -> Tensor:
        h = F.gelu(self.text_embedder["linear_1"](context), approximate="tanh")
        return self.text_embedder["linear_2"](h)


class WanTransformer(nn.Module):
    """Wan 2.1 T2V. `velocity = model(latents, timestep, model.prepare_context(prompt_embeds))`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = Conv3d(
            config.in_channels, config.dim, config.patch_size, config.patch_size
        )
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.proj_out = Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.scale_shift_table = _table(2, config.dim)
        self.ops = TORCH
        # As published: residual stream, time projection and velocity in float32 whatever the
        # weights are kept in.
        self.float32_stream = False
        self.stream: Any = None  # brings each block before it runs (nexus_rt.memory.streaming)
        self.sequence: Any = None  # its share of the tokens (nexus_rt.parallel.sequence)
        self.loaded_from: Any = None  # what it was made of (nexus_rt.loading.swap)

    def _in_turn(self) -> Iterator[Block]:
        for i, block in enumerate(self.blocks):
            if self.stream is not None:
                self.stream.bring(i)
            yield cast(Block, block)

    def share_tokens(self, sequence: Any) -> None:
        """Compute this process's share of the tokens, a `nexus_rt.parallel.sequence.Sequence`."""
        self.sequence = sequence
        for block in self.blocks:
            cast(Block, block).attn1.sequence = sequence

    def use_kernels(self, kernels: str = "auto", attention: str = "auto") -> WanTransformer:
        """Choose what computes norms, RoPE and modulation, and what computes attention.

        Args:
            kernels: "torch", "triton", or "auto": triton where the device can.
            attention: a backend of `nexus_rt.ops.attention`, or "auto" or "auto-fp8". An
                approximate one computes self-attention; cross-attention, some 2% of the work, stays
                exact.

        Raises:
            InputError: an unknown name, or triton asked for where it cannot run.
        """
        choose("attention backend", attention, ATTENTION_NAMES)
        ops = choose_ops(kernels, self.device)
        for module in self.modules():
            if isinstance(module, (WanTransformer, Block, Attention, FeedForward, QuantizedLinear)):
                module.ops = ops
            if isinstance(module, Attention):
                exact = attention in ATTENTION_BACKENDS and ATTENTION_BACKENDS[attention].exact
                module.backend = attention if exact or not module.cross else "auto"
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def prepare_context(self, context: Tensor, collapse: bool = True) -> WanContext:
        """Keys and values of every block for text embeddings [N, L, text_dim]; once per prompt.

        Args:
            collapse: count the zero padding at the end once (module docstring); False keeps every
                padded token.

        Raises:
            InputError: the embeddings are not three-dimensional or of another width.
        """
        if context.ndim != 3 or context.shape[-1] != self.config.text_dim:
            raise InputError(
                f"context has shape {tuple(context.shape)}; expected [batch, tokens,"
                f" {self.config.text_dim}], the text encoder's hidden size of this transformer.",
                code="mismatch",
                param="context",
            )
        context = context.to(self.device, self.dtype)
        collapse = collapse and takes_bias(cast(Block, self.blocks[0]).attn2.backend, self.device)
        context, bias = collapse_padding(context) if collapse else (context, None)
        embedded = self.condition_embedder.text(context)
        pairs = [block.attn2.keys_values(embedded) for block in self._in_turn()]
        return WanContext([k for k, _ in pairs], [v for _, v in pairs], bias)

    def forward(self, latents: Tensor, timestep: Tensor, context: WanContext) -> Tensor:
        """Predict the flow velocity.

        Args:
            latents: [N, C, T, H, W], H and W multiples of the patch size.
            timestep: scalar, or [N], on the scale 0..1000; a scalar's embedding is computed once
                for the batch.
            context: of `prepare_context`, batch N.

        Returns:
            velocity [N, C, T, H, W] in the model's dtype; float32 with `float32_stream`.
        """
        frames, height, width = latents.shape[2:]
        pt, ph, pw = self.config.patch_size
        grid = (frames // pt, height // ph, width // pw)
        rope = self.ops.rope(self.config.attention_head_dim, grid, latents.device)
        wide = self.float32_stream and self.dtype != torch.float32
        x = self.patchify(latents.to(self.dtype))
        if self.sequence is not None:
            self.sequence.length = x.shape[1]
            x = self.sequence.own(x, 1)
            rope = (self.sequence.own(rope[0], 0), self.sequence.own(rope[1], 0))
        x = x.float() if wide else x
        embedding, modulation = self.condition_embedder.time(timestep.reshape(-1), wide)
        y = gate = None
        for block, k, v in zip(self._in_turn(), context.keys, context.values, strict=True):
            x, y, gate = block(x, y, gate, modulation, rope, k, v, context.bias)
        shift, scale = (
            (self.scale_shift_table + embedding.float()[:, None])
            .transpose(0, 1)
            .contiguous()
            .unbind(0)
        )
        x = (TORCH if wide else self.ops).modulate(x, scale, shift, self.config.eps, y, gate)[1]
        x = _linear_float32(self.proj_out, x) if wide else self.proj_out(x)
        if self.sequence is not None:
            x = self.sequence.whole(x)
        x = x.unflatten(1, grid).unflatten(-1, (pt, ph, pw, -1))  # [N, t, h, w, pt, ph, pw, C]
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(latents.shape[0], -1, *latents.shape[2:])

    def patchify(self, latents: Tensor) -> Tensor:
        """[N, C, T, H, W] -> tokens [N, L, dim]: the patch convolution as one matrix product."""
        pt, ph, pw = self.config.patch_size
        # [N, C, t, pt, h, ph, w, pw]
        x = latents.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
