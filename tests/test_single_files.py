"""Single files of every kind, in the published names: the numbers of what they stand for, and
errors that name what is not read."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from nexus_rt import ModelError, NexusPipeline
from nexus_rt.cli import main
from nexus_rt.components.text import TextEncoder
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import InputError
from nexus_rt.loading.tensors import find_tensors
from nexus_rt.loading.transformer import load_config, load_transformer
from tests import published
from tests.omnivideo import original_wan_names
from tests.refusals import refuses


@torch.no_grad()
def run(model):
    """A velocity of fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 2, 4, 6, generator=generator)
    text = torch.randn(1, 5, 32, generator=generator)
    if hasattr(model, "prepare_context"):
        return model(x, torch.tensor(500.0), model.prepare_context(text))
    return model(x, torch.tensor([500.0]), text, return_dict=False)[0]


def of_state(state):
    """diffusers' model of a state in Wan's own names."""
    model = published.wan_model()
    names = {theirs: ours for ours, theirs in _names(model).items()}
    model.load_state_dict({names[k]: v.float() for k, v in state.items()})
    return model


def _names(model):
    """diffusers' names -> Wan's own."""
    return {k: next(iter(original_wan_names({k: v}))) for k, v in model.state_dict().items()}


def same(file, state, atol=1e-5):
    """Raise unless a file computes what a state does."""
    got, want = run(load_transformer(file, torch.float32)), run(of_state(state))
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-4)


@pytest.mark.parametrize(
    "prefix", ["", published.COMFY, "diffusion_model.", "model.", "transformer."]
)
def test_a_transformer_of_a_single_file(tmp_path, prefix):
    state = published.wan_state()
    file = published.save(
        {prefix + k: v for k, v in state.items()}, tmp_path / "any name.safetensors"
    )
    config = load_config(file)
    assert (config.num_attention_heads, config.attention_head_dim, config.num_layers) == (2, 128, 2)
    assert (config.ffn_dim, config.text_dim, config.freq_dim, config.in_channels) == (
        512,
        32,
        32,
        16,
    )
    same(file, state)
    # the only file of a folder, whatever its name, and under transformer/
    same(tmp_path, state)
    inner = tmp_path / "pipeline" / "transformer"
    inner.mkdir(parents=True)
    shutil.copy(file, inner / "weights-v2.safetensors")
    same(tmp_path / "pipeline", state)


@pytest.mark.parametrize(
    "style, dtype",
    [
        ("comfy", torch.float8_e4m3fn),
        ("comfy", torch.float8_e5m2),
        ("comfy_quant", torch.float8_e4m3fn),
        ("metadata", torch.float8_e4m3fn),
        ("rows", torch.float8_e4m3fn),
        ("rows", torch.int8),
        ("blocks", torch.float8_e4m3fn),
    ],
)
def test_8_bit_weights_with_their_scales(tmp_path, style, dtype):
    state, exact, metadata = published.fp8_scaled(published.wan_state(), style, dtype)
    prefixed = {published.COMFY + k if k != "scaled_fp8" else k: v for k, v in state.items()}
    if metadata:
        prefixed = state  # the notes name layers as the file does
    file = published.save(prefixed, tmp_path / "wan_fp8_scaled.safetensors", metadata)
    same(file, exact)
    kinds = {t.encoding.name for t in find_tensors(file).values() if t.encoding}
    words = {"rows": " scaled by row", "blocks": " scaled by 128x128"}.get(style, " scaled")
    assert len(kinds) == 1 and kinds.pop().endswith(words)


def test_plain_fp8(tmp_path):
    state = published.wan_state()
    small = {
        k: v.to(torch.float8_e4m3fn) if published.is_quantised(k) else v for k, v in state.items()
    }
    file = published.save(small, tmp_path / "wan_fp8_e4m3fn.safetensors")
    same(file, {k: v.float() for k, v in small.items()})


@pytest.mark.parametrize(
    "kinds",
    [
        ("Q8_0",),
        ("Q4_K", "Q6_K"),
        ("Q5_K", "Q6_K", "F16"),
        ("Q3_K", "Q2_K"),
        ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"),
    ],
)
def test_gguf(tmp_path, kinds):
    exact = published.save_gguf(published.wan_state(), tmp_path / "wan.gguf", kinds)
    same(tmp_path / "wan.gguf", exact)


