"""Linear layers whose weights stay in fewer bits: as their checkpoint has them (GGUF's blocks,
scaled fp8 and int8), or quantised here, a scale a row.

A layer's matrix may be made of several, one under another, each in an encoding of its own: Q, K and
V are one layer here and three in a checkpoint. Weights are widened as the layer runs, some rows at
a time; with `activations` the product itself is in 8 bits, the activations scaled a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_rt.models.encodings import Blocks, Encoding, Scaled
from nexus_rt.models.quantized_products import LIMITS, Rows8, multiplies, product_of
from nexus_rt.ops.block_ops import TORCH, Ops

PIECE = 2**22  # weights that are widened at a time
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix as they are kept: raw values or bytes, and what makes them numbers."""

    raw: Tensor
    encoding: Encoding
    count: int

    def take(self, first: int, last: int) -> Rows:
        """Some of them."""
        raw = self.raw.view(self.count, -1)[first:last]
        encoding = self.encoding
        if isinstance(encoding, Scaled) and encoding.scale.ndim == 2:
            n = encoding.block[0] if encoding.block else 1
            scale = encoding.scale[first // n : -(-last // n)]
            encoding = replace(encoding, scale=scale)
        return Rows(raw, encoding, last - first)


def quantise(weight: Tensor, kind: str) -> Rows:
    """A matrix [N, K] in 8 bits, "int8" or "fp8", with the scale that each row's largest value
    needs, the next number above it that bfloat16 has: a product in bfloat16 is then scaled
    exactly."""
    dtype = FORMATS[kind]
    # what stays is allocated before what does not: between them it would keep the heap apart, and a
    # model loaded so took up to twice its size
    raw = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    scale = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    step = max(1, PIECE // weight.shape[1])
    for first in range(0, weight.shape[0], step):
        wide = weight[first : first + step].float()
        needed = wide.abs().amax(1, keepdim=True).clamp_min(1e-12) / LIMITS[dtype]
        near = needed.bfloat16().float()
        own = torch.where(near < needed, (near * (1 + 2**-7)).bfloat16().float(), near)
        values = wide / own
        raw[first : first + step] = values.round_() if dtype == torch.int8 else values
        scale[first : first + step] = own
    return Rows(raw, Scaled(f"{kind} by row", scale), weight.shape[0])


def joined(rows: Sequence[Rows]) -> list[Rows]:
    """The same rows, neighbours of one encoding as one."""
    out: list[Rows] = []
    for part in rows:
        last = out[-1] if out else None
        if last is not None and (merged := _merged(last, part)) is not None:
            out[-1] = merged
        else:
            out.append(part)
    return out


def _merged(a: Rows, b: Rows) -> Rows | None:
    """Two parts as one; None where they are not of one encoding."""
    if a.raw.dtype != b.raw.dtype or a.encoding.name != b.encoding.name:
        return None
    raw = torch.cat([part.raw.view(part.count, -1) for part in (a, b)])
    if isinstance(a.encoding, Blocks) or isinstance(b.encoding, Blocks):
        return Rows(raw, a.encoding, a.count + b.count)
    n = a.encoding.block
    if n is not None and (a.count % n[0] or n != b.encoding.block):
        return None
    if a.encoding.rotation != b.encoding.rotation:
        return None
    spread = lambda part: (
        part.encoding.scale
        if part.encoding.scale.ndim
        else part.encoding.scale.expand(part.count, 1)
    )
    scale = torch.cat([spread(a), spread(b)]).contiguous()
    return Rows(raw, replace(a.encoding, scale=scale), a.count + b.count)


class Adapter(nn.Module):
    """A low-rank product beside some rows of a quantised matrix: `scale * up @ down`."""

    def __init__(self, first: int, last: int, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.first, self.last, self.scale = first, last, scale
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)


class QuantizedLinear(nn.Module):
    """A linear layer of encoded rows.

    Args:
        rows: its matrix [N, K] from top to bottom. bias: [N], in the dtype that it computes in.
        activations: quantise these too, where the rows are of one scaled format ("int8", "fp8") and
            the device multiplies 8 bits.
    """

    def __init__(
        self, rows: Sequence[Rows], columns: int, bias: Tensor, activations: bool = False
    ) -> None:
        super().__init__()
        rows = joined(rows)
        self.in_features, self.out_features = columns, sum(r.count for r in rows)
        self.counts, self.encodings = [r.count for r in rows], [r.encoding for r in rows]
        frozen = lambda t: nn.Parameter(t, requires_grad=False)
        self.raw = nn.ParameterList(frozen(r.raw) for r in rows)
        self.scales = nn.ParameterList(
            frozen(e.scale if isinstance(e, Scaled) else torch.empty(0)) for e in self.encodings
        )
        self.bias = frozen(bias)
        self.activations = activations
        self.ops: Ops = TORCH
        # whether its scales are numbers of the dtype that it computes in
        self.exact = all(bool((s.to(bias.dtype) == s).all()) for s in self.scales)
        self.adapters = nn.ModuleList()
        self.encodings = [
            replace(e, scale=torch.empty(0)) if isinstance(e, Scaled) else e for e in self.encodings
        ]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.bias.dtype

    @property
    def formats(self) -> list[str]:
        """Names of its rows' encodings."""
        return [e.name for e in self.encodings]

    def parts(self) -> list[Rows]:
        """Its rows as they are kept."""
        return [
            Rows(raw, replace(e, scale=scale) if isinstance(e, Scaled) else e, count)
            for raw, scale, e, count in zip(
                self.raw, self.scales, self.encodings, self.counts, strict=True
            )
        ]

    @property
    def weight(self) -> Tensor:
        """The matrix [N, K], widened to the dtype that it computes in."""
        out = torch.empty(
            self.out_features, self.in_features, dtype=self.compute_dtype, device=self.bias.device
        )
        at = 0
        for part in self.parts():
            step = max(1, PIECE // self.in_features)
            if isinstance(part.encoding, Scaled) and part.encoding.block is not None:
                step = max(1, step // part.encoding.block[0]) * part.encoding.block[0]
            for first in range(0, part.count, step):
                last = min(part.count, first + step)
                some = part.take(first, last)
                out[at + first : at + last] = some.encoding.decode(
                    some.raw, (last - first, self.in_features)
                )
            at += part.count
        return out

    @property
    def by_row(self) -> Rows | None:
        """All rows, where they are of one format with a scale for each or for all, and multiply
        activations as these are; None elsewhere."""
        if len(self.counts) != 1 or not isinstance(self.encodings[0], Scaled):
            return None
        (part,) = self.parts()
        encoding = self.encodings[0]
        return part if encoding.block is None and encoding.rotation is None else None

    @property
    def takes_rows(self) -> bool:
        """Whether it takes activations in 8-bit floats, as a kernel before it may write them."""
        rows = self.by_row
        return (
            self.activations
            and not self.adapters  # low-rank products read them as they were
            and rows is not None
            and rows.raw.dtype == torch.float8_e4m3fn
            and multiplies(self._matrix(rows))
        )

    def _matrix(self, rows: Rows) -> Tensor:
        return rows.raw.view(self.out_features, -1)

    def forward(self, x: Tensor | Rows8) -> Tensor:
        """[..., K] to [..., N]; 8-bit rows where it `takes_rows`."""
        if isinstance(x, Rows8):
            return self._multiplied(x)
        out = self._product(x)
        for adapter in cast("Iterable[Adapter]", self.adapters):
            some = out[..., adapter.first : adapter.last]
            some.add_(F.linear(F.linear(x, adapter.down), adapter.up), alpha=adapter.scale)
        return out

    def _product(self, x: Tensor) -> Tensor:
        rows = self.by_row
        if rows is None:
            return F.linear(x, self.weight, self.bias)
        if self.activations and multiplies(self._matrix(rows)):
            return self._multiplied(self._rows(x, rows.raw.dtype))
        if not self.exact:
            return F.linear(x, self.weight, self.bias)
        # 8-bit values are exact in the wider dtype: the scale comes after the product
        scale = rows.encoding.scale.reshape(-1)  # type: ignore[union-attr]
        product = F.linear(x, self._matrix(rows).to(x.dtype))
        return torch.addcmul(self.bias, product, scale.to(x.dtype))

    def _rows(self, x: Tensor, dtype: torch.dtype) -> Rows8:
        """Activations in 8 bits, by a kernel where there is one."""
        if dtype == torch.float8_e4m3fn and self.ops.quantise_rows is not None:
            values, scales = self.ops.quantise_rows(x.contiguous())
            return Rows8(values, scales, x.shape)
        return Rows8.of(x, dtype)

    def _multiplied(self, x: Rows8) -> Tensor:
        rows = self.by_row
        assert rows is not None  # both callers have asked
        product = product_of(self._matrix(rows))
        assert product is not None
        scale = rows.encoding.scale.reshape(-1)  # type: ignore[union-attr]
        return product(x, self._matrix(rows), scale, self.bias)


def takes_rows(layer: nn.Module) -> bool:
    """Whether a linear layer takes activations in 8-bit floats."""
    return isinstance(layer, QuantizedLinear) and layer.takes_rows
