"""What checkpoints say of their quantisation: every field is honoured or refused by its name, and a
scale that should be there is."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nexus_rt.core.errors import ModelError
from nexus_rt.loading import notes
from nexus_rt.loading.formats.stored import read_tensors
from nexus_rt.loading.tensors import find_tensors
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.models.encodings import ROTATIONS, rotated
from tests import published
from tests.refusals import refuses
from tests.test_single_files import run, same

KEY = "blocks.0.self_attn.q"
H4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]


def hadamard(size):
    """The regular Hadamard matrix of ConvRot, from its definition, in float64."""
    h4 = torch.tensor(H4, dtype=torch.float64)
    h = h4
    while len(h) < size:
        h = torch.kron(h, h4)
    return h / size**0.5


def as_note(value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def int8_rows(weight, group=None):
    """int8 rows of a matrix and their scales, of one rotated in groups of columns as its publishers
    do it (W H^T); and what the numbers stand for, in float64."""
    wide = weight.double()
    if group is not None:
        wide = (wide.unflatten(1, (-1, group)) @ hadamard(group).T).flatten(1)
    scale = wide.abs().amax(1, keepdim=True).float() / 127
    raw = (wide / scale).round().to(torch.int8)
    exact = raw.double() * scale
    if group is not None:
        exact = (exact.unflatten(1, (-1, group)) @ hadamard(group)).flatten(1)
    return raw, scale, exact.float()


def int8_state(group=None, note=None, key="weight_scale", **changes):
    """A state whose block matrices are int8 rows, each with a note; and what it stands for."""
    out, exact = {}, {}
    for name, value in published.wan_state(**changes).items():
        if not published.is_quantised(name):
            out[name] = exact[name] = value
            continue
        layer = name.removesuffix(".weight")
        out[name], out[f"{layer}.{key}"], exact[name] = int8_rows(value, group)
        if note is not None:
            out[f"{layer}.comfy_quant"] = as_note(note)
    return out, exact


def one(tmp_path, **tensors):
    """What a file of one layer `a` stands for."""
    metadata, config = tensors.pop("metadata", None), tensors.pop("config", None)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({f"a.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors", metadata)
    source = tmp_path if config is not None else tmp_path / "model.safetensors"
    found = find_tensors(source)
    ((_, value),) = read_tensors([("", found["a.weight"])])
    return value


@pytest.mark.parametrize("group", ROTATIONS)
def test_a_rotation_is_its_own_inverse_and_the_published_matrix(group):
    weight = torch.randn(3, 2 * group, generator=torch.Generator().manual_seed(0))
    want = (weight.double().unflatten(1, (-1, group)) @ hadamard(group)).flatten(1)
    torch.testing.assert_close(rotated(weight, group).double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotated(rotated(weight, group), group), weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [4, 16, 64, 256, None])
@pytest.mark.parametrize("place", ["tensor", "params", "header", "both"])
def test_rotated_int8_weights_are_what_they_were_before(tmp_path, group, place):
    """ComfyUI's int8_tensorwise with convrot: the public case that loaded as noise."""
    fields = {"convrot": True} if group is None else {"convrot": True, "convrot_groupsize": group}
    plain = {"format": "int8_tensorwise", "per_row": True, "orig_dtype": "torch.bfloat16"}
    note = {**plain, **fields} if place != "params" else {**plain, "params": fields}
    state, exact = int8_state(group or 256, None if place == "header" else note)
    layers = {n.removesuffix(".weight"): note for n in state if published.is_quantised(n)}
    if place == "both":  # a writer's header that lists the formats alone
        layers = {layer: {"format": "int8_tensorwise"} for layer in layers}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    metadata = header if place in ("header", "both") else None
    file = published.save(state, tmp_path / "wan_int8_convrot.safetensors", metadata)
    same(file, exact, atol=1e-4)
    dense, small = (load_transformer(file, torch.float32, weights=w) for w in ("dense", "small"))
    torch.testing.assert_close(run(small), run(dense), atol=1e-5, rtol=1e-5)
    (kind,) = {t.encoding.name for t in find_tensors(file).values() if t.encoding}
    assert kind == f"int8 scaled by row, rotated in {group or 256}"


