"""Published checkpoints to a pair's folder: nothing lost, nothing run, nothing half-written."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from nexus_rt import NexusPipeline
from nexus_rt.cli import main
from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.loading.convert import LAYOUT, convert_omnivideo
from nexus_rt.loading.formats.pickles import read_pickle
from nexus_rt.loading.formats.safetensors import write_shards
from nexus_rt.loading.formats.stored import read_tensors
from nexus_rt.loading.layouts import t5_name
from nexus_rt.loading.tensors import find_tensors
from tests.omnivideo import make_published, original_t5_names, original_vae_names
from tests.refusals import refuses


@pytest.fixture(scope="module")
def published(tiny_pair, tmp_path_factory):
    root = tmp_path_factory.mktemp("omnivideo") / "src"
    return root, make_published(root, tiny_pair)


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "pair"
    return target, convert_omnivideo(published[0], target)


@pytest.fixture
def damaged(published, tmp_path):
    return shutil.copytree(published[0], tmp_path / "src", symlinks=True)


def tensors(folder):
    return {k: v.clone() for k, v in read_tensors(find_tensors(folder).items())}


def test_every_part_has_its_weights(converted, published):
    target, wanted = converted[0], published[1]
    for part in ("small", "connector", "vae"):
        got = tensors(target / part)
        assert got.keys() == wanted[part].keys()
        assert all(torch.equal(got[k], v) for k, v in wanted[part].items()), part
    for pickled in target.rglob("*"):
        assert pickled.suffix not in (".pt", ".pth", ".bin", ".pkl")


def test_the_text_encoder_says_the_same(converted, published):
    from transformers import UMT5EncoderModel

    ids = torch.tensor([[3, 4, 5, 1]])
    got = UMT5EncoderModel.from_pretrained(converted[0] / "text_encoder")(ids).last_hidden_state
    assert torch.equal(got, published[1]["encoder"](ids).last_hidden_state)


def test_the_vae_decodes_the_same(converted, published):
    from diffusers import AutoencoderKLWan

    theirs = AutoencoderKLWan(base_dim=4, z_dim=16)
    theirs.load_state_dict(published[1]["vae"])
    ours = AutoencoderKLWan.from_pretrained(converted[0] / "vae")
    z = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)
    assert ours.config.latents_mean[0] == -0.7571  # the published statistics


def test_every_key_is_accounted_for(converted):
    target, report = converted
    assert report.unused == {
        LAYOUT["transformer"]: [
            "visual_context_adapter.proj.weight",
            "wan_model.img_emb.proj.0.weight",
        ],
        LAYOUT["tokens"]: ["<vid_st>"],
        LAYOUT["context"]: ["prompt"],
    }
    adapter = report.overridden[LAYOUT["adapter"]]
    assert "fc.0.bias" not in adapter and report.used[LAYOUT["adapter"]] == 1
    assert (
        len(report.overridden[LAYOUT["wan"]]) == len(tensors(target / "small"))
        and report.used[LAYOUT["wan"]] == 0
    )
    kept = json.loads((target / "conversion.json").read_text())
    assert kept["unused"] == report.unused and kept["used"] == report.used
    assert "2 unused (visual_context_adapter.proj.weight, wan_model.img_emb" in str(report)


def test_the_pipeline_runs_it(converted, published, tiny_pair):
    """With a large generator of the same width; and the stored negative branch is what guidance
    sees."""
    pipe = NexusPipeline.from_pretrained(converted[0], large=tiny_pair / "large")
    pipe.set_progress_bar_config(disable=True)
    size = dict(height=32, width=32, num_frames=5, num_inference_steps=3)
    frames = pipe(
        "the red panda", plan="reference", generator=torch.Generator().manual_seed(0), **size
    ).frames
    assert frames.shape == (1, 5, 32, 32, 3) and np.isfinite(frames).all()
    text, none = pipe.encode_prompt("the red panda")
    stored = published[1]["context"]
    assert torch.equal(none[0, :5], stored["text_emb"][0]) and not none[0, 5:].any()
    context, negative = pipe.encode_context("the red panda", text, none)
    with torch.no_grad():
        adapter = pipe.context.connector(stored["vlm_last_hidden_states"])[0]
    tokens = published[1]["tokens"]
    rows = [
        tokens["<ipl_st>"],
        adapter,
        tokens["<ipl_ed>"],
        tokens["<prp_st>"],
        stored["text_emb"][0],
        tokens["<prp_ed>"],
    ]
    assert (
        torch.allclose(negative[0, : 24 + 5 + 4], torch.cat(rows), atol=1e-6)
        and not negative[0, 33:].any()
    )
    assert context.shape == (1, 2560, 32) and (context != negative).any()


def test_real_sizes_keep_every_name():
    """UMT5-XXL and Wan's VAE on the meta device: Wan's own names become the libraries', one to
    one."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        config = UMT5Config(
            vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
        )
        encoder, vae = UMT5EncoderModel(config), AutoencoderKLWan()
    own = original_t5_names(dict(encoder.named_parameters()))
    assert len(own) == 24 * 10 + 2 and not any(k.startswith("encoder.") for k in own)
    assert {t5_name(k): v.shape for k, v in own.items()} == {
        k: v.shape for k, v in encoder.named_parameters()
    }
    own = original_vae_names(vae.state_dict())
    assert {"encoder.conv1.weight", "decoder.middle.1.to_qkv.weight", "conv2.bias"} <= own.keys()
    back = convert_wan_vae_to_diffusers(dict(own))
    assert {k: v.shape for k, v in back.items()} == {
        k: v.shape for k, v in vae.state_dict().items()
    }


