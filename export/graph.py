"""What is exported of a Wan transformer: two graphs with plain tensors at their edges.

context:   embeds [N, L, text_dim] -> keys, values [layers, N, L, heads, head_dim]; once a prompt.
velocity:  latents [N, C, T, H, W], timestep [], keys, values, bias [N, L] -> velocity [N, C, T, H, W]; every step.

Latents, timestep, bias and velocity are float32 whatever the precision of the weights; keys and values have that
precision. N and L are dynamic; T, H and W are those of the one size asked for, or range over several. The angles of RoPE
are computed in the graph from the size, so one graph serves all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from nexus_rt.engines.exported import Bucket
from nexus_rt.models.wan import WanContext, WanTransformer
from nexus_rt.ops import TORCH

MAX_BATCH = 64
MAX_TOKENS = 4096
OUTPUTS = {"context": ("keys", "values"), "velocity": ("velocity",)}


def rope_in_graph(head_dim: int, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """`nexus_rt.ops.rope_table` for sizes that are symbols: float32 angles, of positions below a few hundred."""
    side = 2 * (head_dim // 6)
    parts = []
    for axis, (size, dim) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(size, device=device, dtype=torch.float32)[:, None] * frequency.float().to(device)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        parts.append(angle.view(shape).expand(*grid, dim // 2))
    angle = torch.cat(parts, -1).flatten(0, 2).unsqueeze(1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)


class ContextGraph(nn.Module):
    """The prompt's part: text embedding, and every block's cross-attention keys and values."""

    def __init__(self, model: WanTransformer) -> None:
        super().__init__()
        self.embedder = model.condition_embedder.text_embedder
        self.attentions = nn.ModuleList(block.attn2 for block in model.blocks)
        self.text = model.condition_embedder.text

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.text(embeds)
        pairs = [attention.keys_values(embedded) for attention in self.attentions]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])


class VelocityGraph(nn.Module):
    """A step's part."""

    def __init__(self, model: WanTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, timestep: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        context = WanContext(list(keys.unbind(0)), list(values.unbind(0)), bias)
        return self.model(latents, timestep, context).float()


@dataclass(frozen=True)
class Traced:
    """A graph and the inputs it was traced with."""

    program: ExportedProgram
    inputs: tuple[Tensor, ...]


def example(model: WanTransformer, bucket: Bucket, batch: int = 2, tokens: int = 24) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of both graphs at a size: noise, of the shapes and dtypes the engine will be given."""
    c, device, dtype = model.config, model.device, model.dtype
    g = torch.Generator(device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, device=device)  # noqa: E731
    keys = make(2, c.num_layers, batch, tokens, c.num_attention_heads, c.attention_head_dim).to(dtype)
    latents = make(batch, c.in_channels, *bucket.latent)
    velocity = (latents, torch.tensor(500.0, device=device), keys[0], keys[1].clone(), make(batch, tokens))
    return {"context": (make(batch, tokens, c.text_dim).to(dtype),), "velocity": velocity}


@torch.no_grad()
def trace(model: WanTransformer, buckets: list[Bucket]) -> dict[str, Traced]:
    """Both graphs of a model for one size, or for the range that several span.

    The model's choice of attention and kernels is kept; where sizes range, RoPE is computed in the graph.
    """
    inputs = example(model, _spread(buckets))
    batch, tokens = Dim("batch", min=1, max=MAX_BATCH), Dim("tokens", min=2, max=MAX_TOKENS)
    sizes = _dynamic_sizes(buckets)
    stacked = {1: batch, 2: tokens}
    shapes = {
        "context": ({0: batch, 1: tokens},),
        "velocity": ({0: batch, **sizes}, None, stacked, stacked, {0: batch, 1: tokens}),
    }
    graphs = {"context": ContextGraph(model), "velocity": VelocityGraph(model)}
    own = model.ops
    if own.name == TORCH.name:
        _use(model, replace(own, rope=rope_in_graph))
    try:
        return {
            name: Traced(export(graph.eval(), inputs[name], dynamic_shapes=shapes[name], strict=False), inputs[name])
            for name, graph in graphs.items()
        }
    finally:
        _use(model, own)


def _use(model: WanTransformer, ops) -> None:
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops


def _spread(buckets: list[Bucket]) -> Bucket:
    """The size to trace with: one whose dimensions are not 1, which a tracer would take for a constant."""
    if len(buckets) == 1:
        return buckets[0]
    return Bucket(max(32, *(b.width for b in buckets)), max(32, *(b.height for b in buckets)),
                  max(5, *(b.frames for b in buckets)))  # fmt: skip


def _dynamic_sizes(buckets: list[Bucket]) -> dict[int, Dim]:
    """Latent dimensions that differ between the sizes, as even multiples of a dimension of their own."""
    if len(buckets) == 1:
        return {}
    frames, rows, columns = (sorted({b.latent[i] for b in buckets}) for i in range(3))
    found = {}
    if len(frames) > 1:
        found[2] = Dim("frames", min=frames[0], max=frames[-1])
    for index, name, values in ((3, "rows", rows), (4, "columns", columns)):
        if len(values) > 1:
            found[index] = 2 * Dim(name, min=values[0] // 2, max=values[-1] // 2)
    return found