def test_convrot_false_is_no_rotation(tmp_path):
    note = {"format": "int8_tensorwise", "convrot": False, "convrot_groupsize": 256}
    state, exact = int8_state(None, note, num_layers=1)
    found = find_tensors(published.save(state, tmp_path / "x.safetensors"))
    ((_, got),) = read_tensors([("", found[f"{KEY}.weight"])])
    assert torch.equal(got, exact[f"{KEY}.weight"])


REFUSED = {
    "another rotation": ({"quarot": True}, "unsupported", "quarot", ""),
    "a rotation's seed": ({"rotation": {"seed": 3}}, "unsupported", "rotation", ""),
    "another axis": ({"axis": 0}, "unsupported", "axis", ""),
    "a second scale": ({"weight_scale_2": 0.5}, "unsupported", "weight_scale_2", ""),
    "zero points": ({"symmetric": False}, "unsupported", "symmetric", ""),
    "a codebook": ({"codebook": True}, "unsupported", "codebook", ""),
    "an unknown field of params": ({"params": {"smooth": 1}}, "unsupported", "smooth", ""),
    "params that are a list": ({"params": [1]}, "invalid_type", None, ""),
    "two values": ({"group_size": 64, "params": {"group_size": 32}}, "conflict", "group_size", ""),
    "a format that is a list": (
        {"format": ["int8_tensorwise"]},
        "unsupported",
        "format",
        "",
    ),
    "a format that is an object": ({"format": {}}, "unsupported", "format", ""),
    "no format": ({"format": None}, "unsupported", "format", ""),
    "a flag that is a text": ({"convrot": "yes"}, "invalid_type", "convrot", ""),
    "a group of no power of 4": (
        {"convrot": True, "convrot_groupsize": 128},
        "unsupported",
        "convrot_groupsize",
        "",
    ),
    "a group of nothing": (
        {"convrot": True, "convrot_groupsize": 0},
        "unsupported",
        "convrot_groupsize",
        "",
    ),
    "a group below nothing": (
        {"convrot": True, "convrot_groupsize": -4},
        "unsupported",
        "convrot_groupsize",
        "",
    ),
    "a group that is a float": (
        {"convrot": True, "convrot_groupsize": 256.5},
        "invalid_type",
        "convrot_groupsize",
        "",
    ),
    "a huge group": (
        {"convrot": True, "convrot_groupsize": 10**30},
        "unsupported",
        "convrot_groupsize",
        "",
    ),
    "a group beyond the columns": (
        {"convrot": True, "convrot_groupsize": 1024},
        "mismatch",
        None,
        "1024 columns",
    ),
    "a group and no flag": ({"convrot_groupsize": 256}, "missing", "convrot", ""),
    "blocks that do not fit": ({"group_size": 100}, "mismatch", None, "100x100"),
    "blocks of nothing": ({"group_size": 0}, "out_of_range", "group_size", ""),
    "rows that are none": ({"per_row": False}, "mismatch", None, "(256, 1)"),
    "another shape": ({"orig_shape": [1, 2]}, "mismatch", "orig_shape", ""),
    "another type": ({"format": "float8_e4m3fn"}, "mismatch", None, "int8"),
    "convrot of floats": (
        {"format": "float8_e4m3fn", "convrot": True},
        "unsupported",
        "convrot",
        "",
    ),
}


