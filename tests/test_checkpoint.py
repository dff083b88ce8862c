"""Loading: both layouts, shards, dtypes, damage."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_rt.core.errors import ModelError
from nexus_rt.loading.formats.stored import read_tensors
from nexus_rt.loading.layouts import diffusers_name, to_diffusers
from nexus_rt.loading.source import resolve
from nexus_rt.loading.tensors import find_tensors
from nexus_rt.loading.transformer import load_transformer
from tests.refusals import refuses

CONFIG = dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=3, ffn_dim=48, text_dim=32, freq_dim=32
)
NAME = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    import diffusers

    torch.manual_seed(1)
    diffusers.WanTransformer3DModel(**CONFIG).save_pretrained(tmp_path)
    return tmp_path


def run(model):
    g = torch.Generator().manual_seed(0)
    latents, context = torch.randn(1, 16, 3, 4, 6, generator=g), torch.randn(1, 7, 32, generator=g)
    with torch.no_grad():
        return model(latents, torch.tensor(700.0), model.prepare_context(context))


def original_names(state):
    """Wan's own parameter names, from the list of its published checkpoint (not from the table
    under test)."""
    table = {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "proj_out": "head.head",
        "attn1": "self_attn",
        "attn2": "cross_attn",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "o",
        "ffn.net.0.proj": "ffn.0",
        "ffn.net.2": "ffn.2",
        "norm2": "norm3",
    }
    out = {}
    for name, tensor in state.items():
        if name == "scale_shift_table":
            name = "head.modulation"
        name = name.replace("scale_shift_table", "modulation")
        for theirs, original in table.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(\.)", rf"\g<1>{original}\2", name)
        out[name] = tensor.contiguous()
    return out


def test_the_original_wan_layout_loads_the_same_model(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("original")
    state = original_names(load_file(folder / f"{NAME}.safetensors"))
    assert (
        "blocks.0.self_attn.q.weight" in state
        and "blocks.2.cross_attn.norm_k.weight" in state
        and "head.modulation" in state
    )
    save_file(state, other / f"{NAME}.safetensors")
    config = {
        "model_type": "t2v",
        "dim": 32,
        "num_heads": 2,
        "num_layers": 3,
        "ffn_dim": 48,
        "text_dim": 32,
        "freq_dim": 32,
        "in_dim": 16,
        "out_dim": 16,
        "eps": 1e-6,
    }
    (other / "config.json").write_text(json.dumps(config))
    assert torch.equal(
        run(load_transformer(other, torch.float32)), run(load_transformer(folder, torch.float32))
    )


def test_shards_load_the_same_model(folder, tmp_path_factory):
    import diffusers

    other = tmp_path_factory.mktemp("sharded")
    diffusers.WanTransformer3DModel.from_pretrained(folder).save_pretrained(
        other, max_shard_size="40KB"
    )
    assert len(list(other.glob("*.safetensors"))) > 2
    assert torch.equal(
        run(load_transformer(other, torch.float32)), run(load_transformer(folder, torch.float32))
    )


def test_a_stored_dtype_is_converted(folder, tmp_path_factory):
    import diffusers

    other = tmp_path_factory.mktemp("bf16")
    diffusers.WanTransformer3DModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(
        other
    )
    model = load_transformer(other, torch.float32)
    exact = load_transformer(folder, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.proj_out.weight, exact.proj_out.weight.bfloat16().float())


def test_saving_in_diffusers_names_returns_the_checkpoint(folder):
    stored = load_file(folder / f"{NAME}.safetensors")
    ours = to_diffusers(load_transformer(folder, torch.float32).state_dict())
    assert ours.keys() == stored.keys() and all(torch.equal(ours[k], stored[k]) for k in stored)


def test_read_tensors_gives_the_files_bytes(folder):
    stored = load_file(folder / f"{NAME}.safetensors")
    seen = {name: t.clone() for name, t in read_tensors(find_tensors(folder).items())}
    assert seen.keys() == stored.keys() and all(torch.equal(seen[k], stored[k]) for k in stored)


def test_the_loaded_model_does_not_lean_on_the_file(folder):
    model = load_transformer(folder, torch.float32)
    before = run(model)
    (folder / f"{NAME}.safetensors").write_bytes(b"gone")
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file(folder, keep):
    path = folder / f"{NAME}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with refuses("damaged", kind=ModelError):
        load_transformer(folder)


def test_a_corrupted_header(folder):
    path = folder / f"{NAME}.safetensors"
    data = bytearray(path.read_bytes())
    data[20:60] = b"\xff" * 40
    path.write_bytes(data)
    with refuses("damaged", kind=ModelError):
        load_transformer(folder)


def test_a_missing_shard(folder, tmp_path_factory):
    import diffusers

    other = tmp_path_factory.mktemp("lost")
    diffusers.WanTransformer3DModel.from_pretrained(folder).save_pretrained(
        other, max_shard_size="40KB"
    )
    lost = sorted(other.glob("*.safetensors"))[1]
    lost.unlink()
    with refuses("not_found", kind=ModelError) as error:
        load_transformer(other)
    assert lost.name in str(error.value)


def test_a_pickle_where_safetensors_are_expected(folder):
    state = load_file(folder / f"{NAME}.safetensors")
    (folder / f"{NAME}.safetensors").unlink()
    torch.save(state, folder / f"{NAME}.bin")
    with refuses("unsafe", kind=ModelError) as error:
        load_transformer(folder)
    assert f"{NAME}.bin" in str(error.value)


def test_a_pickle_under_a_safetensors_name(folder):
    torch.save({}, folder / f"{NAME}.safetensors")
    with refuses("damaged", kind=ModelError):
        load_transformer(folder)


def test_weights_of_another_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, name in (
        ({"num_layers": 4}, "blocks.3"),
        ({"num_layers": 2}, "blocks.2"),
        ({"ffn_dim": 64}, "ffn.net.0.proj"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with refuses("mismatch", kind=ModelError) as error:
            load_transformer(folder)
        assert name in str(error.value)


@pytest.mark.parametrize(
    "make, code, param",
    [
        (lambda p: None, "not_found", None),
        (lambda p: (p / "config.json").write_text("{"), "unreadable", None),
        (lambda p: (p / "config.json").write_text("[1]"), "invalid_type", None),
        (
            lambda p: (p / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}'),
            "unsupported",
            "_class_name",
        ),
        (lambda p: (p / "config.json").write_text(json.dumps(CONFIG)), "missing", None),
    ],
)
def test_a_folder_that_is_not_a_model(tmp_path, make, code, param):
    make(tmp_path)
    with refuses(code, param, ModelError):
        load_transformer(tmp_path)


def test_a_hub_id_is_read_from_the_local_cache(folder, tmp_path_factory):
    cache = tmp_path_factory.mktemp("hub")
    snapshot = cache / "models--owner--wan" / "snapshots" / "abc123"
    (snapshot / "transformer").mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / "transformer" / file.name).write_bytes(file.read_bytes())
    (cache / "models--owner--wan" / "refs").mkdir()
    (cache / "models--owner--wan" / "refs" / "main").write_text("abc123")
    found = resolve("owner/wan", ("transformer",), cache_dir=cache, local_files_only=True)
    assert torch.equal(
        run(load_transformer(found, torch.float32)), run(load_transformer(folder, torch.float32))
    )
    with refuses("not_found", "source", ModelError) as error:
        resolve("owner/other", ("transformer",), cache_dir=cache, local_files_only=True)
    assert "owner/other" in str(error.value)
    with refuses("not_found", "source", ModelError) as error:
        resolve("./nowhere", ("transformer",))
    assert "./nowhere" in str(error.value)


def test_names_of_both_layouts_meet():
    assert diffusers_name("blocks.7.self_attn.norm_q.weight") == "blocks.7.attn1.norm_q.weight"
    assert diffusers_name("model.blocks.7.cross_attn.o.bias") == "blocks.7.attn2.to_out.0.bias"
    assert diffusers_name("blocks.7.attn2.to_out.0.bias") == "blocks.7.attn2.to_out.0.bias"
    assert (
        diffusers_name("head.modulation")
        == diffusers_name("scale_shift_table")
        == "scale_shift_table"
    )