def test_it_runs_from_the_shell(published, tmp_path, capsys):
    target = tmp_path / "pair"
    assert main(["convert", "omnivideo", str(published[0]), str(target)]) == 0
    out = capsys.readouterr().out
    assert "transformer/model.pt" in out and (target / "model_index.json").is_file()
    assert main(["convert", "omnivideo", str(published[0]), str(target)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["convert", "omnivido", str(published[0]), str(tmp_path / "other")]) == 2
    assert "omnivideo" in capsys.readouterr().err


def test_context_saved_by_torch_reads_as_well(tiny_pair, tmp_path):
    wanted = make_published(tmp_path / "src", tiny_pair, zipped_context=True)
    convert_omnivideo(tmp_path / "src", tmp_path / "dst")
    got = tensors_of(tmp_path / "dst" / "connector" / "unconditional.safetensors")
    assert torch.equal(got["text"], wanted["context"]["text_emb"][0])


def tensors_of(path):
    from safetensors.torch import load_file

    return load_file(path)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "part", ["context", "tokens", "transformer", "adapter", "vision_head", "vae", "t5"]
)
@pytest.mark.parametrize("by_torch", [False, True])
def test_a_hostile_pickle_is_refused(damaged, tmp_path, part, by_torch):
    value, path = {"text_emb": Hostile(tmp_path / "owned")}, damaged / LAYOUT[part]
    if by_torch:
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value))
    with refuses("unsafe", kind=ModelError) as error:
        convert_omnivideo(damaged, tmp_path / "dst")
    assert "mkdir" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_pickles_of_tensors_and_containers_are_read(tmp_path):
    value = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": [torch.ones(2, dtype=torch.bfloat16), (1, "x", None)],
        "c": np.arange(4, dtype=np.float32),
        "d": torch.nn.Parameter(torch.zeros(3)),
        "e": np.float64(2.5),
        "f": {1.5, 2.5},
    }
    for protocol in (2, 4, 5):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(value, protocol))
        got = read_pickle(path)
        assert (
            torch.equal(got["a"], value["a"])
            and torch.equal(got["b"][0], value["b"][0])
            and got["b"][1] == (1, "x", None)
        )
        assert np.array_equal(got["c"], value["c"]) and torch.equal(got["d"], value["d"])
        assert got["e"] == 2.5 and got["f"] == {1.5, 2.5}
    torch.save(value["a"], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickle(tmp_path / "old.pt"), value["a"])


