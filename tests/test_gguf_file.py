"""GGUF files as converters that go through ggml write them, and damaged ones."""

import struct

import gguf
import numpy as np
import pytest
import torch

from nexus_rt.components.text import TextEncoder
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import ModelError
from nexus_rt.loading.formats import gguf as gguf_file
from nexus_rt.loading.formats.stored import read_tensors
from nexus_rt.loading.tensors import find_tensors
from nexus_rt.loading.transformer import load_config, load_transformer
from tests import published
from tests.refusals import refuses
from tests.test_single_files import same


def write(path, tensors, metadata=None):
    """A GGUF file of arrays, as they are."""
    writer = gguf.GGUFWriter(path, "wan")
    for key, value in (metadata or {}).items():
        add = writer.add_array if isinstance(value, (list, tuple)) else writer.add_string
        add(key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, np.asarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def leading(a):
    """Without the sizes of 1 at the outer end, as ggml's dimensions are counted."""
    while a.ndim > 1 and a.shape[0] == 1:
        a = a[0]
    return a


def folded(a):
    """Four dimensions at most, as ggml has."""
    return a.reshape(-1, *a.shape[2:]) if a.ndim == 5 else a


def filled(a):
    """Four dimensions always, as ggml's structs have."""
    return a.reshape(*[1] * (4 - a.ndim), *a.shape) if a.ndim < 4 else folded(a)


FORMS = {
    "as it is": lambda a: a,
    "leading ones dropped": leading,
    "folded": folded,
    "both": lambda a: leading(folded(a)),
    "four dimensions": filled,
    "all ones dropped": lambda a: folded(a).squeeze() if a.size > 1 else a.reshape(-1),
}


@pytest.mark.parametrize("prefix", ["", published.COMFY])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_transformer_has_its_shapes_again(tmp_path, form, prefix):
    state = published.wan_state()
    file = tmp_path / "wan.gguf"
    write(file, {prefix + k: form(v.float().numpy()) for k, v in state.items()})
    config = load_config(file)
    assert config.patch_size == (1, 2, 2) and (config.in_channels, config.out_channels) == (16, 16)
    same(file, state)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_quantised_transformer_has_its_shapes_again(tmp_path, form):
    """Tables and convolutions are never quantised; matrices beside them are."""
    state, file = published.wan_state(), tmp_path / "wan.gguf"
    writer, exact = gguf.GGUFWriter(file, "wan"), {}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, value in state.items():
        exact[name] = value.float()
        if not published.is_quantised(name):
            writer.add_tensor(name, form(value.float().numpy()))
            continue
        raw = gguf.quants.quantize(value.float().numpy(), kind)
        exact[name] = torch.from_numpy(gguf.quants.dequantize(raw, kind))
        writer.add_tensor(name, form(raw) if form is filled else raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same(file, exact)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_vae_and_a_text_encoder_have_their_shapes_again(tiny_pair, tmp_path, form):
    state = published.vae_state()
    file = write(tmp_path / "vae.gguf", {k: form(v.numpy()) for k, v in state.items()})
    decoder = VideoDecoder(file, torch.float32, "cpu")
    decoder.load()
    got = decoder.model.state_dict()
    want = published.vae_model().state_dict()
    assert all(torch.equal(value, want[name]) for name, value in got.items())
    own = published.llama_names(published.t5_state(tiny_pair))
    file = write(tmp_path / "umt5.gguf", {k: form(v.numpy()) for k, v in own.items()})
    wanted = TextEncoder(tiny_pair, torch.float32, "cpu").encode(["a red circle"], 8)
    encoder = TextEncoder(file, torch.float32, "cpu", tiny_pair / "tokenizer")
    assert torch.equal(encoder.encode(["a red circle"], 8), wanted)


def test_a_shape_that_is_not_the_models_is_still_refused(tmp_path):
    """Only sizes of 1 and the outputs of a convolution are put back."""
    state = {k: v.float().numpy() for k, v in published.wan_state(num_layers=1).items()}
    for name, shape in (
        ("blocks.0.modulation", (256, 6)),
        ("blocks.0.ffn.0.weight", (256, 512)),
        ("head.modulation", (1, 512)),
    ):
        changed = {**state, name: state[name].reshape(shape)}
        write(tmp_path / "x.gguf", changed)
        with refuses("mismatch", kind=ModelError):
            load_transformer(tmp_path / "x.gguf")


def test_a_stated_shape_counts_as_it_is(tmp_path):
    key = "comfy.gguf.orig_shape.a.weight"
    tensors = {"a.weight": np.arange(24, dtype=np.float32), "a.bias": np.ones(2, np.float32)}
    file = write(tmp_path / "x.gguf", tensors, {key: [1, 4, 6]})
    found = find_tensors(file)
    assert found["a.weight"].shape == (1, 4, 6)
    ((_, value),) = read_tensors([("", found["a.weight"])])
    assert torch.equal(value, torch.arange(24.0).view(1, 4, 6))
    for shape in ([-4, -6], [5, 5], [2.0, 12.0], [True, True], "24", [0], [1] * 9 + [24]):
        write(file, tensors, {key: shape})
        with refuses("mismatch", kind=ModelError) as error:
            find_tensors(file)
        assert "(24,)" in str(error.value)


def test_a_rotation_that_a_header_tells_of_is_refused(tmp_path):
    tensors = {"a.weight": np.ones((4, 4), np.float32)}
    file = write(tmp_path / "x.gguf", tensors, {"sd.convrot_groupsize": "256"})
    with refuses("unsupported", "sd.convrot_groupsize", ModelError):
        find_tensors(file)
    write(file, tensors, {"some.rotary_base": "10000"})
    assert find_tensors(file).keys() == {"a.weight"}


def by_hand(tensors, metadata=b"", keys=0):
    """A GGUF file of (name, dimensions innermost first, type, offset), its header at least."""
    text = lambda t: struct.pack("<Q", len(t)) + t
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), keys) + metadata
    for name, sides, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)
    return head + bytes(-len(head) % 32) + bytes(4096)


