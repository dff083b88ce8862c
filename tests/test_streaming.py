"""Blocks that come as they run: the same velocity, two blocks at a time, each copied once a
forward."""

import pytest
import torch

from nexus_rt.engines.torch import TorchEngine
from nexus_rt.memory.streaming import BlockStream, streamed_bytes
from nexus_rt.models.wan import WanTransformer
from nexus_rt.models.wan_config import WanConfig

CPU = torch.device("cpu")


def model_of(layers):
    torch.manual_seed(layers)
    config = WanConfig(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=40,
        num_layers=layers,
    )
    return WanTransformer(config).requires_grad_(False).eval()


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_streamed_model_is_the_model(layers):
    model = model_of(layers)
    embeds, latents = torch.randn(2, 5, 16), torch.randn(1, 16, 2, 4, 4)
    engine = TorchEngine(model)
    context = engine.prepare(embeds)
    wanted = [engine.velocity(latents, torch.tensor(t), context) for t in (900.0, 300.0)]
    weights = [p.data for p in model.blocks.parameters()]
    engine.load(streamed=True)
    copies, right = [], model.stream.fetch
    model.stream.fetch = lambda index, slot: (copies.append(index), right(index, slot))[1]
    context = engine.prepare(embeds)  # cross-attention keys come from the blocks too
    got = [engine.velocity(latents, torch.tensor(t), context) for t in (900.0, 300.0)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    # two blocks stay; more are copied at each of three passes
    assert len(copies) == (3 * layers + 1 if layers > 2 else layers)
    slots = {t.data_ptr() for slot in model.stream.slots for t in slot}
    assert {p.data_ptr() for p in model.blocks[-1].parameters()} <= slots
    engine.unload()
    assert model.stream is None
    assert [p.data_ptr() for p in model.blocks.parameters()] == [w.data_ptr() for w in weights]
    assert torch.equal(
        engine.velocity(latents, torch.tensor(300.0), engine.prepare(embeds)), wanted[1]
    )


def test_weights_are_widened_as_they_come():
    """float32 from weights held in half precision: what the parity gate compares with."""
    wide, stored = (model_of(3).bfloat16() for _ in range(2))
    wide.float()
    BlockStream(stored, CPU, torch.float32)
    held = sum(t.numel() * t.element_size() for block in stored.stream.host for t in block)
    assert held * 2 == sum(p.numel() * 4 for p in wide.blocks.parameters())
    embeds, latents = torch.randn(1, 5, 16), torch.randn(1, 16, 1, 4, 4)
    a, b = (TorchEngine(m) for m in (wide, stored))
    t = torch.tensor(500.0)
    assert torch.equal(
        a.velocity(latents, t, a.prepare(embeds)), b.velocity(latents, t, b.prepare(embeds))
    )


def test_bytes_while_streaming():
    model = model_of(4)
    size = lambda m: sum(p.numel() * 4 for p in m.parameters())
    assert (
        streamed_bytes(model)
        == size(model) - 2 * size(model.blocks[0])
        == TorchEngine(model).streamed_bytes
    )
