"""What a call holds in memory, part by part: weights, and working memory as an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nexus_rt.core.size import ClipSize
from nexus_rt.models.quantized import QuantizedLinear


@dataclass(frozen=True)
class MemoryUse:
    """Something that takes memory: bytes of its weights, of what it needs to run, of its weights
    while they are streamed (None: it cannot be), and of pinned host memory once it has left."""

    weights: int
    working: int = 0
    streamed: int | None = None
    host: int = 0


def call_parts(
    engines: Mapping[str, Any], others: Mapping[str, Any], size: ClipSize, batch: int = 2
) -> dict[str, MemoryUse]:
    """What a call holds in memory.

    Args:
        engines: by name. others: whatever else has `nbytes`: encoders, and under "vae" a
            decoder, which has `working_bytes(size)` too. batch: samples of a step,
            unconditional twins counted.
    """
    parts = {name: MemoryUse(other.nbytes) for name, other in others.items()}
    for name, engine in engines.items():
        exported = getattr(engine, "folder", None)
        if exported is not None:
            architecture, element = exported.manifest.architecture, engine.dtype.itemsize
        else:
            architecture, element = asdict(engine.model.config), engine.model.dtype.itemsize
        working = activation_bytes(architecture, size, batch, element)
        if exported is None:
            working += widened_bytes(engine.model)
        parts[name] = MemoryUse(
            engine.nbytes,
            working,
            getattr(engine, "streamed_bytes", None),
            getattr(engine, "host_bytes", 0),
        )
    if "vae" in others:
        parts["vae"] = MemoryUse(others["vae"].nbytes, others["vae"].working_bytes(size))
    return parts


def activation_bytes(
    architecture: Mapping[str, int], size: ClipSize, batch: int = 2, element: int = 2
) -> int:
    """An estimate of a Wan transformer's working memory with our kernels: the widest point of a
    block, as counted by following every tensor's life on the meta device
    (tests/test_residency.py).

    In self-attention nine widths are alive (the stream and what is still added to it, the stream
    before it, Q, K and V as projected, Q and K with their norms and RoPE, and the output); in the
    feed-forward five beside its inner one.
    """
    dim = architecture["num_attention_heads"] * architecture["attention_head_dim"]
    widest = max(9 * dim, 5 * dim + architecture["ffn_dim"])
    return batch * size.tokens() * widest * element


def widened_bytes(model: Any) -> int:
    """Bytes of the largest matrix that a transformer widens as it runs; 0 where all are dense."""
    sizes = [
        m.in_features * m.out_features * m.compute_dtype.itemsize
        for m in model.modules()
        if isinstance(m, QuantizedLinear)
    ]
    return max(sizes, default=0)