DAMAGE = {
    "no adapter": (lambda s: (s / LAYOUT["adapter"]).unlink(), "not_found", "adapter/model.pt"),
    "no llm": (lambda s: shutil.rmtree(s / LAYOUT["llm"]), "not_found", "llm"),
    "no zip": (
        lambda s: (s / LAYOUT["vae"]).write_bytes(b"PK\x03\x04not a zip"),
        "damaged",
        "Wan2.1_VAE.pth",
    ),
    "one token": (
        lambda s: (s / LAYOUT["tokens"]).write_bytes(pickle.dumps({"<img_st>": torch.zeros(32)})),
        "missing",
        "<ipl_st>, <ipl_ed>, <prp_st>, <prp_ed>",
    ),
    "half a context": (
        lambda s: (s / LAYOUT["context"]).write_bytes(pickle.dumps({"text_emb": torch.zeros(32)})),
        "missing",
        "vlm_last_hidden_states",
    ),
    "another shape": (
        lambda s: torch.save(
            {"module": {"adapter.fc.0.bias": torch.zeros(3)}}, s / LAYOUT["transformer"]
        ),
        "mismatch",
        "adapter.fc.0.bias",
    ),
    "no query": (
        lambda s: [
            torch.save({"module": {"x": torch.zeros(1)}}, s / LAYOUT["transformer"]),
            torch.save({"fc.0.bias": torch.zeros(3)}, s / LAYOUT["vision_head"]),
        ],
        "missing",
        "vision_head.decoder_query",
    ),
    "a list": (
        lambda s: torch.save([1, 2], s / LAYOUT["transformer"]),
        "invalid_model",
        "transformer/model.pt",
    ),
}


@pytest.mark.parametrize("change, code, name", DAMAGE.values(), ids=DAMAGE)
def test_what_is_wrong_is_said_and_nothing_stays(damaged, tmp_path, change, code, name):
    change(damaged)
    with refuses(code, kind=ModelError) as error:
        convert_omnivideo(damaged, tmp_path / "dst")
    assert name in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_places_that_cannot_be_used(published, tmp_path):
    with refuses("not_found", "source", InputError):
        convert_omnivideo(tmp_path / "nowhere", tmp_path / "dst")
    (tmp_path / "file").write_text("x")
    with refuses("not_writable", "target", ModelError):
        convert_omnivideo(published[0], tmp_path / "file" / "dst")


