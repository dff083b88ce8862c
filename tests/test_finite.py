"""Weights that are no numbers are refused where they are read, whatever keeps them and whatever would
hide them."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_rt.components.text import TextEncoder
from nexus_rt.components.understanding import UnderstandingModel
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import ModelError
from nexus_rt.loading.connector import load_connector, save_connector
from nexus_rt.loading.finite import is_finite
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.models.encodings import GGUF_BLOCKS
from nexus_rt.models.template import Template
from tests.needs import needs
from tests.omnivideo import make_llm
from tests.published import fp8_scaled, is_quantised, save, save_gguf, wan_state
from tests.refusals import refuses

BAD = (math.nan, math.inf, -math.inf)


def spoil(file, pick, value, at=-1):
    """One number of the first tensor whose name `pick` takes is replaced; returns its name."""
    state = load_file(file)
    name = next(n for n in sorted(state) if pick(n))
    state = {k: v.clone() for k, v in state.items()}
    state[name].view(-1)[at] = value
    save_file({k: v.contiguous() for k, v in state.items()}, file, {"format": "pt"})
    return name


@pytest.fixture
def transformer(tiny_pair, tmp_path):
    folder = shutil.copytree(tiny_pair / "large", tmp_path / "large")
    return folder, folder / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "part",
    ["attn1.to_q.weight", "attn2.to_k.bias", "norm_q", "scale_shift_table", "patch_embedding"],
)
def test_every_tensor_of_a_transformer_is_looked_at(transformer, part, value):
    folder, file = transformer
    name = spoil(file, lambda n: part in n, value)
    for dtype in (torch.float32, torch.bfloat16):
        with refuses("not_finite", kind=ModelError) as error:
            load_transformer(folder, dtype)
        assert name in str(error.value)


@pytest.mark.parametrize("weights", ["int8", "fp8", "int8-dynamic"])
def test_before_they_are_quantised(transformer, weights):
    folder, file = transformer
    name = spoil(file, lambda n: "ffn.net.0.proj.weight" in n, math.nan)
    with refuses("not_finite", kind=ModelError) as error:
        load_transformer(folder, torch.float32, weights=weights)
    assert name in str(error.value)


def test_numbers_beyond_a_dtype_are_named_as_such(transformer):
    folder, file = transformer
    name = spoil(file, lambda n: "to_v.weight" in n, 1e6)
    load_transformer(folder, torch.bfloat16)
    with refuses("out_of_range", "torch_dtype", ModelError) as error:
        load_transformer(folder, torch.float16)
    assert name in str(error.value) and "float16" in str(error.value)


@pytest.mark.parametrize("kept", ["dense", "small"])
@pytest.mark.parametrize(
    "dtype, bits",
    [
        (torch.float8_e4m3fn, 0x7F),
        (torch.float8_e4m3fn, 0xFF),
        (torch.float8_e5m2, 0x7C),
        (torch.float8_e5m2, 0xFC),
        (torch.float8_e5m2, 0x7E),
    ],
)
def test_bytes_of_8_bit_floats(tmp_path, kept, dtype, bits):
    state, _, _ = fp8_scaled(wan_state(), dtype=dtype)
    name = next(n for n in state if is_quantised(n))
    load_transformer(save(state, tmp_path / "good.safetensors"), torch.float32, weights=kept)
    state[name].view(torch.uint8).view(-1)[5] = bits
    file = save(state, tmp_path / "bad.safetensors")
    with refuses("not_finite", kind=ModelError):
        load_transformer(file, torch.float32, weights=kept)


@pytest.mark.parametrize("kept", ["dense", "small"])
@pytest.mark.parametrize("value", BAD)
def test_scales_of_8_bit_weights(tmp_path, kept, value):
    for style in ("comfy", "rows", "blocks"):
        state, _, _ = fp8_scaled(wan_state(), style)
        name = next(n for n in state if "scale" in n and "input" not in n)
        state[name] = state[name].clone()
        state[name].view(-1)[0] = value
        with refuses("not_finite", kind=ModelError):
            load_transformer(save(state, tmp_path / f"{style}.safetensors"), weights=kept)


@pytest.mark.parametrize("kept", ["dense", "small"])
def test_values_beyond_float32(tmp_path, kept):
    state, _, _ = fp8_scaled(wan_state(), "rows")
    name = next(n for n in state if n.endswith("weight_scale"))
    state[name] = torch.full_like(state[name], 1e37)
    with refuses("not_finite", kind=ModelError):
        load_transformer(save(state, tmp_path / "x.safetensors"), torch.float32, weights=kept)


@pytest.mark.parametrize("kept", ["dense", "small"])
@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_scales_of_gguf_blocks(tmp_path, kind, kept):
    """Every float16 of a block, in the last block of a matrix."""
    needs("gguf")
    from nexus_rt.loading.tensors import find_tensors

    file, block = tmp_path / "x.gguf", GGUF_BLOCKS[kind]
    save_gguf(wan_state(), file, [kind])
    load_transformer(file, torch.float32, weights=kept)
    whole = file.read_bytes()
    stored = next(t for t in find_tensors(file).values() if t.encoding is not None)
    for half in block.halves:
        data, at = bytearray(whole), stored.stop - block.size + half
        data[at : at + 2] = b"\x00\x7e" if half else b"\x00\xfc"  # NaN, -infinity
        file.write_bytes(data)
        with refuses("not_finite", kind=ModelError):
            load_transformer(file, torch.float32, weights=kept)


def test_a_blocks_halves_decide_whether_it_is_finite():
    """The check of scales is the check of all decoded values, for any bytes."""
    g = torch.Generator().manual_seed(0)
    for block in GGUF_BLOCKS.values():
        raw = torch.randint(0, 256, (4000, block.size), dtype=torch.uint8, generator=g)
        decoded = block.unpack(raw).reshape(len(raw), -1).isfinite().all(1)
        halves = torch.cat(block.scales(raw), 1).isfinite().all(1)
        assert torch.equal(decoded, halves), block.name
        assert not decoded.all() and decoded.any()


def test_text_encoder_vae_and_language_model(own_pair, tmp_path):
    name = spoil(own_pair / "text_encoder" / "model.safetensors", lambda n: "wi_1" in n, math.nan)
    with refuses("not_finite", kind=ModelError) as error:
        TextEncoder(own_pair, torch.float32, "cpu").encode(["a"])
    assert name in str(error.value)
    name = spoil(
        own_pair / "vae" / "diffusion_pytorch_model.safetensors", lambda n: "decoder" in n, math.inf
    )
    with refuses("not_finite", kind=ModelError) as error:
        VideoDecoder(own_pair / "vae", torch.float32, "cpu").load()
    assert name in str(error.value)
    make_llm(tmp_path / "llm")
    file = tmp_path / "llm" / "model.safetensors"
    shutil.copy(file, tmp_path / "kept")
    spoil(file, lambda n: "q_proj" in n, math.nan)
    with refuses("not_finite", kind=ModelError) as error:
        UnderstandingModel(tmp_path / "llm", Template(), torch.float32, "cpu").load()
    assert "q_proj.weight" in str(error.value)
    shutil.copy(tmp_path / "kept", file)
    spoil(file, lambda n: n == "lm_head.weight", math.nan)
    with refuses("not_finite", kind=ModelError) as error:
        UnderstandingModel(tmp_path / "llm", Template(), torch.float32, "cpu").answer("panda")
    assert "lm_head.weight" in str(error.value)


def test_transformers_own_classes(tmp_path):
    from nexus_rt.loading.pretrained import pretrained

    make_llm(tmp_path)
    name = spoil(tmp_path / "model.safetensors", lambda n: "up_proj" in n, math.nan)
    with refuses("not_finite", kind=ModelError) as error:
        pretrained("AutoModel", tmp_path, "llm", torch.device("cpu"))
    assert name.removeprefix("model.") in str(error.value)


@pytest.mark.parametrize("file", ["model", "special_tokens", "unconditional"])
def test_connector(tmp_path, file):
    from nexus_rt.loading.pair_folder import MINI

    save_connector(load_connector(MINI / "connector", torch.float32), tmp_path, torch.float32)
    load_connector(tmp_path)
    spoil(tmp_path / f"{file}.safetensors", lambda n: True, math.nan)
    with refuses("not_finite", kind=ModelError):
        load_connector(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_number_of_many_is_seen(dtype):
    for shape in ((1,), (3, 7), (65, 129), (2, 3, 4, 5, 6)):
        clean = torch.randn(shape).to(dtype)
        assert is_finite(clean) and is_finite(torch.empty(0, dtype=dtype))
        for value in BAD:
            for at in (0, clean.numel() // 2, clean.numel() - 1):
                x = clean.clone()
                x.view(-1)[at] = value
                assert not is_finite(x)
    assert is_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.ones(3, dtype=torch.int64))
