"""transformers' folders: whole or refused, whatever is missing, foreign, of another shape or
packed; and never code."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_rt.components.text import TextEncoder
from nexus_rt.components.understanding import UnderstandingModel
from nexus_rt.core.errors import ModelError
from nexus_rt.loading import names
from nexus_rt.loading.pretrained import pretrained
from nexus_rt.models.template import Template
from tests.omnivideo import make_llm
from tests.refusals import refuses

Q = "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.fixture
def encoder(own_pair):
    """The tiny text encoder's folder and a function that rewrites its weights."""
    file = own_pair / "text_encoder" / "model.safetensors"

    def rewrite(change):
        state = {k: v.clone() for k, v in load_file(file).items()}
        state = change(state) or state
        save_file({k: v.contiguous() for k, v in state.items()}, file, {"format": "pt"})
        return TextEncoder(own_pair, torch.float32, "cpu")

    return own_pair, rewrite


def scaled(state):
    scale = state[Q].float().abs().max() / 448
    state[Q] = (state[Q].float() / scale).to(torch.float8_e4m3fn)
    state[Q.removesuffix("weight") + "scale_weight"] = scale.reshape(1)


DAMAGE = {
    "a block is missing": (
        lambda s: {k: v for k, v in s.items() if ".block.1." not in k},
        "encoder.block.1",
    ),
    "one weight is missing": (
        lambda s: {k: v for k, v in s.items() if k != Q},
        Q,
    ),
    "foreign names": (
        lambda s: {k.replace("encoder.block.", "blocks."): v for k, v in s.items()},
        "blocks",
    ),
    "a prefix": (
        lambda s: {f"text_model.{k}": v for k, v in s.items()},
        "unknown",
    ),
    "one weight more": (
        lambda s: s.update({"encoder.extra.weight": torch.zeros(2)}),
        "encoder.extra",
    ),
    "another shape": (
        lambda s: s.update({Q: s[Q][:5].clone()}),
        "(5, 32)",
    ),
    "a scale of a weight in float32": (
        lambda s: s.update({Q[:-6] + "scale_weight": torch.full((1,), 2.0)}),
        "scale_weight",
    ),
    "no weights": (lambda s: {"x": torch.zeros(1)}, "config.json"),
}


@pytest.mark.parametrize("change, name", DAMAGE.values(), ids=DAMAGE)
def test_an_encoder_that_is_not_whole_is_refused(encoder, change, name):
    with refuses("mismatch", kind=ModelError) as error:
        encoder[1](change).encode(["a red circle"])
    assert name in str(error.value)


def test_whole_ones_still_load(encoder, tiny_pair):
    """As stored; with the embedding stored once under either name; inside a whole encoder-decoder;
    plain fp8."""
    wanted = TextEncoder(tiny_pair, torch.float32, "cpu").encode(["a red circle"], 8)
    _, rewrite = encoder
    assert torch.equal(rewrite(lambda s: None).encode(["a red circle"], 8), wanted)
    assert torch.equal(
        rewrite(lambda s: {k: v for k, v in s.items() if "embed_tokens" not in k}).encode(
            ["a red circle"], 8
        ),
        wanted,
    )
    spare = {
        "decoder.block.0.layer.0.layer_norm.weight": torch.ones(32),
        "lm_head.weight": torch.zeros(16, 32),
    }
    assert torch.equal(rewrite(lambda s: s.update(spare)).encode(["a red circle"], 8), wanted)
    eight = rewrite(lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)})).encode(
        ["a red circle"], 8
    )
    assert 0 < (eight - wanted).abs().max() < 0.1
    exact = rewrite(scaled).encode(["a red circle"], 8)
    assert 0 < (exact - wanted).abs().max() < 0.1


def test_an_embedding_that_a_version_leaves_random_is_caught(encoder, tiny_pair, monkeypatch):
    """transformers 5.0 to 5.2 do not tie the encoder's embedding to `shared.weight` with
    tie_word_embeddings false."""
    import transformers

    folder, rewrite = encoder
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    right = transformers.UMT5EncoderModel.from_pretrained

    def untied(*args, **options):
        model, info = right(*args, **options)
        model.encoder.embed_tokens = torch.nn.Embedding(*model.shared.weight.shape)
        return model, {**info, "missing_keys": set()}

    monkeypatch.setattr(transformers.UMT5EncoderModel, "from_pretrained", untied)
    wanted = TextEncoder(tiny_pair, torch.float32, "cpu").encode(["a red circle"])
    ours = rewrite(lambda s: {k: v for k, v in s.items() if "embed_tokens" not in k})
    # the text encoder is not transformers'
    assert torch.equal(ours.encode(["a red circle"]), wanted)
    with refuses("mismatch", kind=ModelError) as error:
        pretrained(
            "UMT5EncoderModel",
            folder / "text_encoder",
            "text encoder",
            torch.device("cpu"),
            dtype=torch.float32,
        )
    assert "encoder.embed_tokens.weight" in str(error.value)