@pytest.mark.parametrize("place", ["tensor", "header"])
@pytest.mark.parametrize("change, code, param, name", REFUSED.values(), ids=REFUSED)
def test_a_note_that_is_not_understood_is_refused_by_name(
    tmp_path, change, code, param, name, place
):
    raw, scale, _ = int8_rows(torch.randn(256, 256))
    note = {"format": "int8_tensorwise", **change}
    tensors = {"weight": raw, "weight_scale": scale}
    metadata = None
    if place == "tensor":
        tensors["comfy_quant"] = as_note(note)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {"a": note}})}
    with refuses(code, param, ModelError) as error:
        one(tmp_path, metadata=metadata, **tensors)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "value, code, param, name",
    [
        ([], "invalid_type", None, "a list"),
        ({"layers": []}, "invalid_type", "layers", ""),
        ({"layers": {"a": "int8_tensorwise"}}, "invalid_type", None, "a text"),
        ({"layers": {"a": None}}, "invalid_type", None, "null"),
        ({"layers": {"b": {"format": "int8_tensorwise"}}}, "missing", None, ""),
        ({"format_version": "2.0", "layers": {}}, "unsupported", "format_version", ""),
        ({"format_version": ["1.0"], "layers": {}}, "unsupported", "format_version", ""),
        ({"rotation": "hadamard", "layers": {}}, "unsupported", "rotation", ""),
    ],
)
def test_a_header_that_is_not_understood_is_refused_by_name(tmp_path, value, code, param, name):
    raw, scale, _ = int8_rows(torch.randn(8, 8))
    metadata = {"_quantization_metadata": json.dumps(value)}
    with refuses(code, param, ModelError) as error:
        one(tmp_path, metadata=metadata, weight=raw, weight_scale=scale)
    assert name in str(error.value)


def test_a_rotation_that_only_the_header_tells_of_is_refused(tmp_path):
    raw, scale, exact = int8_rows(torch.randn(8, 8))
    with refuses("unsupported", kind=ModelError) as error:
        metadata = {"activation_rotation": "convrot_hadamard_v1"}
        one(tmp_path, metadata=metadata, weight=raw, weight_scale=scale)
    assert "activation_rotation" in str(error.value)
    metadata = {"use_hadamard": "false", "format": "pt"}
    assert torch.equal(one(tmp_path, metadata=metadata, weight=raw, weight_scale=scale), exact)


@pytest.mark.parametrize(
    "value, code, name",
    [
        (as_note(b"{"), "unreadable", ""),
        (as_note(b"[" * 5000), "too_large", ""),
        (as_note(b'"int8_tensorwise"'), "invalid_type", ""),
        (as_note(b"\xff\xfe"), "unreadable", ""),
        (torch.ones(3), "invalid_type", "float32"),
        (torch.zeros(2**17, dtype=torch.uint8), "invalid_type", "uint8"),
    ],
)
def test_a_note_that_is_no_json_is_one_sentence(tmp_path, value, code, name):
    raw, scale, _ = int8_rows(torch.randn(8, 8))
    with refuses(code, kind=ModelError) as error:
        one(tmp_path, weight=raw, weight_scale=scale, comfy_quant=value)
    assert name in str(error.value)


def test_harmless_fields_change_nothing(tmp_path):
    raw, scale, exact = int8_rows(torch.randn(16, 8))
    fields = {"orig_dtype": "torch.float16", "full_precision_matrix_mult": True}
    fields |= {"per_row": True, "orig_shape": [16, 8], "symmetric": True}
    note = {"format": "int8_tensorwise", **fields}
    got = one(tmp_path, weight=raw, weight_scale=scale, comfy_quant=as_note(note))
    assert torch.equal(got, exact)
    kinds = {effect for fields in notes.FIELDS.values() for effect, _ in fields.values()}
    assert kinds == {notes.USED, notes.CHECKED, notes.HARMLESS}


def test_the_documentation_has_every_field():
    from pathlib import Path

    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    _, _, section = page.read_text().partition("### What a quantised file says of itself")
    rows = [line.split("|") for line in section.partition("\n## ")[0].splitlines() if "|" in line]
    table = [row[2:5] for row in rows[2:]]
    assert len(table) == len(notes.FIELDS)
    for cells, fields in zip(table, notes.FIELDS.values(), strict=True):
        for cell, effect in zip(cells, (notes.USED, notes.CHECKED, notes.HARMLESS), strict=True):
            wanted = [f"`{name}`" for name, (kind, _) in fields.items() if kind == effect]
            assert sorted(filter(None, cell.strip().split(", "))) == sorted(wanted)


