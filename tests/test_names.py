"""Names of stored tensors: wrappers anywhere, adapters of any name, experts in one file; and tensors
that a model would leave out."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_rt.components.text import TextEncoder
from nexus_rt.components.understanding import UnderstandingModel
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import ModelError
from nexus_rt.loading.connector import load_connector, save_connector
from nexus_rt.loading.convert_wan import convert_wan
from nexus_rt.loading.layouts import diffusers_name, to_diffusers
from nexus_rt.loading.lora import Lora, loras_of
from nexus_rt.loading.lora_changes import Changes
from nexus_rt.loading.lora_file import read_key
from nexus_rt.loading.names import WRAPPERS, plain_name
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.models.template import Template
from tests.needs import needs
from tests.omnivideo import make_llm, original_t5_names, original_vae_names, original_wan_names
from tests.published import fp8_scaled, save, wan_state
from tests.refusals import refuses

FORMS = {
    "at the front": lambda n, w: f"{w}.{n}",
    "inside": lambda n, w: n.replace(".", f".{w}.", 1),
    "twice": lambda n, w: f"{w}." + n.replace(".", f".{w}.", 2),
    "before the last part": lambda n, w: ".".join([*n.split(".")[:-1], w, n.split(".")[-1]]),
}


def wrapped(state, form, wrapper):
    """Names as a wrapped model has them."""
    return {FORMS[form](name, wrapper): value for name, value in state.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_taken_off_anywhere(form, wrapper):
    for name in ("blocks.3.attn1.to_q.weight", "decoder.mid_block.resnets.0.conv1.bias"):
        assert plain_name(FORMS[form](name, wrapper)) == name
    for name in ("blocks.0.ffn.2.weight", "my_module.weight", "blocks.module_list.0.bias"):
        assert plain_name(name) == name


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module"])
def test_a_transformer_of_wrapped_names(tiny_pair, tmp_path, form, wrapper, original):
    folder = shutil.copytree(tiny_pair / "small", tmp_path / "small")
    file = folder / "diffusion_pytorch_model.safetensors"
    plain = load_transformer(folder, torch.float32).state_dict()
    state = load_file(file)
    save(wrapped(original_wan_names(state) if original else state, form, wrapper), file)
    assert same(load_transformer(folder, torch.float32).state_dict(), plain)


@pytest.mark.parametrize(
    "prefix",
    [
        "model._orig_mod.",
        "module.model.diffusion_model._orig_mod.",
        "transformer_2.",
        "transformer_2._orig_mod.",
        "pipe.dit.",
        "_orig_mod.transformer.",
        "model.transformer.",
    ],
)
def test_holders_and_wrappers_together(prefix):
    name = "blocks.0.attn1.to_q.weight"
    assert diffusers_name(plain_name(prefix + name)) == name
    assert diffusers_name(plain_name(prefix + "blocks.0.self_attn.q.weight")) == name


def test_scales_follow_their_weights(tmp_path):
    """8-bit weights of a compiled model: as tensors beside them and as a note in the header."""
    for style in ("comfy", "comfy_quant", "metadata", "rows"):
        state, _, metadata = fp8_scaled(wan_state(), style)
        plain = load_transformer(
            save(state, tmp_path / f"{style}.safetensors", metadata), torch.float32
        )
        names = {k: f"_orig_mod.{k}".replace("blocks.0.", "blocks.0.module.") for k in state}
        if metadata:
            document = json.loads(metadata["_quantization_metadata"])
            moved = {
                f"_orig_mod.{k}".replace("blocks.0.", "blocks.0.module."): v
                for k, v in document["layers"].items()
            }
            metadata = {"_quantization_metadata": json.dumps({**document, "layers": moved})}
        file = save(
            {names[k]: v for k, v in state.items()}, tmp_path / f"{style}-w.safetensors", metadata
        )
        assert same(load_transformer(file, torch.float32).state_dict(), plain.state_dict()), style


def test_gguf_and_pickles(tmp_path):
    needs("gguf")
    import gguf

    state = wan_state()
    plain = load_transformer(save(state, tmp_path / "a.safetensors"), torch.float32).state_dict()
    names = {k: f"model.{k}".replace("blocks.1.", "blocks.1._orig_mod.") for k in state}
    torch.save({names[k]: v for k, v in state.items()}, tmp_path / "a.pth")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
    for name, value in state.items():
        writer.add_tensor(names[name], value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in ("a.pth", "a.gguf"):
        assert same(load_transformer(tmp_path / file, torch.float32).state_dict(), plain), file


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_text_encoder_and_vae(own_pair, form, original):
    for part, file, names, load in (
        (
            "text_encoder",
            "model.safetensors",
            original_t5_names,
            lambda: TextEncoder(own_pair, torch.float32, "cpu"),
        ),
        (
            "vae",
            "diffusion_pytorch_model.safetensors",
            None,
            lambda: VideoDecoder(own_pair / "vae", torch.float32, "cpu"),
        ),
    ):
        path = own_pair / part / file
        made = load()
        made.load()
        plain, state = made.model.state_dict(), load_file(path)
        state = names(state) if original and names else state
        save_file(
            {k: v.clone() for k, v in wrapped(state, form, "_orig_mod").items()},
            path,
            {"format": "pt"},
        )
        made = load()
        made.load()
        assert same(made.model.state_dict(), plain), part


def test_a_vae_in_wans_own_names(tmp_path):
    from tests.published import vae_model

    state = vae_model().state_dict()
    own = {f"vae.module.{k}": v for k, v in original_vae_names(state).items()}
    vae = VideoDecoder(save(own, tmp_path / "Wan2.1_VAE.safetensors"), torch.float32, "cpu")
    vae.load()
    assert same(dict(vae.model.state_dict()), state)


@pytest.mark.parametrize("form", FORMS)
def test_language_models_and_connectors(tmp_path, form):
    from nexus_rt.loading.pair_folder import MINI
    from nexus_rt.loading.pretrained import pretrained

    make_llm(tmp_path / "llm")
    file = tmp_path / "llm" / "model.safetensors"

    def states():
        model = UnderstandingModel(tmp_path / "llm", Template(), torch.float32, "cpu")
        model.load()
        whole = pretrained("AutoModelForCausalLM", tmp_path / "llm", "llm", torch.device("cpu"))
        return model.model.state_dict(), whole.state_dict(), model.answer("panda", limit=4)

    plain = states()
    save_file(
        {k: v.clone() for k, v in wrapped(load_file(file), form, "_orig_mod").items()},
        file,
        {"format": "pt"},
    )
    again = states()
    assert same(again[0], plain[0]) and same(again[1], plain[1]) and again[2] == plain[2]

    connector = load_connector(MINI / "connector", torch.float32)
    save_connector(connector, tmp_path / "connector", torch.float32)
    file = tmp_path / "connector" / "model.safetensors"
    save(wrapped(load_file(file), form, "module"), file)
    again = load_connector(tmp_path / "connector", torch.float32)
    assert same(again.state_dict(), connector.state_dict())


def test_one_parameter_under_two_names_is_refused(tiny_pair, tmp_path):
    folder = shutil.copytree(tiny_pair / "small", tmp_path / "small")
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["_orig_mod.proj_out.bias"] = state["proj_out.bias"].clone()
    save(state, file)
    with refuses("duplicate", kind=ModelError) as error:
        load_transformer(folder)
    assert "_orig_mod.proj_out.bias" in str(error.value)


# LoRAs


@pytest.mark.parametrize(
    "key",
    [
        "transformer.blocks.0.attn1.to_q.lora_A.weight",
        "blocks.0.attn1.to_q.lora_A.other.weight",
        "transformer.blocks.0.attn1.to_q.lora_A.my-style_2.weight",
        "base_model.model.blocks.0.attn1.to_q.lora_A.default_0.weight",
        "module.blocks.0._checkpoint_wrapped_module.attn1.to_q.lora_A.default.weight",
        "_orig_mod.blocks.0._fsdp_wrapped_module.self_attn._orig_mod.q.lora_down.weight",
        "transformer_2.blocks.0.attn1.to_q.lora_A.weight",
        "base_model.model.transformer_2.blocks.0.attn1.to_q.lora_A.weight",
        "lora_unet_blocks_0_self_attn_q.lora_down.weight",
        "lora_unet__orig_mod_blocks_0_self_attn_q.lora_down.weight",
        "lora_unet_blocks_0__checkpoint_wrapped_module_self_attn_q.lora_down.weight",
        "blocks.0.self_attn.q.lora_down.style.weight",
    ],
)
def test_a_loras_key(key):
    read = read_key(key)
    assert (read.parameter, read.kind) == ("blocks.0.attn1.to_q.weight", "down")
    assert read.second == ("transformer_2" in key)


@pytest.mark.parametrize(
    "key", ["blocks.0.attn1.to_q.lora_A", "blocks.0.attn1.to_q.lora_C.other.weight", "x.weight"]
)
def test_what_is_none_of_a_loras(key):
    assert read_key(key) is None


def products(prefix, seed, place="blocks.0.attn1.to_q", width=32):
    g = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}{place}.lora_A.weight": torch.randn(2, width, generator=g),
        f"{prefix}{place}.lora_B.weight": torch.randn(width, 2, generator=g),
    }


def merged(folder, expert, lora, experts=("high", "low")):
    """What is added to a parameter of an expert."""
    own = loras_of("large", experts, [lora])[expert]
    with_it, without = (
        to_diffusers(load_transformer(folder, torch.float32, loras=ls).state_dict())
        for ls in (own, ())
    )
    name = "blocks.0.attn1.to_q.weight"
    assert all(torch.equal(with_it[k], without[k]) for k in without if k != name)
    return with_it[name] - without[name]


def product(tensors, scale=1.0):
    down, up = tensors.values()
    return up @ down * scale


def test_a_file_with_a_lora_for_each_expert(tiny_pair, tmp_path):
    """`transformer.` goes to the expert for high noise and `transformer_2.` to the other."""
    first, second = products("transformer.", 1), products("transformer_2.", 2)
    folder, file = tiny_pair / "small", tmp_path / "both.safetensors"
    config = {
        f"transformer{n}.{k}": v
        for n, a in (("", 2), ("_2", 8))
        for k, v in (("r", 2), ("lora_alpha", a))
    }
    save_file({**first, **second}, file, {"lora_adapter_metadata": json.dumps(config)})
    lora, close = Lora(file), dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged(folder, "high", lora), product(first), **close)
    torch.testing.assert_close(merged(folder, "low", lora), product(second, 4.0), **close)
    with refuses("unsupported", kind=ModelError):
        merged(folder, "", lora, ("",))
    # named for one expert, its own half goes there
    named = Lora(file, 1.0, "low")
    assert loras_of("large", ("high", "low"), [named])["high"] == []
    torch.testing.assert_close(merged(folder, "low", named), product(second, 4.0), **close)


def test_a_file_of_transformer_2_alone(tiny_pair, tmp_path):
    tensors = products("transformer_2.", 3)
    folder, file = tiny_pair / "small", tmp_path / "low.safetensors"
    save_file(tensors, file)
    close = dict(atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged(folder, "low", Lora(file)), product(tensors), **close)
    assert not merged(folder, "high", Lora(file)).any()
    # where the user says otherwise, or there is one transformer
    high = Lora(file, 1.0, "high")
    torch.testing.assert_close(merged(folder, "high", high), product(tensors), **close)
    torch.testing.assert_close(merged(folder, "", Lora(file), ("",)), product(tensors), **close)


def test_an_empty_lora_of_experts_is_still_refused(tmp_path):
    zero = {k: torch.zeros_like(v) for k, v in products("transformer.", 0).items()}
    save_file(zero, tmp_path / "a.safetensors")
    (lora,) = loras_of("large", ("high", "low"), [Lora(tmp_path / "a.safetensors")])["high"]
    with refuses("invalid_model", kind=ModelError):
        Changes([lora], {"blocks.0.attn1.to_q.weight": (32, 32)})


def test_two_adapters_in_one_file_are_refused(tmp_path):
    names = {
        k.replace(".weight", f".{a}.weight"): v
        for a in ("one", "two")
        for k, v in products("", 0).items()
    }
    save_file({k: v.clone() for k, v in names.items()}, tmp_path / "a.safetensors")
    with refuses("duplicate", kind=ModelError):
        Changes([Lora(tmp_path / "a.safetensors")], {"blocks.0.attn1.to_q.weight": (32, 32)})


# tensors that would be left out


def with_extra(folder, tmp_path, extra):
    """A transformer's folder, and a file of its own, with more tensors."""
    folder = shutil.copytree(folder, tmp_path / "model")
    file = folder / "diffusion_pytorch_model.safetensors"
    save({**load_file(file), **extra}, file)
    return folder


