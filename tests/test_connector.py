"""The connector: against its formula, its packing, its files."""

import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.loading.connector import load_connector, save_connector
from nexus_rt.models.connector import SPECIAL_TOKENS, Connector, ConnectorConfig
from tests.refusals import refuses

TINY = ConnectorConfig(
    llm_hidden_size=24,
    vision_dim=16,
    vision_queries=4,
    text_dim=32,
    adapter_queries=6,
    num_layers=2,
    num_heads=2,
    max_context_len=40,
)


def make(config=TINY, seed=0):
    torch.manual_seed(seed)
    connector = Connector(config).eval()
    for p in connector.parameters():  # norms and biases too: nothing may hide behind ones and zeros
        torch.nn.init.normal_(p, std=0.3)
    connector.special_tokens = {name: torch.randn(1, config.text_dim) for name in SPECIAL_TOKENS}
    connector.unconditional_text = torch.randn(3, config.text_dim)
    connector.unconditional_hidden = torch.randn(7, config.llm_hidden_size)
    return connector


# --- an oracle in float64, from the formula of a pre-norm encoder-decoder with relu ---


def attend(w, name, q, kv, heads):
    d = q.shape[-1]
    wi, bi = w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]
    q, k, v = (
        F.linear(x, wi[i * d : (i + 1) * d], bi[i * d : (i + 1) * d])
        for i, x in enumerate((q, kv, kv))
    )
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(-2, -3)
    scores = (split(q) @ split(k).mT / math.sqrt(d // heads)).softmax(-1)
    out = (scores @ split(v)).transpose(-2, -3).flatten(-2)
    return F.linear(out, w[f"{name}.out_proj.weight"], w[f"{name}.out_proj.bias"])


def norm(w, name, x):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def feed(w, name, x):
    h = F.linear(x, w[f"{name}.linear1.weight"], w[f"{name}.linear1.bias"]).clamp_min(0)
    return F.linear(h, w[f"{name}.linear2.weight"], w[f"{name}.linear2.bias"])


def oracle(w, name, x, layers, heads):
    gelu = lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    x = F.linear(
        gelu(F.linear(x, w["fc.0.weight"], w["fc.0.bias"])), w["fc.2.weight"], w["fc.2.bias"]
    )
    for i in range(layers):
        n = f"{name}.encoder.layers.{i}"
        y = norm(w, f"{n}.norm1", x)
        x = x + attend(w, f"{n}.self_attn", y, y, heads)
        x = x + feed(w, n, norm(w, f"{n}.norm2", x))
    memory = norm(w, f"{name}.encoder.norm", x)
    t = w["decoder_query"].expand(len(x), -1, -1)
    for i in range(layers):
        n = f"{name}.decoder.layers.{i}"
        y = norm(w, f"{n}.norm1", t)
        t = t + attend(w, f"{n}.self_attn", y, y, heads)
        t = t + attend(w, f"{n}.multihead_attn", norm(w, f"{n}.norm2", t), memory, heads)
        t = t + feed(w, n, norm(w, f"{n}.norm3", t))
    return norm(w, f"{name}.decoder.norm", t)


@pytest.mark.parametrize("single_frame", [False, True])
@pytest.mark.parametrize("length", [1, 9])
def test_it_computes_the_published_formula(single_frame, length):
    connector = make()
    hidden = torch.randn(2, length, TINY.llm_hidden_size)
    weights = {k: v.double() for k, v in connector.state_dict().items()}
    part = lambda name: {
        k.removeprefix(name + "."): v for k, v in weights.items() if k.startswith(name + ".")
    }
    visual = oracle(
        part("vision_head"), "visionHeadAdapter", hidden.double(), TINY.num_layers, TINY.num_heads
    )
    used = visual[:, :1] if single_frame else visual
    wanted = torch.cat(  # each visual token alone
        [
            oracle(part("adapter"), "adapter", used[:, i : i + 1], TINY.num_layers, TINY.num_heads)
            for i in range(used.shape[1])
        ],
        1,
    )
    with torch.no_grad():
        got = connector(hidden, single_frame)
    assert got.shape == (2, (1 if single_frame else 4) * 6, 32)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_padding_rows_do_not_count():
    connector = make()
    hidden = torch.randn(2, 9, TINY.llm_hidden_size)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 5:] = True
    with torch.no_grad():
        together = connector(hidden, padding=padding)
        alone = connector(hidden[1:, :5])
    assert (together[1:] - alone).abs().max() <= 1e-5


def test_published_names_and_sizes():
    """The default config has the published checkpoint's parameters, on the meta device."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in Connector(ConnectorConfig()).state_dict().items()}
    head, adapter = "vision_head.visionHeadAdapter", "adapter.adapter"
    assert shapes["vision_head.decoder_query"] == (1, 4, 1152) and shapes[
        "adapter.decoder_query"
    ] == (1, 256, 4096)
    assert shapes["vision_head.fc.0.weight"] == (1152, 4096) and shapes[
        "vision_head.fc.2.weight"
    ] == (1152, 1152)
    assert shapes["adapter.fc.0.weight"] == (4096, 1152) and shapes["adapter.fc.2.weight"] == (
        4096,
        4096,
    )
    for name, d in ((head, 1152), (adapter, 4096)):
        for side, attentions, norms in (
            ("encoder", ["self_attn"], 2),
            ("decoder", ["self_attn", "multihead_attn"], 3),
        ):
            for layer in range(4):
                n = f"{name}.{side}.layers.{layer}"
                for a in attentions:
                    assert shapes[f"{n}.{a}.in_proj_weight"] == (3 * d, d) and shapes[
                        f"{n}.{a}.out_proj.weight"
                    ] == (d, d)
                assert shapes[f"{n}.linear1.weight"] == (4 * d, d) and shapes[
                    f"{n}.linear2.weight"
                ] == (d, 4 * d)
                assert all(shapes[f"{n}.norm{i + 1}.weight"] == (d,) for i in range(norms))
            assert f"{name}.{side}.layers.4.linear1.weight" not in shapes
            assert shapes[f"{name}.{side}.norm.weight"] == (d,)
    assert len(shapes) == 2 * (1 + 4 + 4 * 12 + 4 * 18 + 4)


def test_packing_follows_the_published_order():
    connector = make()
    m, d = connector.special_tokens, TINY.text_dim
    visual, reference, adapter, text = (torch.randn(n, d) for n in (2, 3, 4, 5))
    packed = connector.pack(text, adapter, visual, reference)
    rows = [
        m["<img_st>"],
        visual,
        m["<img_ed>"],
        m["<img_st>"],
        reference,
        m["<img_ed>"],
        m["<ipl_st>"],
        adapter,
        m["<ipl_ed>"],
        m["<prp_st>"],
        text,
        m["<prp_ed>"],
    ]
    assert packed.shape == (40, d)
    assert torch.equal(packed[:22], torch.cat(rows)) and not packed[22:].any()
    bare = connector.pack(text, None)
    assert (
        torch.equal(bare[:7], torch.cat([m["<prp_st>"], text, m["<prp_ed>"]]))
        and not bare[7:].any()
    )


def test_a_long_context_is_cut_and_the_loss_named():
    connector = make()
    text, adapter = torch.randn(30, 32), torch.randn(24, 32)
    with pytest.warns(
        UserWarning,
        match=r"58 tokens and is cut at 40, as published; lost: 17 of 30 text tokens, <prp_ed>",
    ):
        packed = connector.pack(text, adapter)
    assert torch.equal(packed[27:], text[:13])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connector.pack(text[:12], adapter)  # exactly full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_keeps_everything(tmp_path, dtype):
    connector = make()
    save_connector(connector, tmp_path / "c", torch.float32)
    loaded = load_connector(tmp_path / "c", dtype)
    assert loaded.config == TINY and loaded.dtype == dtype
    assert all(
        torch.equal(v.to(dtype), loaded.state_dict()[k]) for k, v in connector.state_dict().items()
    )
    assert all(
        torch.equal(v.to(dtype), loaded.special_tokens[k])
        for k, v in connector.special_tokens.items()
    )
    assert torch.equal(loaded.unconditional_text, connector.unconditional_text.to(dtype))
    assert torch.equal(loaded.unconditional_hidden, connector.unconditional_hidden.to(dtype))
    with torch.no_grad():
        out = loaded(torch.randn(1, 5, 24))
    assert out.dtype == dtype and torch.isfinite(out).all()


def test_wrong_hidden_size_is_named():
    with refuses("mismatch", kind=InputError) as error:
        make()(torch.randn(1, 5, 20))
    assert "(1, 5, 20)" in str(error.value)


def test_damaged_folders_are_refused(tmp_path):
    save_connector(make(), tmp_path, torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "adapter.fc.0.bias"},
        tmp_path / "model.safetensors",
    )
    with refuses("mismatch", kind=ModelError) as error:
        load_connector(tmp_path)
    assert "adapter.fc.0.bias" in str(error.value)
    save_file({**weights, "adapter.fc.0.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with refuses("mismatch", kind=ModelError) as error:
        load_connector(tmp_path)
    assert "(3,)" in str(error.value)
    save_file(weights, tmp_path / "model.safetensors")
    markers = load_file(tmp_path / "special_tokens.safetensors")
    del markers["<ipl_ed>"]
    save_file(markers, tmp_path / "special_tokens.safetensors")
    with refuses("missing", kind=ModelError) as error:
        load_connector(tmp_path)
    assert "<ipl_ed>" in str(error.value)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, code, param in (
        ({"vision_dims": 3}, "unknown_name", "vision_dims"),
        ({"num_heads": 0}, "invalid_value", "num_heads"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with refuses(code, param, ModelError):
            load_connector(tmp_path)


def test_a_missing_marker_is_named_when_packing():
    connector = make()
    del connector.special_tokens["<prp_ed>"]
    with refuses("missing", kind=ModelError) as error:
        connector.pack(torch.randn(2, 32), None)
    assert "<prp_ed>" in str(error.value)