@pytest.mark.parametrize("shape, blocks", [((4, 2), (64, 128)), ((256, 2), (1, 128))])
def test_a_group_size_is_that_of_the_blocks(tmp_path, shape, blocks):
    raw = torch.randint(-100, 100, (256, 256)).to(torch.int8)
    scale = torch.rand(shape)
    note = {"format": "int8_blockwise", "group_size": 128}
    if blocks[0] == 64:  # 64 rows to a block of 128 columns is no block of a group size
        with refuses("mismatch", kind=ModelError) as error:
            one(tmp_path, weight=raw, weight_scale=scale, comfy_quant=as_note(note))
        assert "128x128" in str(error.value)
        return
    got = one(tmp_path, weight=raw, weight_scale=scale, comfy_quant=as_note(note))
    assert torch.equal(got, raw.float() * scale.repeat_interleave(128, 1))


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL}},
    "ignore": ["lm_head"],
    "quantization_status": "compressed",
    "transform_config": {},
    "sparsity_config": {},
    "kv_cache_scheme": None,
}


def group(**changes):
    return {"config_groups": {"g": {"weights": {**CHANNEL, **changes}}}}


@pytest.mark.parametrize("where", ["config", "header"])
@pytest.mark.parametrize(
    "config, code, param, name",
    [
        ({**FP8, "rotation": True}, "unsupported", "rotation", ""),
        ({**FP8, "weight_block_size": [64, 64]}, "mismatch", None, "64x64"),
        ({**FP8, "weight_block_size": [0, 128]}, "invalid_value", None, ""),
        ({**FP8, "weight_block_size": "128"}, "invalid_type", "weight_block_size", ""),
        ({**FP8, "fmt": "e3m4"}, "unsupported", "fmt", ""),
        ({**FP8, "quant_method": "torchao"}, "unsupported", "quant_method", ""),
        ({**FP8, "quant_method": ["fp8"]}, "unsupported", "quant_method", ""),
        ({"bits": 8}, "unsupported", "quant_method", ""),
        ([], "unsupported", "quant_method", ""),
        (
            {**COMPRESSED, "transform_config": {"config_groups": {"R1": {}}}},
            "unsupported",
            "transform_config",
            "",
        ),
        (
            {**COMPRESSED, "sparsity_config": {"format": "sparse-24"}},
            "unsupported",
            "sparsity_config",
            "",
        ),
        ({**COMPRESSED, "format": "pack-quantized"}, "unsupported", "format", ""),
        ({**COMPRESSED, "smoothing": 1}, "unsupported", "smoothing", ""),
        ({**COMPRESSED, "config_groups": []}, "missing", "config_groups", ""),
        ({**COMPRESSED, **group(num_bits=4)}, "unsupported", "num_bits", ""),
        ({**COMPRESSED, **group(symmetric=False)}, "unsupported", "symmetric", ""),
        ({**COMPRESSED, **group(actorder="weight")}, "unsupported", "actorder", ""),
        ({**COMPRESSED, **group(strategy="tensor_group")}, "unsupported", "strategy", ""),
        ({**COMPRESSED, **group(axis=0)}, "unsupported", "axis", ""),
        ({**COMPRESSED, **group(type="int")}, "mismatch", None, "int8"),
        ({**COMPRESSED, **group(type="float", strategy="tensor")}, "mismatch", None, "(2, 2)"),
    ],
)
def test_a_quantization_config_that_is_not_understood_is_refused(
    tmp_path, where, config, code, param, name
):
    tensors = {"weight": torch.zeros(256, 256).to(torch.float8_e4m3fn)}
    tensors["weight_scale_inv"] = torch.ones(2, 2)
    document = {"quantization_config": config}
    with refuses(code, param, ModelError) as error:
        if where == "config":
            one(tmp_path, config=document, **tensors)
        else:
            metadata = {"quantization_config": json.dumps(config)}
            one(tmp_path, metadata=metadata, **tensors)
    assert name in str(error.value)


def test_a_quantization_config_that_fits_is_read(tmp_path):
    small = torch.randn(256, 256).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2)
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    config = {"quantization_config": {**FP8, "modules_to_not_convert": ["b"], "fmt": "e4m3"}}
    got = one(tmp_path, config=config, weight=small, weight_scale_inv=scale)
    assert torch.equal(got, small.float() * spread)
    raw, scale, exact = int8_rows(torch.randn(16, 8))
    config = {"quantization_config": COMPRESSED}
    assert torch.equal(one(tmp_path, config=config, weight=raw, weight_scale=scale), exact)
    zeros = torch.zeros(16, 1, dtype=torch.int8)
    got = one(tmp_path, config=config, weight=raw, weight_scale=scale, weight_zero_point=zeros)
    assert torch.equal(got, exact)
    with refuses("unsupported", kind=ModelError) as error:
        one(tmp_path, config=config, weight=raw, weight_scale=scale, weight_zero_point=zeros + 1)
    assert "weight_zero_point" in str(error.value)