def test_a_reshaped_gguf_tensor_has_its_own_shape_again(tmp_path):
    """ComfyUI-GGUF's converter stores rows that no block fits as rows of 256, and says so."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    raw = published.gguf_blocks("Q4_K", 9, 256, np.random.default_rng(0))
    writer.add_tensor("odd.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.add_array("comfy.gguf.orig_shape.odd.weight", (24, 96))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = find_tensors(tmp_path / "x.gguf")["odd.weight"]
    from nexus_rt.loading.formats.stored import read_tensors

    ((_, got),) = read_tensors([("odd.weight", stored)])
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_K).reshape(24, 96)
    assert stored.shape == (24, 96) and np.array_equal(got.numpy(), want)


def _gguf_with(tmp_path, kind):
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    size = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, kind)]
    raw = np.zeros((4, 256 // size[0] * size[1]), dtype=np.uint8)
    writer.add_tensor("a.weight", raw, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "x.gguf"


@pytest.mark.parametrize("kind", ["IQ4_NL", "IQ4_XS", "IQ2_XXS", "TQ1_0", "MXFP4"])
def test_a_gguf_type_that_is_not_read_is_named(tmp_path, kind):
    with refuses("unsupported", kind=ModelError) as error:
        find_tensors(_gguf_with(tmp_path, kind))
    assert kind in str(error.value) and "Q4_K" in str(error.value)


def test_damaged_gguf_files_are_refused(tmp_path):
    file = tmp_path / "wan.gguf"
    published.save_gguf(published.wan_state(num_layers=1), file, ("Q8_0",))
    data = file.read_bytes()
    huge = (2**62).to_bytes(8, "little")
    for damaged, code, name in (
        (data[:100], "damaged", "byte 100"),
        (data[:-1000], "damaged", ""),
        (b"", "damaged", ""),
        (b"PK" + data[2:], "damaged", "begin"),
        (data[:4] + (1).to_bytes(4, "little") + data[8:], "unsupported", ""),
        (data[:8] + huge + data[16:], "too_large", "tensors"),
        (data[:16] + huge + data[24:], "too_large", "metadata keys"),
        (data[:24] + huge + data[32:], "too_large", "characters"),
    ):
        file.write_bytes(damaged)
        with refuses(code, kind=ModelError) as error:
            find_tensors(file)
        assert name in str(error.value)


UNREAD = {
    "nf4": ("blocks.0.self_attn.q.weight.quant_state.bitsandbytes__nf4", "bitsandbytes nf4"),
    "fp4": ("blocks.0.self_attn.q.weight.quant_state.bitsandbytes__fp4", "bitsandbytes fp4"),
    "absmax": ("blocks.0.ffn.0.weight.absmax", "bitsandbytes 4-bit"),
    "int8": ("blocks.0.ffn.0.SCB", "bitsandbytes int8"),
    "SVDQuant": ("blocks.0.ffn.0.smooth_factor", "SVDQuant"),
    "nunchaku": ("blocks.0.ffn.0.wscales", "SVDQuant"),
    "GPTQ": ("blocks.0.ffn.0.qzeros", "GPTQ or AWQ"),
    "NVFP4": ("blocks.0.ffn.0.weight_scale_2", "NVFP4"),
    "quanto": ("blocks.0.ffn.0.weight._data", "optimum-quanto"),
}


@pytest.mark.parametrize("key, words", UNREAD.values(), ids=UNREAD)
def test_a_quantisation_that_is_not_read_is_named(tmp_path, key, words):
    state = {**published.wan_state(num_layers=1), key: torch.ones(1)}
    with refuses("unsupported", kind=ModelError) as error:
        load_transformer(published.save(state, tmp_path / "x.safetensors"))
    assert words in str(error.value)


def test_notes_of_other_formats_and_lone_scales_are_refused(tmp_path):
    state, _, _ = published.fp8_scaled(published.wan_state(num_layers=1), "comfy_quant")
    key = "blocks.0.self_attn.q"
    note = lambda text: torch.tensor(list(text.encode()), dtype=torch.uint8)
    for change, code, param, name in (
        (
            {f"{key}.comfy_quant": note('{"format": "nvfp4"}')},
            "unsupported",
            "format",
            "",
        ),
        ({f"{key}.comfy_quant": note("{")}, "unreadable", None, "comfy_quant"),
        ({f"{key}.weight_scale": torch.ones(3)}, "mismatch", None, "(3,)"),
        ({f"{key}.weight_scale": torch.tensor(torch.nan)}, "not_finite", None, ""),
        ({f"{key}.scale_weight": torch.ones(())}, "duplicate", None, ""),
        ({"blocks.9.ffn.0.weight_scale": torch.ones(())}, "missing", None, "blocks.9.ffn.0"),
        ({f"{key}.weight": torch.ones(256, 256, dtype=torch.int32)}, "mismatch", None, "int32"),
    ):
        with refuses(code, param, ModelError) as error:
            load_transformer(published.save({**state, **change}, tmp_path / "x.safetensors"))
        assert name in str(error.value)
    state, _, _ = published.fp8_scaled(published.wan_state(num_layers=1), "rows", torch.int8)
    del state[f"{key}.weight_scale"]
    with refuses("missing", kind=ModelError) as error:
        load_transformer(published.save(state, tmp_path / "x.safetensors"))
    assert f"{key}.weight" in str(error.value)


VARIANTS = {
    "image": ({"blocks.0.cross_attn.k_img.weight": torch.ones(2)}, {}, "image-to-video"),
    "embedder": ({"img_emb.proj.0.weight": torch.ones(2)}, {}, "image-to-video"),
    "2.2 image": ({}, {"in_channels": 36, "out_channels": 16}, "36 channels"),
    "VACE": ({"vace_blocks.0.before_proj.weight": torch.ones(2)}, {}, "VACE"),
    "speech": ({"casual_audio_encoder.weights": torch.ones(2)}, {}, "speech-to-video"),
    "animate": ({"face_adapter.fuser_blocks.0.q.weight": torch.ones(2)}, {}, "Wan-Animate"),
}


@pytest.mark.parametrize("more, changes, name", VARIANTS.values(), ids=VARIANTS)
def test_a_wan_of_another_task_is_named(tmp_path, more, changes, name):
    state = {**published.wan_state(num_layers=1, **changes), **more}
    with refuses("unsupported", kind=ModelError) as error:
        load_transformer(published.save(state, tmp_path / "x.safetensors"))
    assert name in str(error.value)


def test_another_familys_file_is_named(tmp_path):
    for key, words in (
        ("double_blocks.0.img_attn.qkv.weight", "HunyuanVideo or FLUX"),
        ("joint_blocks.0.x.weight", "Stable Diffusion 3"),
        ("transformer_blocks.0.attn1.to_q.weight", "LTX, CogVideoX"),
    ):
        file = published.save({key: torch.ones(2, 2)}, tmp_path / "x.safetensors")
        with refuses("invalid_model", kind=ModelError) as error:
            load_transformer(file)
        assert words in str(error.value)


def test_several_files_and_no_index_are_not_guessed_from(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        published.save(published.wan_state(num_layers=1), tmp_path / name)
    with refuses("invalid_model", kind=ModelError) as error:
        load_transformer(tmp_path)
    assert "a.safetensors, b.safetensors" in str(error.value)


def test_a_text_encoder_of_a_single_file(tiny_pair, tmp_path):
    """In Wan's own names (also a pickle), in transformers' with ComfyUI's extras, scaled, and in
    llama.cpp's as GGUF."""
    wanted = TextEncoder(tiny_pair, torch.float32, "cpu").encode(["a red circle"], 8)
    tokenizer = tiny_pair / "tokenizer"
    own = published.t5_state(tiny_pair)
    files = {
        "models_t5_umt5-xxl-enc-bf16.pth": lambda p: torch.save(own, p),
        "umt5-xxl-enc-bf16.safetensors": lambda p: published.save(own, p),
    }
    theirs = load_file(tiny_pair / "text_encoder" / "model.safetensors")
    extra = {"spiece_model": torch.zeros(9, dtype=torch.uint8)}
    files["umt5_xxl_fp16.safetensors"] = lambda p: published.save({**theirs, **extra}, p)
    for name, write in files.items():
        write(tmp_path / name)
        encoder = TextEncoder(tmp_path / name, torch.float32, "cpu", tokenizer)
        assert torch.equal(encoder.encode(["a red circle"], 8), wanted), name
    plain = lambda name: "attn" in name and "norm" not in name and "rel_b" not in name
    exact = published.save_gguf(
        published.llama_names(own), tmp_path / "umt5.gguf", ("Q8_0",), "t5encoder", quantised=plain
    )
    encoder = TextEncoder(tmp_path / "umt5.gguf", torch.float32, "cpu", tokenizer)
    got = encoder.encode(["a red circle"], 8)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.equal(encoder.model.state_dict()[name], exact["enc.blk.1.attn_q.weight"])
    assert got.isfinite().all() and not torch.equal(got, wanted)