EXTRA = {  # of checkpoints of other architectures -> what the error names
    "blocks.0.to_gate_compress.weight": "video sparse attention",
    "blocks.0.attn1.to_gate_compress.bias": "video sparse attention",
    "blocks.0.self_attn.to_gate_compress.weight": "video sparse attention",
    "blocks.0.attn1.to_q.lora_A.default.weight": "a LoRA that was not merged",
    "model_ema.blocks.0.attn1.to_q.weight": "moving average",
    "blocks.0.attn1.gate.weight": "unknown are 1",
    "clip_projection.weight": "unknown are 1",
    "decay.weight": "unknown are 1",
}


@pytest.mark.parametrize("name, words", EXTRA.items())
def test_trained_tensors_that_would_be_left_out_are_refused(tiny_pair, tmp_path, name, words):
    folder = with_extra(tiny_pair / "small", tmp_path, {name: torch.ones(32, 32)})
    with refuses("mismatch", kind=ModelError) as error:
        load_transformer(folder)
    assert words in str(error.value)
    with refuses("mismatch", kind=ModelError):
        convert_wan(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_the_error_of_fastwan_names_its_recipe(tiny_pair, tmp_path):
    from nexus_rt.pipeline.recipes import RECIPES

    name = "blocks.0.to_gate_compress.weight"
    folder = with_extra(tiny_pair / "small", tmp_path, {name: torch.zeros(32, 32)})
    with refuses("mismatch", kind=ModelError) as error:
        load_transformer(folder)
    assert "fastwan-3step" in str(error.value)
    assert "fastwan-3step" in RECIPES


HARMLESS = {
    "blocks.0.attn2.norm_added_q.weight": torch.ones(32),
    "n_averaged": torch.tensor(7),
    "module.n_averaged": torch.tensor(7),
    "num_updates": torch.tensor([3], dtype=torch.int32),
    "ema.decay": torch.tensor(0.999),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_tensors_are_left_out_and_said(tiny_pair, tmp_path, name):
    plain = load_transformer(tiny_pair / "small", torch.float32).state_dict()
    folder = with_extra(tiny_pair / "small", tmp_path, {name: HARMLESS[name]})
    with pytest.warns(UserWarning, match=f"left out 1 .{name}"):
        made = load_transformer(folder, torch.float32)
    assert same(made.state_dict(), plain)
    with pytest.warns(UserWarning, match="left out"):
        convert_wan(folder, tmp_path / "converted")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = load_transformer(tmp_path / "converted", torch.float32)
    assert same(converted.state_dict(), plain)


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"window_size": [8, 8]}, "window_size"),
        ({"text_len": 256}, "text_len"),
    ],
)
def test_what_a_transformers_config_sets_beside_its_architecture(
    tiny_pair, tmp_path, changes, param
):
    folder = shutil.copytree(tiny_pair / "small", tmp_path / "small")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "window_size": [-1, -1], "text_len": 512}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_transformer(folder)
    path.write_text(json.dumps({**config, **changes}))
    with refuses("unsupported", param, ModelError):
        load_transformer(folder)