def fp8_state(style="comfy", **changes):
    state, _, metadata = published.fp8_scaled(published.wan_state(**changes), style)
    return state, metadata


@pytest.mark.parametrize(
    "style, dropped, name",
    [
        ("comfy", [f"{KEY}.scale_weight"], "scaled_fp8"),
        ("comfy", "all", "scaled_fp8"),
        ("comfy", [f"{KEY}.scale_weight", "scaled_fp8"], "others"),
        ("comfy_quant", [f"{KEY}.weight_scale"], "comfy_quant"),
        ("comfy_quant", "all", "comfy_quant"),
        ("metadata", [f"{KEY}.weight_scale"], "_quantization_metadata"),
        ("metadata", "all", "_quantization_metadata"),
        ("rows", [f"{KEY}.weight_scale"], "others"),
        ("blocks", [f"{KEY}.weight_scale_inv"], "others"),
    ],
)
def test_a_missing_scale_is_refused(tmp_path, style, dropped, name):
    state, metadata = fp8_state(style, num_layers=1)
    gone = [k for k in state if "scale" in k and k != "scaled_fp8"] if dropped == "all" else dropped
    file = published.save(
        {k: v for k, v in state.items() if k not in gone}, tmp_path / "x.safetensors", metadata
    )
    with refuses("missing", kind=ModelError) as error:
        load_transformer(file)
    assert name in str(error.value)


def test_a_config_says_that_a_scale_is_missing(tmp_path):
    with refuses("missing", kind=ModelError) as error:
        weight = torch.ones(8, 8).to(torch.float8_e4m3fn)
        one(tmp_path, config={"quantization_config": FP8}, weight=weight)
    assert "quantization_config" in str(error.value)


@pytest.mark.parametrize("kind", ["marker", "some layers wide", "no marker", "dummy scales"])
def test_files_whose_scales_are_whole_still_load(tmp_path, kind):
    """A marker beside weights that are not quantised, layers that stay wide, plain casts, and the
    scales of 1 that ComfyUI's older converter writes beside wide layers."""
    state = published.wan_state(num_layers=1)
    exact = {k: v.clone() for k, v in state.items()}
    if kind == "marker":
        state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        state["blocks.0.self_attn.comfy_attention.config"] = as_note({"attention": "x"})
    elif kind == "no marker":
        for k in [k for k in state if published.is_quantised(k)]:
            state[k] = state[k].to(torch.float8_e4m3fn)
            exact[k] = state[k].float()
    else:
        scaled, whole, _ = published.fp8_scaled(state)
        first = "blocks.0.self_attn"
        wide = {k for k in scaled if k.startswith(first)}
        exact = {**whole, **{k: v for k, v in state.items() if k.startswith(first)}}
        keep = {k: v for k, v in state.items() if k in wide}
        if kind == "dummy scales":
            keep |= {k: torch.ones(()) for k in wide if k.endswith(("scale_weight", "scale_input"))}
        state = {**{k: v for k, v in scaled.items() if k not in wide}, **keep}
        state["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    file = published.save(state, tmp_path / "x.safetensors")
    found = find_tensors(file)
    assert found.keys() == exact.keys()
    for name, value in read_tensors(found.items()):
        assert torch.equal(value.float(), exact[name].float()), name


@pytest.mark.parametrize(
    "change, code, name",
    [
        ({"weight_scale": torch.ones(1, 1, dtype=torch.uint8)}, "unsupported", "uint8"),
        ({"weight_scale": torch.ones(1).to(torch.float8_e4m3fn)}, "unsupported", "fp8 e4m3"),
        ({"weight_scale": torch.tensor([torch.inf])}, "not_finite", ""),
        ({"weight_scale": torch.ones(0)}, "mismatch", "(0,)"),
        ({"weight": torch.ones(8, 8, dtype=torch.uint8)}, "missing", ""),
        ({"weight": torch.ones(8, 8), "weight_scale": torch.tensor(0.5)}, "mismatch", "float32"),
        ({"weight_zeros": torch.ones(1)}, "unsupported", "weight_zeros"),
        ({"weight_global_scale": torch.ones(1)}, "unsupported", "NVFP4"),
        ({"hadamard_matrix": torch.ones(1)}, "unsupported", "hadamard_matrix"),
        ({"weight_s_rel": torch.ones(1)}, "unsupported", "W4A8"),
    ],
)
def test_tensors_beside_a_weight_that_are_not_understood_are_refused(tmp_path, change, code, name):
    raw, scale, _ = int8_rows(torch.randn(8, 8))
    with refuses(code, kind=ModelError) as error:
        one(tmp_path, **{"weight": raw, "weight_scale": scale, **change})
    assert name in str(error.value)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("sides", [(6,), (4, 6), (4, 3, 2), (4, 3, 1, 2, 2)])
def test_one_scale_goes_with_any_shape(tmp_path, shape, sides):
    small = torch.randn(sides).to(torch.float8_e4m3fn)
    got = one(tmp_path, weight=small, weight_scale=torch.full(shape, 0.25))
    assert got.shape == sides and torch.equal(got, small.float() / 4)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1, 1)])
