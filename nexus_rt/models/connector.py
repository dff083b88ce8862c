"""The connector: an understanding model's hidden states to context tokens of the small generator.

Two query transformers in a row, as Omni-Video has them (arXiv 2507.06119; Lumos-Nexus keeps them):
the *vision head* reads the hidden states of the whole prompt into a few visual tokens, and the
*adapter* turns each visual token, alone, into tokens of the generator's text width. Parameters
carry the published checkpoints' names (`decoder_query`, `fc.0`, `fc.2`, `visionHeadAdapter.*`,
`adapter.*`) under `vision_head.` and `adapter.`.

Everything here depends on the prompt alone: it runs once per prompt and never per step.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_rt.core.errors import InputError, ModelError, shorten, shown
from nexus_rt.models.layers import Linear
from nexus_rt.models.template import Template

SPECIAL_TOKENS = ("<img_st>", "<img_ed>", "<ipl_st>", "<ipl_ed>", "<prp_st>", "<prp_ed>")
TEXT_MARKERS = SPECIAL_TOKENS[2:]  # what text-to-video needs of them: no visual part, no reference
MAX_CONTEXT_LEN = 2560


LARGEST = {  # a connector's numbers are no larger, and building one of larger would hang
    "llm_hidden_size": 2**17,
    "vision_dim": 2**15,
    "vision_queries": 4096,
    "text_dim": 2**15,
    "adapter_queries": 2**15,
    "num_layers": 64,
    "num_heads": 1024,
    "max_context_len": 2**18,
}


@dataclass(frozen=True)
class ConnectorConfig:
    """Dimensions, by default those of the published checkpoints; `template` is the understanding
    model's."""

    llm_hidden_size: int = 4096
    vision_dim: int = 1152
    vision_queries: int = 4
    text_dim: int = 4096
    adapter_queries: int = 256
    num_layers: int = 4  # of each encoder and each decoder
    num_heads: int = 8
    max_context_len: int = MAX_CONTEXT_LEN
    template: Template = field(default_factory=Template)

    @classmethod
    def from_dict(cls, config: dict) -> ConnectorConfig:
        """Read `connector/config.json`.

        Raises:
            ModelError: an unknown field, or one that is no positive whole number.
        """
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in config.items() if not k.startswith("_")}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ModelError(
                f"the connector's config.json sets an unknown {shown(unknown[0])}; expected"
                f" {', '.join(sorted(known))}.",
                code="unknown_name",
                param=shorten(unknown[0], 60),
            )
        template = Template.from_dict(values.pop("template", {}))
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ModelError(
                    f"the connector's config.json sets {name}={shown(value)}; expected a"
                    " positive whole number.",
                    code="invalid_value",
                    param=name,
                )
            if value > LARGEST[name]:
                raise ModelError(
                    f"the connector's config.json sets {name}={value}; expected at most"
                    f" {LARGEST[name]}.",
                    code="out_of_range",
                    param=name,
                )
        checked = cls(**values, template=template)
        for name in ("vision_dim", "text_dim"):
            if getattr(checked, name) % checked.num_heads:
                raise ModelError(
                    f"the connector's {name}={getattr(checked, name)} is no multiple of"
                    f" num_heads={checked.num_heads}.",
                    code="mismatch",
                    param=name,
                )
        return checked


class Attention(nn.Module):
    """Multi-head attention under the parameter names of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight, self.in_proj_bias = (
            nn.Parameter(torch.empty(3 * dim, dim)),
            nn.Parameter(torch.zeros(3 * dim)),
        )
        self.out_proj = Linear(dim, dim)
        if not self.in_proj_weight.is_meta:
            nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        """Queries x [N, L, dim], keys and values source [N, S, dim]; mask [N, 1, 1, S] is True
        where a row counts."""
        if x is source:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            dim = x.shape[-1]
            q = F.linear(x, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
            k, v = F.linear(source, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out_proj(
            F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        )


class Layer(nn.Module):
    """A pre-norm layer: self-attention, in a decoder attention to the encoder, feed-forward;
    PyTorch's parameter names."""

    def __init__(self, dim: int, heads: int, decoder: bool) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads)
        if decoder:
            self.multihead_attn = Attention(dim, heads)
        self.linear1, self.linear2 = Linear(dim, 4 * dim), Linear(4 * dim, dim)
        norms = [nn.LayerNorm(dim) for _ in range(3 if decoder else 2)]
        self.norm1, self.norm2 = norms[:2]
        if decoder:
            self.norm3 = norms[2]

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """An encoder's x [N, S, dim] under mask, or a decoder's x [N, L, dim] that reads memory [N,
        S, dim] under it."""
        own = self.norm1(x)
        if memory is None:
            x = x + self.self_attn(own, own, mask)
            return x + self._feed(self.norm2(x))
        x = x + self.self_attn(own, own, None)
        x = x + self.multihead_attn(self.norm2(x), memory, mask)
        return x + self._feed(self.norm3(x))

    def _feed(self, x: Tensor) -> Tensor:
        return self.linear2(F.relu(self.linear1(x)))


class Stack(nn.Module):
    """Layers and a last norm."""

    def __init__(self, dim: int, layers: int, heads: int, decoder: bool) -> None:
        super().__init__()
        self.layers, self.norm = (
            nn.ModuleList([Layer(dim, heads, decoder) for _ in range(layers)]),
            nn.LayerNorm(dim),
        )

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask, memory)
        return self.norm(x)