def test_a_text_encoders_tokenizer_is_found_beside_it_or_asked_for(tiny_pair, tmp_path):
    file = published.save(published.t5_state(tiny_pair), tmp_path / "umt5.safetensors")
    with refuses("missing", "tokenizer", ModelError) as error:
        TextEncoder(file, torch.float32, "cpu")
    assert "--tokenizer" in str(error.value)
    shutil.copytree(tiny_pair / "tokenizer", tmp_path / "google" / "umt5-xxl")
    wanted = TextEncoder(tiny_pair, torch.float32, "cpu").encode(["a red circle"], 8)
    assert torch.equal(TextEncoder(file, torch.float32, "cpu").encode(["a red circle"], 8), wanted)
    with refuses("invalid_model", "tokenizer", ModelError):
        TextEncoder(file, torch.float32, "cpu", tmp_path)
    other = published.save(
        {"blocks.0.attn.q.weight": torch.ones(2, 2)}, tmp_path / "odd.safetensors"
    )
    with refuses("invalid_model", kind=ModelError):
        TextEncoder(other, torch.float32, "cpu").load()


@pytest.mark.parametrize("names", ["wan", "diffusers", "pickle"])
def test_a_vae_of_a_single_file(tmp_path, names):
    model = published.vae_model()
    state = model.state_dict() if names == "diffusers" else published.vae_state()
    if names == "pickle":
        file = tmp_path / "Wan2.1_VAE.pth"
        torch.save(state, file)
        with pytest.warns(UserWarning, match="is a pickle.*`nexus-rt convert wan"):
            VideoDecoder(file, torch.float32, "cpu")
    else:
        file = published.save(state, tmp_path / "wan_2.1_vae.safetensors")
    decoder = VideoDecoder(file, torch.float32, "cpu")
    assert decoder.space["z_dim"] == 16 and decoder.space["latents_mean"][0] == -0.7571
    z = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, std = (
        torch.tensor(decoder.space[f"latents_{name}"]).view(1, -1, 1, 1, 1)
        for name in ("mean", "std")
    )
    want = model.decode(z * std + mean).sample.detach().add(1).div(2).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(decoder.decode(z), want, atol=2e-6, rtol=1e-5)


