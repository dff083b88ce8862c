"""The understanding model: the published template, hidden states, and what is said when parts are
missing."""

import json

import pytest
import torch

from nexus_rt.components.understanding import UnderstandingModel
from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.models.template import Template
from tests.omnivideo import LLAMA3, WORDS, make_llm
from tests.refusals import refuses


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    make_llm(folder)
    return folder


def test_the_published_template():
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual"
        " content that the user provides, and assist the user with a variety of tasks using natural"
        " language."
    )
    assert (
        Template().render("a {red} panda")
        == f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGenerate a video about:\na {red}"
        " panda<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[GEN_VID]<|end_of_text|>"
    )
    image = Template().render("x", single_frame=True)
    assert "Generate an image about:\nx<|eot_id|>" in image and image.endswith(
        "[GEN_IMG]<|end_of_text|>"
    )


def test_hidden_states_are_the_models_last(llm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = UnderstandingModel(llm, Template(), torch.float32, "cpu")
    states = ours.hidden_states("the red panda")
    text = Template().render("the red panda")
    ids = AutoTokenizer.from_pretrained(llm)(
        text, add_special_tokens=False, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(llm)(
            ids, output_hidden_states=True
        ).hidden_states[-1]
    assert ids.shape[1] > 30 and torch.equal(states, theirs)
    assert (ours.hidden_states("the red panda", True) != ours.hidden_states("the red panda")).any()


def test_an_image_text_model_reads_text(tmp_path):
    """Any transformers model with last hidden states: here LLaVA's shape, an image tower beside the
    language model."""
    from transformers import (
        AutoTokenizer,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    make_llm(tmp_path)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    ).eval()
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path)
    states = UnderstandingModel(tmp_path, Template(), torch.float32, "cpu").hidden_states(
        "the panda"
    )
    ids = AutoTokenizer.from_pretrained(tmp_path)(
        Template().render("the panda"), add_special_tokens=False, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        theirs = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert states.shape[-1] == 24 and torch.allclose(states, theirs, atol=1e-6)


def test_dtype_and_drop(llm):
    ours = UnderstandingModel(llm, Template(), torch.bfloat16, "cpu")
    first = ours.hidden_states("panda")
    assert first.dtype == torch.bfloat16
    ours.drop()
    assert ours.model is None and torch.equal(ours.hidden_states("panda"), first)


@pytest.mark.parametrize(
    "change, code, param",
    [
        ({"video": "Generate a video [GEN_VID]"}, "invalid_value", "video"),
        ({"video": "{prompt} {prompt} [GEN_VID]"}, "invalid_value", "video"),
        ({"image": "{prompt}"}, "missing", "image"),
        ({"vidoe": "{prompt} [GEN_VID]"}, "unknown_name", "vidoe"),
    ],
)
def test_templates_that_cannot_work(change, code, param):
    with refuses(code, param, ModelError):
        Template.from_dict(change)


@pytest.mark.parametrize("marker", ["[GEN_VID]", "[GEN_IMG]"])
def test_a_tokenizer_without_a_marker_is_refused(tmp_path, marker):
    make_llm(tmp_path, words=[w for w in (*LLAMA3, *WORDS) if w != marker])
    with refuses("mismatch", kind=ModelError) as error:
        UnderstandingModel(tmp_path, Template(), torch.float32, "cpu").hidden_states("panda")
    assert marker in str(error.value)


def test_a_prompt_longer_than_the_positions(llm):
    with refuses("too_large", "prompt", InputError) as error:
        UnderstandingModel(llm, Template(), torch.float32, "cpu").hidden_states("panda " * 300)
    assert "256" in str(error.value)


def test_folders_that_are_none(tmp_path, llm):
    with refuses("not_found", kind=ModelError):
        UnderstandingModel(tmp_path, Template(), torch.float32, "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with refuses("missing", kind=ModelError):
        UnderstandingModel(tmp_path, Template(), torch.float32, "cpu").load()
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with refuses("invalid_model", kind=ModelError):
        UnderstandingModel(tmp_path, Template(), torch.float32, "cpu").load()


@pytest.mark.parametrize(
    "pad, eos", [("<|eot_id|>", None), (None, "<|eot_id|>"), ("<unk>", "<|eot_id|>")]
)
def test_the_mask_is_that_of_the_published_code(llm, tmp_path, pad, eos):
    """`input_ids != pad`, the end token where there is no padding token: so a template's own end
    tokens are masked there."""
    import shutil

    from transformers import AutoModel, AutoTokenizer

    folder = shutil.copytree(llm, tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.eos_token = pad, eos
    tokenizer.save_pretrained(folder)
    states = UnderstandingModel(folder, Template(), torch.float32, "cpu").hidden_states(
        "the red panda"
    )
    ids = tokenizer(
        Template().render("the red panda"), add_special_tokens=False, return_tensors="pt"
    ).input_ids
    mask = (ids != tokenizer.convert_tokens_to_ids(pad or eos)).long()
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(folder)(
            input_ids=ids, attention_mask=mask
        ).last_hidden_state
        unmasked = AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state
    assert (
        0 < mask.sum() < mask.numel()
        and torch.equal(states, theirs)
        and not torch.allclose(states, unmasked)
    )
