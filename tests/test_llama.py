"""The Llama backbone against transformers' own, and which models are left to transformers."""

import json

import pytest
import torch

from nexus_rt.components.understanding import UnderstandingModel
from nexus_rt.core.errors import ModelError
from nexus_rt.loading.llama import load_llama
from nexus_rt.models.llama import LlamaBackbone, is_native
from nexus_rt.models.template import Template
from tests.omnivideo import make_llm
from tests.refusals import refuses

CPU = torch.device("cpu")
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CONFIGS = {
    "plain": {},
    "grouped heads": dict(num_attention_heads=4, num_key_value_heads=2),
    "wide heads, biases": dict(head_dim=24, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5),
    "linear rope": dict(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama 3's rope": dict(rope_scaling={**LLAMA3, "rope_theta": 500000.0}),
}


def saved(folder, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(
        LlamaConfig(**{**sizes, "max_position_embeddings": 256, **options})
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.model, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_it_computes_what_transformers_does(tmp_path, options):
    """Under a mask that hides a token in the middle and the last, as the published code's does."""
    theirs, config = saved(tmp_path, **options)
    assert is_native(config)
    ours = load_llama(tmp_path, config, torch.float32, CPU)
    ids = torch.randint(0, 50, (2, 90), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 40], mask[0, -1] = 0, 0
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        got = ours(ids, mask)
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


def test_configs_of_version_4_mean_the_same(tmp_path):
    """`rope_theta` and `rope_scaling` beside each other, `type` for `rope_type`."""
    _, config = saved(tmp_path, **CONFIGS["llama 3's rope"])
    ids = torch.arange(50)[None]
    with torch.no_grad():
        wanted = load_llama(tmp_path, config, torch.float32, CPU)(ids, torch.ones_like(ids))
        old = {k: v for k, v in config.items() if k != "rope_parameters"}
        scaling = {("type" if k == "rope_type" else k): v for k, v in LLAMA3.items()}
        old |= {"rope_theta": 500000.0, "rope_scaling": scaling}
        assert is_native(old)
        assert torch.equal(
            load_llama(tmp_path, old, torch.float32, CPU)(ids, torch.ones_like(ids)), wanted
        )
        plain = load_llama(tmp_path, {**old, "rope_scaling": None}, torch.float32, CPU)(
            ids, torch.ones_like(ids)
        )
    assert not torch.equal(plain, wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_act": "gelu_fast"},
    ],
)
def test_what_it_does_not_compute_is_left_to_transformers(tmp_path, change):
    _, config = saved(tmp_path)
    assert not is_native({**config, **change})


def test_another_architecture_still_loads(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    make_llm(tmp_path / "llm")
    size = json.loads((tmp_path / "llm" / "config.json").read_text())
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(
        Qwen2Config(**{f: size[f] for f in fields}, num_key_value_heads=size["num_attention_heads"])
    ).eval()
    theirs.save_pretrained(tmp_path / "llm")
    model = UnderstandingModel(tmp_path / "llm", Template(), torch.float32, "cpu")
    got = model.hidden_states("panda")
    assert not isinstance(model.model, LlamaBackbone)
    ids = torch.tensor([model.tokenizer.encode(model.template.render("panda"), special=False)])
    end, pad = model.tokenizer.eos_id, model.tokenizer.pad_id
    padding = end if pad is None else pad  # the end token stands in for a padding token
    mask = torch.ones_like(ids) if padding is None else (ids != padding).long()
    with torch.no_grad():
        wanted = theirs.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize(
    "change, code, param",
    [
        ({"num_attention_heads": 3}, "mismatch", "num_attention_heads"),
        ({"num_key_value_heads": 3}, "mismatch", "num_attention_heads"),
        ({"head_dim": 15}, "invalid_value", "head_dim"),
        ({"rms_norm_eps": -1.0}, "out_of_range", "rms_norm_eps"),
        ({"hidden_size": "32"}, "invalid_type", "hidden_size"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 0.0}},
            "invalid_value",
            None,
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 4.0}},
            "invalid_value",
            None,
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
            "invalid_type",
            "rope_theta",
        ),
        ({"num_hidden_layers": 3}, "mismatch", None),
    ],
)
def test_impossible_configs_are_one_sentence(tmp_path, change, code, param):
    _, config = saved(tmp_path)
    with refuses(code, param, ModelError):
        load_llama(tmp_path, {**config, **change}, torch.float32, CPU)