class QueryTransformer(nn.Module):
    """Linear, GELU, Linear to `dim`; then an encoder-decoder whose target is `queries` learned
    vectors.

    The computation and the parameter names of `nn.Transformer(norm_first=True)`, which draws random
    numbers where it is built.

    Args:
        name: the attribute the published checkpoints keep the `nn.Transformer` under.
    """

    def __init__(
        self, width: int, dim: int, queries: int, layers: int, heads: int, name: str
    ) -> None:
        super().__init__()
        self.fc = nn.Sequential(Linear(width, dim), nn.GELU(), Linear(dim, dim))
        query = torch.empty(1, queries, dim)
        self.decoder_query = nn.Parameter(query if query.is_meta else query.normal_(std=0.02))
        self.name = name
        stacks = {
            "encoder": Stack(dim, layers, heads, False),
            "decoder": Stack(dim, layers, heads, True),
        }
        self.add_module(name, nn.ModuleDict(stacks))

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """[N, L, width] -> [N, queries, dim]; `padding` [N, L] is True at padding rows."""
        mask = None if padding is None else ~padding[:, None, None]
        transformer = getattr(self, self.name)
        memory = transformer["encoder"](self.fc(x), mask)
        return transformer["decoder"](self.decoder_query.expand(len(x), -1, -1), mask, memory)


class Connector(nn.Module):
    """Hidden states [N, L, llm_hidden_size] to adapter tokens [N, vision_queries * adapter_queries,
    text_dim].

    `special_tokens` maps the six markers to rows [n, text_dim]; `unconditional_text` [m, text_dim]
    and `unconditional_hidden` [L, llm_hidden_size] are what guidance is measured against, as
    published.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        c = self.config = config
        self.vision_head = QueryTransformer(
            c.llm_hidden_size,
            c.vision_dim,
            c.vision_queries,
            c.num_layers,
            c.num_heads,
            "visionHeadAdapter",
        )
        self.adapter = QueryTransformer(
            c.vision_dim, c.text_dim, c.adapter_queries, c.num_layers, c.num_heads, "adapter"
        )
        self.special_tokens: dict[str, Tensor] = {}
        self.unconditional_text: Tensor | None = None
        self.unconditional_hidden: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.adapter.decoder_query.dtype

    @property
    def device(self) -> torch.device:
        return self.adapter.decoder_query.device

    def forward(
        self, hidden: Tensor, single_frame: bool = False, padding: Tensor | None = None
    ) -> Tensor:
        """Adapter tokens of prompts' hidden states; a single frame takes the first visual token
        only.

        `padding` [N, L] is True at rows that are none, where prompts of several lengths come
        together.

        Raises:
            InputError: the hidden size is not the connector's.
        """
        if hidden.ndim != 3 or hidden.shape[-1] != self.config.llm_hidden_size:
            raise InputError(
                f"hidden states have shape {tuple(hidden.shape)}; this connector reads [batch,"
                f" tokens, {self.config.llm_hidden_size}]: pair it with the understanding model it"
                " was trained with.",
                code="mismatch",
            )
        visual = self.vision_head(hidden.to(self.device, self.dtype), padding)
        if single_frame:
            visual = visual[:, :1]
        # each visual token alone: sequence length 1
        tokens = self.adapter(visual.flatten(0, 1)[:, None])
        return tokens.unflatten(0, visual.shape[:2]).flatten(1, 2)

    def pack(
        self,
        text: Tensor,
        adapter: Tensor | None,
        visual: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        """One prompt's context [max_context_len, text_dim], zero-padded; each part [n, text_dim],
        the text unpadded.

        In the published order: visual, reference, adapter, text, each between its markers; what
        does not fit is cut at the end, and a warning names it.
        """
        parts: list[tuple[str, Tensor]] = []
        for name, pair, rows in (
            ("visual", "img", visual),
            ("reference", "img", reference),
            ("adapter", "ipl", adapter),
            ("text", "prp", text),
        ):
            if rows is not None:
                parts += [
                    (f"<{pair}_st>", self._marker(f"<{pair}_st>")),
                    (name, rows),
                    (f"<{pair}_ed>", self._marker(f"<{pair}_ed>")),
                ]
        context = torch.cat([rows.to(self.device, self.dtype) for _, rows in parts])
        limit = self.config.max_context_len
        if len(context) > limit:
            lost, start = [], 0
            for name, rows in parts:
                gone = min(len(rows), max(0, start + len(rows) - limit))
                lost += (
                    [name if name.startswith("<") else f"{gone} of {len(rows)} {name} tokens"]
                    if gone
                    else []
                )
                start += len(rows)
            warnings.warn(
                f"the context has {len(context)} tokens and is cut at {limit}, as published; lost:"
                f" {', '.join(lost)}.",
                stacklevel=2,
            )
            context = context[:limit]
        return F.pad(context, (0, 0, 0, limit - len(context)))

    def _marker(self, name: str) -> Tensor:
        if name not in self.special_tokens:
            raise ModelError(
                f"the connector has no special token {name}; expected {', '.join(SPECIAL_TOKENS)};"
                " convert it again.",
                code="missing",
            )
        rows = self.special_tokens[name]
        return rows if rows.ndim == 2 else rows.reshape(-1, self.config.text_dim)