def test_a_scale_an_output_goes_with_a_convolution(tmp_path, shape):
    small, scale = torch.randn(4, 3, 1, 2, 2).to(torch.float8_e4m3fn), torch.rand(4)
    got = one(tmp_path, weight=small, scale_weight=scale.view(shape))
    assert torch.equal(got, small.float() * scale.view(4, 1, 1, 1, 1))


def test_an_fp8_patch_embedding_with_one_scale_loads(tmp_path):
    state = published.wan_state()
    weight = state["patch_embedding.weight"]
    scale = weight.abs().max() / 448
    small = (weight / scale).to(torch.float8_e4m3fn)
    scaled = {**state, "patch_embedding.weight": small, "patch_embedding.scale_weight": scale}
    same(
        published.save(scaled, tmp_path / "x.safetensors"),
        {**state, "patch_embedding.weight": small.float() * scale},
    )


def test_notes_name_layers_with_or_without_the_files_prefix(tmp_path):
    note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    state, exact = int8_state(64)
    layers = [n.removesuffix(".weight") for n in state if published.is_quantised(n)]
    file = {published.COMFY + k: v for k, v in state.items()}
    for prefix in ("", published.COMFY):
        header = json.dumps({"layers": {prefix + layer: note for layer in layers}})
        same(
            published.save(file, tmp_path / "x.safetensors", {"_quantization_metadata": header}),
            exact,
            atol=1e-4,
        )


def test_notes_of_shards_count(tmp_path):
    note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    state, exact = int8_state(64)
    places, stem = {}, "diffusion_pytorch_model"
    for i in (1, 2):
        part = {k: v for k, v in state.items() if (f".{i - 1}." in k or i == 1) and k not in places}
        name = f"{stem}-0000{i}-of-00002.safetensors"
        layers = {k[:-7]: note for k in part if published.is_quantised(k)}
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
        published.save(part, tmp_path / name, metadata)
        places |= dict.fromkeys(part, name)
    index = json.dumps({"metadata": {}, "weight_map": places})
    (tmp_path / f"{stem}.safetensors.index.json").write_text(index)
    same(tmp_path, exact, atol=1e-4)


def test_pickles_have_scales_too(tmp_path):
    state, exact = int8_state(None)
    torch.save(state, tmp_path / "wan_int8.pth")
    with pytest.warns(UserWarning, match="is a pickle"):
        same(tmp_path / "wan_int8.pth", exact, atol=1e-4)
    del state[f"{KEY}.weight_scale"]
    torch.save(state, tmp_path / "wan_int8.pth")
    with pytest.warns(UserWarning), refuses("missing", kind=ModelError) as error:
        load_transformer(tmp_path / "wan_int8.pth")
    assert "int8" in str(error.value)