def test_a_full_disk_leaves_nothing(published, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with refuses("not_writable", "target", ModelError) as error:
        convert_omnivideo(published[0], tmp_path / "dst")
    assert "No space left" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_shards_hold_everything_once(tmp_path):
    wanted = {f"t{i}": torch.randn(10, 10) for i in range(7)}
    write_shards(tmp_path, "model", wanted.items(), limit=1000)
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4 and not list(
        tmp_path.glob("part-*")
    )
    got = tensors(tmp_path)
    assert all(torch.equal(got[k], v) for k, v in wanted.items()) and got.keys() == wanted.keys()


def rewrite(path, change):
    value = read_pickle(path)
    change(value)
    path.write_bytes(pickle.dumps(value))


FORMS = {  # how an embedding of L rows may be stored -> the words of the report
    "a list of one": (lambda x: [x[0]], "a list of 1 [{L}, {D}]"),
    "a tuple of one": (lambda x: (x,), "a tuple of 1 [1, {L}, {D}]"),
    "[1, L, D]": (lambda x: x, "a tensor [1, {L}, {D}]"),
    "[2, L, D]": (lambda x: torch.cat([x, x + 1]), "a tensor [2, {L}, {D}], the first is used"),
    "[L, D]": (lambda x: x[0], "a tensor [{L}, {D}]"),
    "numpy": (lambda x: x.numpy(), "a tensor [1, {L}, {D}]"),
}


@pytest.mark.parametrize("form, words", FORMS.values(), ids=FORMS)
def test_every_form_of_the_unconditional_embeddings_is_read_and_named(
    damaged, published, tmp_path, form, words
):
    stored = published[1]["context"]

    def change(value):
        value |= {k: form(stored[k]) for k in ("text_emb", "vlm_last_hidden_states")}

    rewrite(damaged / LAYOUT["context"], change)
    report = convert_omnivideo(damaged, tmp_path / "dst")
    got = tensors_of(tmp_path / "dst" / "connector" / "unconditional.safetensors")
    assert torch.equal(got["text"], stored["text_emb"][0]) and torch.equal(
        got["hidden"], stored["vlm_last_hidden_states"][0]
    )
    assert "text_emb is " + words.format(L=5, D=32) in report.notes[LAYOUT["context"]]
    assert (
        "vlm_last_hidden_states is " + words.format(L=9, D=40)
        in json.loads((tmp_path / "dst" / "conversion.json").read_text())["notes"][
            LAYOUT["context"]
        ]
    )


@pytest.mark.parametrize(
    "value, code, name",
    [
        ([], "missing", "text_emb"),
        (torch.zeros(1, 5, 31), "mismatch", "[1, 5, 31]"),
        (torch.zeros(1, 5, 32, dtype=torch.int64), "mismatch", "int64"),
        (torch.full((5, 32), float("nan")), "not_finite", ""),
        (torch.zeros(0, 32), "mismatch", ""),
        (torch.zeros(1, 1, 5, 32), "mismatch", ""),
        ("words", "invalid_type", ""),
        (None, "invalid_type", ""),
    ],
)
def test_other_forms_are_refused(damaged, tmp_path, value, code, name):
    rewrite(damaged / LAYOUT["context"], lambda v: v.update(text_emb=value))
    with refuses(code, kind=ModelError) as error:
        convert_omnivideo(damaged, tmp_path / "dst")
    assert name in str(error.value)


def test_what_is_absent_and_not_needed_is_said(damaged, published, tmp_path):
    """No mixed model: Wan's own weights and the adapters' stand; no image markers: text-to-video
    uses none."""
    (damaged / LAYOUT["transformer"]).unlink()
    rewrite(damaged / LAYOUT["tokens"], lambda v: [v.pop("<img_st>"), v.pop("<img_ed>")])
    report = convert_omnivideo(damaged, tmp_path / "dst")
    assert "absent" in report.notes[LAYOUT["transformer"]] and "without <img_st>, <img_ed>" in str(
        report
    )
    got = tensors(tmp_path / "dst" / "small")
    assert all(torch.allclose(got[k], v - 0.5, atol=1e-6) for k, v in published[1]["small"].items())
    pipe = NexusPipeline.from_pretrained(tmp_path / "dst")
    text, none = pipe.encode_prompt("the red panda")
    assert pipe.encode_context("the red panda", text, none)[0].shape == (1, 2560, 32)
    with refuses("missing", kind=ModelError) as error:
        pipe.context.connector.pack(text[0], None, visual=text[0])
    assert "<img_st>" in str(error.value)


def test_an_adapter_that_the_mixed_model_holds_whole_need_not_be_there(damaged, tmp_path):
    adapter = read_pickle(damaged / LAYOUT["adapter"])["model_state_dict"]
    head = read_pickle(damaged / LAYOUT["vision_head"])
    mixed = read_pickle(damaged / LAYOUT["transformer"])["module"]
    mixed = {k: v.clone() for k, v in mixed.items()}
    mixed |= {k.replace("module.", "adapter."): v + 1 for k, v in adapter.items()}
    mixed |= {f"ar_vision_head.{k}": v + 2 for k, v in head.items()}
    torch.save({"module": mixed}, damaged / LAYOUT["transformer"])
    for part in ("adapter", "vision_head"):
        (damaged / LAYOUT[part]).unlink()
    report = convert_omnivideo(damaged, tmp_path / "dst")
    assert {LAYOUT["adapter"], LAYOUT["vision_head"]} <= report.notes.keys()
    got = tensors(tmp_path / "dst" / "connector")
    assert torch.equal(got["adapter.fc.0.bias"], mixed["adapter.fc.0.bias"])


def test_a_language_model_of_pickled_shards_is_read_safely(damaged, published, tmp_path):
    llm = damaged / LAYOUT["llm"]
    state = tensors_of(llm / "model.safetensors")
    (llm / "model.safetensors").unlink()
    names = sorted(state)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, own in shards.items():
        torch.save({k: state[k] for k in own}, llm / file)
    index = {"metadata": {}, "weight_map": {k: file for file, own in shards.items() for k in own}}
    (llm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    report = convert_omnivideo(damaged, tmp_path / "dst")
    assert "2 pickled files" in report.notes[LAYOUT["llm"]]
    assert all(
        torch.equal(v, state[k]) for k, v in tensors(tmp_path / "dst" / "understanding").items()
    )
    NexusPipeline.from_pretrained(tmp_path / "dst").context.understanding.load()
    index["weight_map"][names[0]] = "../../adapter/model.bin"
    (llm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with refuses("unsafe", kind=ModelError):
        convert_omnivideo(damaged, tmp_path / "other")


@pytest.mark.parametrize("whole", [True, False], ids=["alone", "over Wan's"])
def test_the_second_wan_of_the_mixed_model_is_the_large_generator(
    damaged, published, tiny_pair, tmp_path, whole
):
    """The published scripts load `wan_2_model.*` over Wan2.1-T2V-14B, beside wan/, non-strictly."""
    from diffusers import WanTransformer3DModel

    from tests.omnivideo import WAN, original_wan_names

    torch.manual_seed(4)
    large = WanTransformer3DModel(
        **{**WAN, "num_attention_heads": 1, "attention_head_dim": 48, "num_layers": 2}
    )
    state = large.state_dict()
    mixed = {
        k: v.clone() for k, v in read_pickle(damaged / LAYOUT["transformer"])["module"].items()
    }
    tuned = {k: v + 1 for k, v in state.items() if whole or k.startswith("blocks.1.")}
    mixed |= {f"wan_2_model.{k}": v for k, v in original_wan_names(tuned).items()}
    torch.save({"module": mixed}, damaged / LAYOUT["transformer"])
    if not whole:
        with refuses("not_found", kind=ModelError) as error:
            convert_omnivideo(damaged, tmp_path / "dst")
        assert "Wan2.1-T2V-14B" in str(error.value)
        large.save_pretrained(damaged / LAYOUT["wan_14b"])
    report = convert_omnivideo(damaged, tmp_path / "dst")
    got = tensors(tmp_path / "dst" / "large")
    assert got.keys() == state.keys() and all(
        torch.equal(v, tuned.get(k, state[k])) for k, v in got.items()
    )
    assert not any("wan_2_model" in k for k in report.unused.get(LAYOUT["transformer"], []))
    pipe = NexusPipeline.from_pretrained(tmp_path / "dst")
    assert set(pipe.engines) == {"small", "large"} and pipe.defaults.plan == "handoff=0.3"
    assert (
        json.loads((tmp_path / "dst" / "model_index.json").read_text())["defaults"]["plan"]
        == "handoff=0.3"
    )


def test_links_out_of_the_published_folder_are_not_followed(damaged, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("private")
    (damaged / LAYOUT["llm"] / "notes.txt").symlink_to(secret)
    with refuses("unsafe", kind=ModelError) as error:
        convert_omnivideo(damaged, tmp_path / "dst")
    assert "notes.txt" in str(error.value) and "secret.txt" in str(error.value)
    assert not (tmp_path / "dst").exists()
