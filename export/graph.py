"""What is exported of a Wan transformer: two graphs with plain tensors at their edges.

context:   embeds [N, L, text_dim] -> keys, values [layers, N, L, heads, head_dim]; once a prompt.
velocity:  latents [N, C, T, H, W], timestep [], keys, values, bias [N, L] -> velocity [N, C, T, H,
    W]; every step.

Latents, timestep, bias and velocity are float32 whatever the precision of the weights; keys and
values have that precision. N and L are dynamic; T, H and W are those of the one size asked for, or
range over several. The angles of RoPE are computed in the graph from the size, so one graph serves
all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import export

from nexus_rt.core.size import ClipSize
from nexus_rt.export.dynamic_shapes import Shape, Symbols, Traced
from nexus_rt.kernels.formulas import rope_angles, rope_tables
from nexus_rt.models.wan import Attention, Block, WanContext, WanTransformer
from nexus_rt.ops.block_ops import TORCH, Ops


def rope_in_graph(
    head_dim: int, grid: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`nexus_rt.ops.block_ops.rope_table` for sizes that are symbols: float32 angles, of positions
    below a few hundred."""
    return rope_tables(rope_angles(head_dim, grid, device, torch.float32))


class ContextGraph(nn.Module):
    """The prompt prepared once: text embedding, and cross-attention keys and values of every
    block."""

    def __init__(self, model: WanTransformer) -> None:
        super().__init__()
        self.embedder = model.condition_embedder.text_embedder
        blocks = (cast(Block, block) for block in model.blocks)
        self.attentions = nn.ModuleList(block.attn2 for block in blocks)
        self.text = model.condition_embedder.text

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.text(embeds)
        pairs = [cast(Attention, each).keys_values(embedded) for each in self.attentions]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


class VelocityGraph(nn.Module):
    """The velocity at a step, from latents, timestep and the prepared prompt."""

    def __init__(self, model: WanTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, latents: Tensor, timestep: Tensor, keys: Tensor, values: Tensor, bias: Tensor
    ) -> Tensor:
        context = WanContext(list(keys.unbind(0)), list(values.unbind(0)), bias)
        return self.model(latents, timestep, context).float()


def context_shapes(model: WanTransformer) -> dict[str, Shape]:
    """Inputs of "context"."""
    return {"embeds": ("batch", "tokens", model.config.text_dim)}


def velocity_shapes(model: WanTransformer) -> dict[str, Shape]:
    """Inputs of "velocity"."""
    c = model.config
    stacked = (c.num_layers, "batch", "tokens", c.num_attention_heads, c.attention_head_dim)
    return {
        "latents": ("batch", c.in_channels, "frames", "2*rows", "2*columns"),
        "timestep": (),
        "keys": stacked,
        "values": stacked,
        "bias": ("batch", "tokens"),
    }


@torch.no_grad()
def trace(model: WanTransformer, buckets: list[ClipSize]) -> dict[str, Traced]:
    """Both graphs of a model for one size, or for the range that several span.

    The model's choice of attention and kernels is kept; where kernels are PyTorch's, RoPE is
    computed in the graph.
    """
    symbols = Symbols(buckets)
    graphs = {
        "context": (ContextGraph(model), context_shapes(model), ("keys", "values"), ("embeds",)),
        "velocity": (
            VelocityGraph(model),
            velocity_shapes(model),
            ("velocity",),
            ("keys", "values"),
        ),
    }
    with rope_in_graphs(model):
        return {
            name: traced(
                graph, shapes, outputs, symbols, model.device, dict.fromkeys(half, model.dtype)
            )
            for name, (graph, shapes, outputs, half) in graphs.items()
        }


def traced(
    graph: nn.Module,
    shapes: dict[str, Shape],
    outputs: tuple[str, ...],
    symbols: Symbols,
    device: torch.device,
    dtypes: dict[str, torch.dtype],
) -> Traced:
    """A module exported with inputs of these shapes, float32 where `dtypes` says nothing; scalars
    are 500."""
    inputs = {
        name: (
            symbols.random(shape, dtypes.get(name, torch.float32), device)
            if shape
            else torch.tensor(500.0, device=device)
        )
        for name, shape in shapes.items()
    }
    dynamic = tuple(symbols.dynamic(shape) for shape in shapes.values())
    program = export(graph.eval(), tuple(inputs.values()), dynamic_shapes=dynamic, strict=False)
    return Traced(program, inputs, shapes, outputs)


@contextlib.contextmanager
def rope_in_graphs(model: WanTransformer) -> Iterator[None]:
    """Let a model whose kernels are PyTorch's compute RoPE in the graph while it is traced."""
    own = model.ops
    if own.name == TORCH.name:
        _use(model, replace(own, rope=rope_in_graph))
    try:
        yield
    finally:
        _use(model, own)


def _use(model: WanTransformer, ops: Ops) -> None:
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "ops"):
            module.ops = ops