def test_a_vae_that_is_none_is_named(tmp_path):
    wan22 = {"encoder.downsamples.0.avg_shortcut.x": torch.ones(1), "conv1.weight": torch.ones(1)}
    with refuses("unsupported", kind=ModelError) as error:
        VideoDecoder(published.save(wan22, tmp_path / "a.safetensors"), torch.float32, "cpu")
    assert "Wan 2.2" in str(error.value)
    with refuses("invalid_model", kind=ModelError):
        VideoDecoder(
            published.save({"x": torch.ones(1)}, tmp_path / "b.safetensors"), torch.float32, "cpu"
        )


def test_wans_own_folder_brings_its_vae_and_text_encoder(tiny_pair, tmp_path):
    """The published layout: transformer at the top, pickles beside it, google/umt5-xxl."""
    folder = wan_folder(tiny_pair, tmp_path / "Wan2.1-T2V-14B")
    pipe = NexusPipeline.from_pretrained(large=folder)
    pipe.set_progress_bar_config(disable=True)
    options = dict(width=32, height=32, num_frames=5, num_inference_steps=2, plan="large")
    frames = pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).frames
    assert frames.shape == (1, 5, 32, 32, 3)
    # and converted to diffusers' layout it is the same
    assert main(["convert", "wan", str(folder), str(tmp_path / "made")]) == 0
    again = NexusPipeline.from_pretrained(large=tmp_path / "made")
    again.set_progress_bar_config(disable=True)
    same_frames = again(
        "a red circle", generator=torch.Generator().manual_seed(0), **options
    ).frames
    assert (frames == same_frames).all()