@pytest.mark.parametrize(
    "tensors, code, name",
    [
        ([(b"a", (8,), 0, 0), (b"b", (8,), 0, 0)], "damaged", "b and a"),
        ([(b"a", (8,), 0, 0), (b"b", (8,), 0, 16)], "damaged", "multiple of 32"),
        ([(b"a", (8,), 0, 0), (b"a", (8,), 0, 32)], "duplicate", ""),
        ([(b"a", (0, 2**63), 0, 0)], "too_large", "(9223372036854775808, 0)"),
        ([(b"a", (2**32, 2**32), 0, 0)], "damaged", ""),
        ([(b"a", (2**40, 0, 2**40), 0, 0)], None, ""),
        ([(b"a", (), 8, 0)], "mismatch", "Q8_0"),
        ([(b"a", (1,) * 9, 0, 0)], "too_large", "9 dimensions"),
        ([(b"\0\xff\xed\xa0\x80", (8,), 0, 2**60)], "damaged", ""),
        ([(b"a" * 2000, (8,), 0, 0)], "too_large", "2000 characters"),
    ],
)
def test_absurd_headers_are_one_sentence(tmp_path, tensors, code, name):
    file = tmp_path / "x.gguf"
    file.write_bytes(by_hand(tensors))
    if code is None:  # a tensor without elements takes no memory, whatever its sides
        assert find_tensors(file)["a"].stop == find_tensors(file)["a"].start
        return
    with refuses(code, kind=ModelError) as error:
        find_tensors(file)
    words = str(error.value)
    assert name in words and "\ud800" not in words and len(words) < 600


def test_a_long_array_of_the_header_is_not_kept(tmp_path, monkeypatch):
    """A vocabulary's scores are as many as a file has room for, and none of them is used."""
    unpacked = []
    real = struct.unpack
    monkeypatch.setattr(
        gguf_file.struct, "unpack", lambda form, data: unpacked.append(form) or real(form, data)
    )
    count = 10**6
    array = struct.pack("<Q", 6) + b"scores" + struct.pack("<IIQ", 9, 6, count) + bytes(4 * count)
    file = tmp_path / "x.gguf"
    file.write_bytes(by_hand([(b"a", (8,), 0, 0)], array, 1))
    assert find_tensors(file)["a"].shape == (8,)
    assert max(map(len, unpacked)) < 8
