"""Layers in 8 bits on a GPU: their numbers against float64, and their time against the dense
layer's."""

from __future__ import annotations

from typing import Any

from nexus_rt.bench.gpu_correctness import compare
from nexus_rt.bench.measure import failure


def quantized(suite: Any) -> dict:
    """A square layer of the large generator's width, widened and multiplied in 8 bits, against its
    own values in float64, and milliseconds beside the dense one's."""
    from torch.nn.functional import linear

    from nexus_rt.costs import median_ms
    from nexus_rt.models.quantized import QuantizedLinear, _eight_bits, _scaled_rows, quantise

    dim, tokens = (64, 33) if suite.dry else (5120, 16384)
    weight, bias, x = suite.random(dim, dim), suite.random(dim), suite.random(2, tokens, dim)
    cuda, checked = x.is_cuda, x[:, :1311]
    rows: dict = {"dense": {"ms": median_ms(lambda: linear(x, weight, bias), 5, cuda=cuda)}}
    for kind in ("int8", "fp8"):
        kept = quantise(weight, kind)
        dense = kept.raw.double() * kept.encoding.scale.double()
        for activations in (False, True):
            label = f"{kind} {'activations too' if activations else 'weights'}"
            try:
                layer = QuantizedLinear([kept], dim, bias, activations)
                inputs = checked
                if activations and _eight_bits(kept.raw) is not None:
                    small, own = _scaled_rows(checked, kept.raw.dtype)
                    inputs = (small.double() * own.double()).view(checked.shape)
                wanted = inputs.double() @ dense.T + bias.double()
                eager = linear(inputs.to(x.dtype), dense.to(x.dtype), bias)
                ms = median_ms(lambda layer=layer: layer(x), 5, cuda=cuda)
                rows[label] = {**compare(layer(checked), wanted, eager), "ms": ms}
            except Exception as error:
                rows[label] = {"failed": failure(error), "right": False}
    return rows