def wan_folder(tiny_pair, folder):
    """Wan's own folder, with a config as Wan writes it."""
    import json

    folder.mkdir()
    published.save(published.wan_state(), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 256, "num_heads": 2}
    config |= {"ffn_dim": 512, "num_layers": 2, "text_dim": 32, "freq_dim": 32}
    (folder / "config.json").write_text(json.dumps({**config, "in_dim": 16, "out_dim": 16}))
    torch.save(published.t5_state(tiny_pair), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(published.vae_state(), folder / "Wan2.1_VAE.pth")
    shutil.copytree(tiny_pair / "tokenizer", folder / "google" / "umt5-xxl")
    return folder


def test_a_pair_of_single_files_draws(tiny_pair, tmp_path, monkeypatch):
    """Every part a file, named on the command line by relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    published.save_gguf(published.wan_state(), tmp_path / "models" / "small.gguf", ("Q8_0",))
    scaled, _, _ = published.fp8_scaled(published.wan_state(7))
    published.save(scaled, tmp_path / "models" / "large.safetensors")
    published.save(published.vae_state(), tmp_path / "models" / "wan_2.1_vae.safetensors")
    published.save(published.t5_state(tiny_pair), tmp_path / "models" / "umt5.safetensors")
    command = ["generate", "a red circle", "--small", "models/small.gguf"]
    command += ["--large", "models/large.safetensors", "--vae", "models/wan_2.1_vae.safetensors"]
    command += [
        "--text-encoder",
        "models/umt5.safetensors",
        "--tokenizer",
        str(tiny_pair / "tokenizer"),
    ]
    command += ["--size", "32x32", "--frames", "5", "--steps", "3", "-o", "out.png", "--quiet"]
    assert main(command) == 0
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.parametrize("kind", ["gguf", "fp8", "vae", "text"])
def test_convert_wan_takes_single_files(tiny_pair, tmp_path, kind):
    if kind == "gguf":
        file = tmp_path / "wan.gguf"
        exact = published.save_gguf(published.wan_state(), file, ("Q8_0",))
    elif kind == "fp8":
        state, exact, _ = published.fp8_scaled(published.wan_state())
        file = published.save(state, tmp_path / "wan.safetensors")
    elif kind == "vae":
        file = tmp_path / "Wan2.1_VAE.pth"
        torch.save(published.vae_state(), file)
    else:
        file = published.save(published.t5_state(tiny_pair), tmp_path / "t5.safetensors")
        shutil.copytree(tiny_pair / "tokenizer", tmp_path / "tokenizer")
    assert main(["convert", "wan", str(file), str(tmp_path / "made")]) == 0
    made = tmp_path / "made"
    if kind in ("gguf", "fp8"):
        rounded = {
            k: v.bfloat16().float() if published.is_quantised(k) else v for k, v in exact.items()
        }
        same(made, rounded)
    elif kind == "vae":
        assert load_file(made / "vae" / "diffusion_pytorch_model.safetensors").keys() == (
            published.vae_model().state_dict().keys()
        )
    else:
        wanted = TextEncoder(tiny_pair, torch.float32, "cpu").encode(["a red circle"], 8)
        assert torch.equal(
            TextEncoder(made, torch.float32, "cpu").encode(["a red circle"], 8), wanted
        )


def test_convert_wan_refuses_what_is_no_wan(tmp_path):
    from nexus_rt.loading.convert_wan import convert_wan

    (tmp_path / "empty").mkdir()
    with refuses("invalid_model", kind=ModelError):
        convert_wan(tmp_path / "empty", tmp_path / "made")
    with refuses("not_found", "source", InputError):
        convert_wan(tmp_path / "nowhere", tmp_path / "made")
    (tmp_path / "x.onnx").write_bytes(b"x")
    with refuses("unsupported", "source", InputError) as error:
        convert_wan(tmp_path / "x.onnx", tmp_path / "made")
    assert ".onnx" in str(error.value)
    assert not (tmp_path / "made").exists()


def _field(number, value):
    """A protobuf field: bytes, a whole number or a float."""
    import struct

    varint = lambda n: (
        bytes([n & 127 | (128 if n > 127 else 0), *varint(n >> 7)]) if n > 127 else bytes([n])
    )
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def charsmap(texts):
    """A normaliser's table that replaces keys by texts, of one block of 256 units a byte."""
    import struct

    body, starts = b"", {}
    for key, text in texts.items():
        starts[key], body = len(body), body + text.encode() + b"\0"
    prefixes = sorted({key.encode()[:n] for key in texts for n in range(len(key.encode()))})
    block = {prefix: 256 * i for i, prefix in enumerate(prefixes)}
    units = [0] * (256 * (len(prefixes) + len(texts)))
    wide = lambda offset: offset << 10 if offset < 2**21 else (offset >> 8) << 10 | 512
    last = 256 * len(prefixes)
    units[0] = wide(0)
    for path in sorted(
        {key.encode()[:n] for key in texts for n in range(1, len(key.encode()) + 1)}
    ):
        place = block[path[:-1]] ^ path[-1]
        word = path.decode("utf-8", "replace")
        leaf = word in starts
        target = block.get(path)
        if target is None:
            target, last = last, last + 256
        units[place] = wide(place ^ target) | path[-1] | (256 if leaf else 0)
        if leaf:
            units[target] = starts[word] | 2**31
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + body


def spiece_model(kind=1):
    """A small unigram model as sentencepiece writes it."""
    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    pieces += [("▁a", -1.0, 1), ("▁", -2.0, 1), ("▁red", -3.0, 1), ("▁re", -2.5, 1), ("d", -2.4, 1)]
    pieces += [(c, -6.0, 1) for c in "abcdefghijklmnopqrstuvwxyz"[:3]]
    body = b"".join(
        _field(1, _field(1, p.encode()) + _field(2, s) + _field(3, t)) for p, s, t in pieces
    )
    table = charsmap({"Ａ": "a", "Ｒ": "r", "①": "b"})
    return body + _field(2, _field(3, kind)) + _field(3, _field(1, b"nfkc") + _field(2, table))


def test_comfyuis_text_encoder_carries_its_tokenizer(tiny_pair, tmp_path):
    from nexus_rt.loading.tokenizer import load_tokenizer

    theirs = load_file(tiny_pair / "text_encoder" / "model.safetensors")
    write = lambda data: published.save(
        {**theirs, "spiece_model": torch.tensor(list(data), dtype=torch.uint8)},
        tmp_path / "umt5_xxl_fp16.safetensors",
    )
    file = write(spiece_model())
    tokenizer = load_tokenizer(file, "tokenizer")
    # the best path by score: "▁red" (-3) beats "▁re" + "d" (-4.9); "z" is unknown
    assert tokenizer.encode("a red") == [3, 5, 1]
    assert tokenizer.encode("Ａ Ｒed") == [3, 5, 1] and tokenizer.encode("①") == [4, 9, 1]
    assert tokenizer.encode("a  red  ") == [3, 5, 1] and tokenizer.encode("az") == [3, 2, 1]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.encode("a red a", limit=3) == [3, 5, 1]
    assert TextEncoder(file, torch.float32, "cpu").encode(["a red"], 8).isfinite().all()
    for damaged, code in (
        (spiece_model()[:-3], "damaged"),
        (spiece_model(kind=2), "unsupported"),
        (b"", "damaged"),
        (bytes([255] * 12), "damaged"),
    ):
        with refuses(code, kind=ModelError):
            load_tokenizer(write(damaged or b"\x08\x01"), "tokenizer")


def _huge():
    """A piece whose text is a number: 8 bytes that would allocate a gigabyte and a half."""
    data = _field(1, _field(1, 1_500_000_000))
    assert len(data) == 8
    return data


PIECES = {
    "a length to allocate": _huge(),
    "the same beside a whole model": spiece_model() + _huge(),
    "a table's length to allocate": spiece_model() + _field(3, _field(2, 1_500_000_000)),
    "a message that is a number": spiece_model() + _field(1, 3),
    "a score that is a number": _field(1, _field(1, b"</s>") + _field(2, 7)),
    "a short score": _field(1, _field(1, b"</s>") + _field(2, b"ab")),
    "a score that is no number": _field(1, _field(1, b"</s>") + _field(2, float("nan"))),
    "one piece": _field(1, _field(1, b"</s>")),
    "an empty table": spiece_model() + _field(3, _field(2, bytes(8))),
    "a table beyond its units": spiece_model()
    + _field(
        3, _field(2, charsmap({"Ａ": "a"})[:4] + b"\xff\xff\xff\x00" + charsmap({"Ａ": "a"})[8:])
    ),
    "a table beyond its texts": spiece_model()
    + _field(3, _field(2, charsmap({"Ａ": "a" * 9, "①": "b"})[:-11])),
    "a table inside a character": spiece_model()
    + _field(3, _field(2, charsmap({"Ａ": "x", "①": "b"})[:-4] + "é\0".encode()[1:] + b"b\0")),
    "a table that is none": spiece_model() + _field(3, _field(2, b"\xff\xff\xff\x7f")),
    "a length beyond the end": b"\x0a\xff\xff\xff\xff\x0f",
    "an endless number": b"\xff" * 30,
    "a group": b"\x0b\x0c",
    "nothing": b"\x00" * 8,
}


OTHER_PIECES = ("one piece", "nothing")  # whole messages, and no model of UMT5's


@pytest.mark.parametrize("case", PIECES)
def test_a_damaged_sentencepiece_model_is_one_sentence_and_takes_no_memory(tmp_path, case):
    import tracemalloc

    from nexus_rt.loading.tokenizer import load_tokenizer

    tensor = torch.tensor(list(PIECES[case]), dtype=torch.uint8)
    file = published.save({"spiece_model": tensor}, tmp_path / "umt5.safetensors")
    load = lambda: load_tokenizer(file, "tokenizer")
    tracemalloc.start()
    try:
        with refuses(
            "unsupported" if case in OTHER_PIECES else "damaged", kind=ModelError
        ) as error:
            load()
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones((), dtype=torch.float32),
        torch.ones(4),
        torch.ones(2, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.bfloat16),
    ],
)
def test_a_sentencepiece_model_of_another_type_is_named(tmp_path, tensor):
    from nexus_rt.loading.tokenizer import load_tokenizer

    file = published.save({"spiece_model": tensor}, tmp_path / "umt5.safetensors")
    with refuses("invalid_type", kind=ModelError):
        load_tokenizer(file, "tokenizer")
    with refuses("missing", kind=ModelError):
        load_tokenizer(published.save({"a": tensor}, tmp_path / "b.safetensors"), "tokenizer")


