"""The UMT5 encoder against transformers' own, and its configs."""

import json

import numpy as np
import pytest
import torch

from nexus_rt.core.errors import ModelError
from nexus_rt.loading.umt5 import load_umt5
from nexus_rt.models.umt5 import Umt5Config, position_buckets
from tests.refusals import refuses

CPU = torch.device("cpu")
CONFIGS = {
    "as Wan's": dict(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4),
    "few buckets": dict(
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        layer_norm_epsilon=1e-5,
    ),
    "no gate": dict(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="relu"
    ),
    "another gate": dict(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-silu"
    ),
}


def saved(folder, **options):
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(vocab_size=50, dropout_rate=0.0, **options)).eval()
    for parameter in model.parameters():  # norms that differ, biases that matter
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_it_computes_what_transformers_does(tmp_path, options):
    """Prompts of several lengths, past the last bucket; a masked token does not count."""
    theirs, ours = saved(tmp_path, **options), load_umt5(tmp_path, torch.float32, CPU)
    ids = torch.randint(0, 50, (3, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:], mask[2, 140:] = 0, 0
    with torch.no_grad():
        wanted, got = theirs(ids, mask).last_hidden_state, ours(ids, mask)
        ids[1, 9:] = 7
        assert torch.allclose(ours(ids, mask)[1, :9], got[1, :9], atol=1e-6)
    used = mask.bool()
    assert (got - wanted)[used].abs().max() <= 2e-5 * wanted[used].abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_loses_no_more_than_transformers(tmp_path, dtype):
    """Beside float16, the last linear of a feed-forward stays in float32, as transformers keeps
    it."""
    from transformers import UMT5EncoderModel

    exact = saved(tmp_path, **CONFIGS["as Wan's"])
    ids = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    ours = load_umt5(tmp_path, dtype, CPU)
    theirs = UMT5EncoderModel.from_pretrained(tmp_path, dtype=dtype).eval()
    with torch.no_grad():
        wanted = exact(ids).last_hidden_state
        error = (ours(ids, torch.ones_like(ids)).float() - wanted).abs().mean()
        assert error <= 1.5 * (theirs(ids).last_hidden_state.float() - wanted).abs().mean()
    kept = {n for n, p in ours.named_parameters() if p.dtype == torch.float32}
    assert kept == (
        {n for n, _ in ours.named_parameters() if ".wo." in n} if dtype == torch.float16 else set()
    )


@pytest.mark.parametrize("buckets, distance", [(32, 128), (16, 64), (8, 20)])
def test_buckets_follow_the_formula(buckets, distance):
    """T5's section 2.1 in float64: behind and ahead apart, exact nearby, then logarithmic to the
    last."""
    config = Umt5Config(
        relative_attention_num_buckets=buckets, relative_attention_max_distance=distance
    )
    got = position_buckets(200, config, CPU).numpy()
    offset = np.arange(200)[None] - np.arange(200)[:, None]
    half, exact = buckets // 2, buckets // 4
    away = np.maximum(np.abs(offset), 1).astype(np.float64)
    wide = exact + np.floor(np.log(away / exact) / np.log(distance / exact) * (half - exact) + 1e-6)
    wanted = np.where(np.abs(offset) < exact, np.abs(offset), np.minimum(wide, half - 1)) + half * (
        offset > 0
    )
    assert (got == wanted).mean() > 0.999 and got.min() == 0 and got.max() == buckets - 1


def test_untied_embeddings_are_each_their_own(tmp_path):
    """Stored under both names and untied, the encoder reads its own; tied, the shared one."""
    from safetensors.torch import load_file, save_file

    saved(tmp_path, **CONFIGS["as Wan's"])
    state = load_file(tmp_path / "model.safetensors")
    state["encoder.embed_tokens.weight"] = state["shared.weight"] + 1
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for tied, name in ((True, "shared.weight"), (False, "encoder.embed_tokens.weight")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        assert torch.equal(load_umt5(tmp_path, torch.float32, CPU).shared.weight, state[name])


@pytest.mark.parametrize(
    "change, code, param",
    [
        ({"model_type": "t5"}, "unsupported", "model_type"),
        ({"num_heads": "4"}, "invalid_type", "num_heads"),
        ({"num_layers": 0}, "out_of_range", "num_layers"),
        ({"d_kv": -8}, "out_of_range", "d_kv"),
        ({"layer_norm_epsilon": -1.0}, "out_of_range", "layer_norm_epsilon"),
        ({"feed_forward_proj": "gated-tan"}, "unknown_name", "feed_forward_proj"),
        ({"relative_attention_num_buckets": 2}, "out_of_range", "relative_attention_num_buckets"),
        ({"relative_attention_max_distance": 8}, "out_of_range", "relative_attention_num_buckets"),
        ({"num_heads": 3}, "mismatch", None),
        ({"num_layers": 9}, "mismatch", None),
    ],
)
def test_impossible_configs_are_one_sentence(tmp_path, change, code, param):
    saved(tmp_path, **CONFIGS["as Wan's"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with refuses(code, param, ModelError):
        load_umt5(tmp_path, torch.float32, CPU)
