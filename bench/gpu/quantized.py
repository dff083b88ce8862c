"""Layers in 8 bits on a GPU: their numbers against float64, and their time against the dense
layer's."""

from __future__ import annotations

from functools import partial
from typing import Any

from nexus_rt.bench.gpu.oracles import compare
from nexus_rt.bench.gpu.setting import figure
from nexus_rt.bench.gpu.units import Unit


def units(s: Any) -> dict[str, Unit]:
    """A square layer of the large generator's width, widened and multiplied in 8 bits, against its
    own values in float64, and milliseconds beside the dense one's."""
    rows = {"dense": Unit(partial(_dense, s))}
    for kind in ("fp8", "int8"):
        for activations in (True, False):
            label = f"{kind} {'activations too' if activations else 'weights'}"
            rows[label] = Unit(partial(_quantized, s, kind, activations))
    return rows


def _layer(s: Any) -> tuple:
    dim, tokens = (64, 33) if s.dry else (5120, 16384)
    return s.random(dim, dim), s.random(dim), s.random(2, tokens, dim)


def _flops(x: Any, weight: Any) -> int:
    return 2 * x.shape[0] * x.shape[1] * weight.shape[0] * weight.shape[1]


def _dense(s: Any) -> dict:
    from torch.nn.functional import linear

    weight, bias, x = _layer(s)
    return s.of_roof(s.ms(lambda: linear(x, weight, bias), 10), flops=_flops(x, weight))


def _quantized(s: Any, kind: str, activations: bool) -> dict:
    from torch.nn.functional import linear

    from nexus_rt.models.encodings import Scaled
    from nexus_rt.models.quantized import QuantizedLinear, quantise
    from nexus_rt.models.quantized_products import multiplies, scaled_rows

    weight, bias, x = _layer(s)
    checked = x[:, :1311]
    kept = quantise(weight, kind)
    assert isinstance(kept.encoding, Scaled)  # both kinds have a scale a row
    dense = kept.raw.double() * kept.encoding.scale.double()
    layer, inputs = QuantizedLinear([kept], weight.shape[1], bias, activations), checked
    if activations and multiplies(kept.raw):
        small, own = scaled_rows(checked, kept.raw.dtype)
        inputs = (small.double() * own.double()).view(checked.shape)
    wanted = inputs.double() @ dense.T + bias.double()
    eager = linear(inputs.to(x.dtype), dense.to(x.dtype), bias)
    row = compare(layer(checked), wanted, eager)
    roof = "fp8_by_row_tflops" if activations and kind == "fp8" else "matmul_tflops"
    ms = s.ms(lambda: layer(x), 10)
    row = {**row, **s.of_roof(ms, flops=_flops(x, weight), matmul=roof)}
    unquantised = linear(checked.double(), weight.double(), bias.double())
    off = (layer(checked).double() - unquantised).norm() / unquantised.norm()
    return {**row, "quantisation_error": figure(float(off))}