@pytest.mark.parametrize(
    "shape, code",
    [
        ((256, 16, 1, 0, 2), "mismatch"),
        ((256, 16, 0, 2, 2), "mismatch"),
        ((0, 16, 1, 2, 2), "out_of_range"),
    ],
)
def test_a_patch_of_no_width_is_one_sentence(tmp_path, shape, code):
    state = {**published.wan_state(num_layers=1), "patch_embedding.weight": torch.empty(shape)}
    with refuses(code, kind=ModelError):
        load_transformer(published.save(state, tmp_path / "x.safetensors"))


ABSURD = {  # parameters of the parts in one file -> a shape that gives no sizes
    "patch_embedding.weight": [(), (0,), (4,), (256, 16), (256, 0, 1, 2, 2)],
    "text_embedding.0.weight": [(), (0,), (256, 0), (0, 32)],
    "time_embedding.0.weight": [(), (256,), (256, 0), (256, 31)],
    "blocks.0.ffn.0.weight": [(), (0, 256), (0,)],
    "head.head.weight": [(), (0, 256), (3, 256)],
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_of_a_transformer_are_one_sentence(tmp_path, name):
    for shape in ABSURD[name]:
        state = {**published.wan_state(num_layers=1), name: torch.empty(shape)}
        with pytest.raises(ModelError):
            load_transformer(published.save(state, tmp_path / "x.safetensors"))


def test_absurd_sizes_of_a_text_encoder_and_a_vae_are_one_sentence(tiny_pair, tmp_path):
    own = published.t5_state(tiny_pair)
    for name in ("token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.fc1.weight"):
        for shape in ((), (0,), (0, 0), (0, 32), (7, 0)):
            file = published.save({**own, name: torch.empty(shape)}, tmp_path / "t5.safetensors")
            with pytest.raises(ModelError):
                TextEncoder(file, torch.float32, "cpu", tiny_pair / "tokenizer").load()
    state = published.vae_state()
    for name in ("encoder.conv1.weight", "conv2.weight"):
        for shape in ((), (0,), (0, 3, 3, 3, 3), (4, 0, 1, 1, 1)):
            file = published.save({**state, name: torch.empty(shape)}, tmp_path / "v.safetensors")
            with pytest.raises(ModelError):
                VideoDecoder(file, torch.float32, "cpu").load()


@pytest.mark.parametrize("number", [1000, 999_999, 10**30])
def test_a_block_of_a_huge_number_builds_nothing(tiny_pair, tmp_path, number):
    import time

    began = time.perf_counter()
    own = {**published.t5_state(tiny_pair), f"blocks.{number}.attn.q.weight": torch.ones(1)}
    with pytest.raises(ModelError):
        file = published.save(own, tmp_path / "t5.safetensors")
        TextEncoder(file, torch.float32, "cpu", tiny_pair / "tokenizer").load()
    state = {**published.wan_state(num_layers=1), f"blocks.{number}.modulation": torch.ones(1)}
    with pytest.raises(ModelError):
        load_transformer(published.save(state, tmp_path / "x.safetensors"))
    assert time.perf_counter() - began < 2


def test_absurd_headers_of_safetensors_are_one_sentence(tmp_path):
    import json

    from nexus_rt.loading.formats.safetensors import read_header

    file = tmp_path / "x.safetensors"
    one = lambda **fields: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}
    for header in (
        {"a": one(shape=[0, 2**63 - 1], data_offsets=[0, 0])},
        {"a": one(shape=[2**50, 0], data_offsets=[0, 0])},
        {"a": one(shape=[1] * 300)},
        {"a": one(shape=[2**32, 2**32, 2**32])},
        {"a": one(dtype=["F32"])},
        {"a": one(dtype="F8_E8M0", data_offsets=[0, 1])},
        {"a": one(shape={"0": 1})},
        {"a": one(shape=[1.0])},
        {"a": one(shape=[-1])},
        {"a": one(data_offsets=[4, 0])},
        {"a": [1]},
        {"a": one(), "__metadata__": ["x"]},
        {"a": one(), "__metadata__": {"x": 1}},
        {"\ud800": one()},
        {"a": one(), "__metadata__": {"x": "\udfff"}},
        [],
    ):
        data = json.dumps(header).encode()
        file.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
        with pytest.raises(ModelError) as error:
            read_header(file)
        assert str(file) in str(error.value) and len(str(error.value)) < 900
    data = json.dumps({"a\0b\n": one()}).encode()  # odd, and a name
    file.write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    with refuses("mismatch", kind=ModelError) as error:
        published.save(published.wan_state(num_layers=1), tmp_path / "wan.safetensors")
        state = load_file(tmp_path / "wan.safetensors")
        load_transformer(published.save({**state, "a\0b\n": torch.ones(1)}, file))
    assert "unknown are 1" in str(error.value)
    for name in ("a" * 300 + ".safetensors", "a\0.safetensors"):
        with refuses("not_found", kind=ModelError):
            read_header(tmp_path / name)