@pytest.fixture
def llm(tmp_path):
    make_llm(tmp_path / "llm")
    return tmp_path / "llm"


def test_a_language_model_of_other_weights_is_refused_and_its_head_is_spare(llm):
    model = UnderstandingModel(llm, Template(), torch.float32, "cpu")
    # the checkpoint holds lm_head.weight, which states do not need
    assert model.hidden_states("panda").isfinite().all()
    state = load_file(llm / "model.safetensors")
    name = next(k for k in state if "layers.1.mlp.up_proj" in k)
    for change, part in (
        ({k: v for k, v in state.items() if k != name}, name.removeprefix("model.")),
        ({**state, name + "_scale": torch.full((1,), 2.0)}, "_scale"),
        ({**state, name + "_extra": torch.ones(1)}, "_extra"),
        ({k.replace("model.layers", "h"): v for k, v in state.items()}, "missing"),
    ):
        save_file(
            {k: v.contiguous() for k, v in change.items()},
            llm / "model.safetensors",
            {"format": "pt"},
        )
        with refuses("mismatch", kind=ModelError) as error:
            UnderstandingModel(llm, Template(), torch.float32, "cpu").load()
        assert part in str(error.value)


@pytest.mark.parametrize(
    "change, code, param",
    [
        (
            {"attn_implementation": "owner/kernel"},
            "unsafe",
            "attn_implementation",
        ),
        ({"_attn_implementation": "owner/kernel:fn"}, "unsafe", "_attn_implementation"),
        (
            {"text_config": {"experts_implementation": "a/b"}},
            "unsafe",
            "text_config.experts_implementation",
        ),
        ({"num_hidden_layers": 10**9}, "out_of_range", "num_hidden_layers"),
        ({"hidden_size": 10**9}, "out_of_range", "hidden_size"),
        ({"vocab_size": 10**12}, "out_of_range", "vocab_size"),
        ({"intermediate_size": 2**23}, "mismatch", None),
    ],
)
def test_a_config_that_reaches_for_code_or_is_absurd(llm, change, code, param):
    path = llm / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with refuses(code, param, ModelError):
        UnderstandingModel(llm, Template(), torch.float32, "cpu").load()


def test_a_folder_s_own_code_is_never_run(llm, monkeypatch):
    """auto_map names Python in the folder: it is not imported, nothing is asked on the terminal."""
    mark = llm.parent / "ran"
    (llm / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for file, entry in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModel": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        path = llm / file
        path.write_text(
            json.dumps(
                {**json.loads(path.read_text()), "auto_map": entry, "model_type": "unheard-of"}
            )
        )
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on the terminal"))
    with pytest.raises(ModelError):
        pretrained("AutoModel", llm, "understanding model", torch.device("cpu"))
    with pytest.raises(ModelError):
        UnderstandingModel(llm, Template(), torch.float32, "cpu").load()
    assert not mark.exists()


def test_loading_leaves_logging_as_it_was(llm):
    import logging

    log = logging.getLogger("transformers.modeling_utils")
    before = log.level, list(log.filters)
    with pytest.raises(ModelError):
        pretrained("AutoModel", llm / "nothing", "model", torch.device("cpu"))
    pretrained("AutoModel", llm, "model", torch.device("cpu"))
    assert (log.level, list(log.filters)) == before


def test_tokenizers_that_are_damaged_are_one_sentence(llm):
    shutil.copy(llm / "tokenizer.json", llm / "kept.json")
    for text in (
        "{",
        "[]",
        '{"version": 3}',
        "\x00" * 10,
        '{"model": {"type": "BPE", "vocab": 3}}',
    ):
        (llm / "tokenizer.json").write_text(text)
        with refuses("invalid_model", kind=ModelError):
            pretrained("AutoTokenizer", llm, "tokenizer")


def test_only_names_that_are_spare_are_spare():
    for name in (
        "lm_head.weight",
        "model.lm_head.weight",
        "model.rotary_emb.inv_freq",
        "decoder.x.weight",
    ):
        assert names.is_spare(name), name
    for name in (
        "lm_head.weight_scale",
        "encoder.x.weight",
        "encoder.block.0.score.weight",
        "layers.0.decoder.weight",
    ):
        assert not names.is_spare(name), name