def test_fields_of_a_forks_config_are_said(tiny_pair, tmp_path):
    folder = shutil.copytree(tiny_pair / "small", tmp_path / "small")
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"local_attn_size": 21, "sink_size": 0, "_x": 1}
    path.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="not read here: local_attn_size;"):
        load_transformer(folder)


def test_a_conversion_keeps_the_schedule(tiny_pair, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    from nexus_rt.loading.pair_folder import find_pair
    from nexus_rt.pipeline.defaults import pair_defaults

    source = tmp_path / "wan"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny_pair / part, source / part)
    shutil.copytree(tiny_pair / "small", source / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=8.0).save_pretrained(source / "scheduler")
    entry = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (source / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "scheduler": entry})
    )
    convert_wan(source, tmp_path / "out")
    found = find_pair(None, {"large": tmp_path / "out"}, {})
    for part, fields in (
        ("vae", ("latents_mean", "latents_std", "num_res_blocks", "base_dim")),
        ("text_encoder", ("relative_attention_max_distance", "feed_forward_proj", "num_heads")),
    ):
        configs = [
            json.loads((r / part / "config.json").read_text()) for r in (source, tmp_path / "out")
        ]
        assert all(configs[0][f] == configs[1][f] for f in fields), part
    defaults = pair_defaults(found.stated)
    assert (defaults.shift, defaults.solver) == (8.0, "euler")
    assert same(
        load_transformer(tmp_path / "out", torch.float32).state_dict(),
        load_transformer(tiny_pair / "small", torch.float32).state_dict(),
    )


def test_a_text_encoders_and_a_vaes_extras_are_refused_by_a_conversion(own_pair, tmp_path):
    from tests.published import vae_state

    path = own_pair / "text_encoder" / "model.safetensors"
    states = {"text_encoder": load_file(path), "vae": vae_state()}
    for part, state in states.items():
        spare = {"decoder.block.0.x.weight": torch.ones(2)} if part == "text_encoder" else {}
        file = save(
            {k: v.clone() for k, v in {**state, **spare}.items()}, tmp_path / f"{part}.safetensors"
        )
        convert_wan(file, tmp_path / f"whole-{part}")
        extra = {**state, "encoder.extra.weight": torch.ones(2)}
        file = save({k: v.clone() for k, v in extra.items()}, tmp_path / f"{part}.safetensors")
        with refuses("mismatch", kind=ModelError) as error:
            convert_wan(file, tmp_path / "out")
        assert "encoder.extra.weight" in str(error.value)


def test_fields_of_a_forks_vae_are_said(own_pair):
    path = own_pair / "vae" / "config.json"
    load = lambda: VideoDecoder(own_pair / "vae", torch.float32, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_3d_rope": True}))
    with pytest.warns(UserWarning, match="not read here: use_3d_rope;"):
        load()