@pytest.mark.parametrize(
    "key, kind",
    [
        ("diffusion_model.blocks.0.self_attn.q.dora_scale", "DoRA"),
        ("base_model.model.blocks.0.attn1.to_q.lora_magnitude_vector.weight", "DoRA"),
        ("lycoris_blocks_0_self_attn_q.lokr_w1", "LoKr"),
        ("lycoris_blocks_0_self_attn_q.hada_w1_a", "LoHa"),
    ],
)
def test_an_adapter_that_is_no_lora_is_named(tmp_path, key, kind):
    from nexus_rt.loading.lora import parse_loras

    file = published.save(published.wan_state(num_layers=1), tmp_path / "wan.safetensors")
    lora = published.save({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with refuses("unsupported", kind=ModelError) as error:
        load_transformer(file, loras=parse_loras(lora))
    assert kind in str(error.value)


def test_a_path_that_exists_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    from nexus_rt.loading.source import resolve

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("the hub was asked")
    )
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert str(resolve("owner/name", ())) == "owner/name"
    (tmp_path / "owner" / "file").write_bytes(b"x")
    (tmp_path / "owner" / "graph.onnx").write_bytes(b"x")
    for name, kind in (("owner/file", "nothing"), ("owner/graph.onnx", "ONNX")):
        with refuses("unsupported", "source", ModelError) as error:
            resolve(name, ())
        assert kind in str(error.value)


def test_an_image_to_video_config_says_so(tmp_path):
    import json

    model = published.wan_model(num_layers=1, in_channels=36)
    model.save_pretrained(tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps({**config, "out_channels": 16})
    )
    with refuses("unsupported", "in_channels", ModelError):
        load_transformer(tmp_path)


def test_no_damage_to_a_gguf_files_header_is_anything_but_an_error_in_words(tmp_path):
    """Bytes overwritten anywhere before the data: refused in one sentence, or still a GGUF file."""
    import random

    import gguf

    file = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(file, "wan")
    writer.add_array("some.words", ["a", "bc"])
    writer.add_array("comfy.gguf.orig_shape.a.weight", (2, 16))
    writer.add_tensor("a.weight", torch.ones(32).numpy())
    writer.add_tensor("b.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = file.read_bytes()
    assert find_tensors(file)["a.weight"].shape == (2, 16)
    draw, refused = random.Random(0), 0
    for _ in range(400):
        bad = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) - 192)
            bad[at] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        if draw.random() < 0.1:
            bad = bad[: draw.randrange(len(bad))]
        file.write_bytes(bad)
        try:
            found = find_tensors(file)
        except ModelError as error:
            refused += 1
            assert str(file) in str(error)
        else:
            assert all(t.stop <= len(bad) for t in found.values())
    assert refused > 100
