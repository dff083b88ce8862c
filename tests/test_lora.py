"""LoRA: every published layout is the same change, in PyTorch and in an engine; what does not fit
is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_rt import InputError, ModelError, NexusPipeline
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.export.components import GeneratorComponent
from nexus_rt.loading.layouts import to_diffusers
from nexus_rt.loading.lora import Lora, loras_hash, parse_loras
from nexus_rt.loading.transformer import load_transformer
from tests.needs import needs
from tests.refusals import refuses

RANK, Q = 2, "blocks.0.self_attn.q"
PLACES = {  # diffusers' names -> Wan's own
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.attn2.to_v": "blocks.0.cross_attn.v",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "proj_out": "head.head",
}


@pytest.fixture(scope="module")
def halves(tiny_pair):
    """Of each place: down [RANK, in] and up [out, RANK]."""
    state = load_file(next((tiny_pair / "small").glob("*.safetensors")))
    g = torch.Generator().manual_seed(0)
    shapes = {name: state[f"{name}.weight"].shape for name in PLACES}
    return {
        n: (torch.randn(RANK, s[1], generator=g), torch.randn(s[0], RANK, generator=g))
        for n, s in shapes.items()
    }


def peft(halves):
    return {
        f"transformer.{n}.lora_{k}.weight": t
        for n, pair in halves.items()
        for k, t in zip("AB", pair, strict=True)
    }


def wan(halves):
    names = {n: f"diffusion_model.{PLACES[n]}" for n in halves}
    return {
        f"{names[n]}.lora_{k}.weight": t
        for n, p in halves.items()
        for k, t in zip(("down", "up"), p, strict=True)
    }


def kohya(halves):
    names = {n: "lora_unet_" + PLACES[n].replace(".", "_") for n in halves}
    return {
        f"{names[n]}.lora_{k}.weight": t
        for n, p in halves.items()
        for k, t in zip(("down", "up"), p, strict=True)
    }


def saved(tensors, path):
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
    return path


def weights(tiny_pair, *loras, dtype=torch.float32):
    return to_diffusers(
        load_transformer(tiny_pair / "small", dtype, loras=parse_loras(loras)).state_dict()
    )


@pytest.mark.parametrize("layout", [peft, wan, kohya])
def test_a_product_is_added_where_it_belongs_and_nowhere_else(layout, halves, tiny_pair, tmp_path):
    before, after = (
        weights(tiny_pair),
        weights(tiny_pair, f"{saved(layout(halves), tmp_path / 'a.safetensors')}@0.5"),
    )
    for name in before:
        place = name.removesuffix(".weight")
        wanted = before[name].double()
        if name.endswith(".weight") and place in halves:
            wanted = wanted + 0.5 * halves[place][1].double() @ halves[place][0].double()
        assert torch.allclose(after[name].double(), wanted, atol=1e-6), name


def test_alpha_over_rank_scales_and_differences_are_added(halves, tiny_pair, tmp_path):
    before = weights(tiny_pair)
    table, norm, bias = (
        torch.randn_like(before[n])
        for n in (
            "blocks.0.scale_shift_table",
            "blocks.0.attn1.norm_q.weight",
            "blocks.0.attn1.to_k.bias",
        )
    )
    file = saved(
        {
            **wan(halves),
            **{f"diffusion_model.{n}.alpha": torch.tensor(8.0) for n in PLACES.values()},
            "diffusion_model.blocks.0.diff_m": table,
            "diffusion_model.blocks.0.self_attn.norm_q.diff": norm,
            "diffusion_model.blocks.0.self_attn.k.diff_b": bias,
        },
        tmp_path / "a.safetensors",
    )
    after = weights(tiny_pair, file)
    place = "blocks.0.ffn.net.0.proj"
    wanted = before[f"{place}.weight"] + 8 / RANK * halves[place][1] @ halves[place][0]
    assert torch.allclose(after[f"{place}.weight"], wanted, atol=1e-5)
    for name, change in (
        ("scale_shift_table", table),
        ("attn1.norm_q.weight", norm),
        ("attn1.to_k.bias", bias),
    ):
        assert torch.allclose(
            after[f"blocks.0.{name}"], before[f"blocks.0.{name}"] + change, atol=1e-6
        )
    twice = weights(tiny_pair, file, f"{file}@-1")
    assert all(torch.allclose(twice[n], before[n], atol=1e-5) for n in before)
    low = weights(tiny_pair, file, dtype=torch.bfloat16)[f"{place}.weight"]
    # stored and difference added in float32, rounded once
    assert torch.equal(low, after[f"{place}.weight"].bfloat16())


def first(halves):
    return dict([next(iter(wan(halves).items()))])


@pytest.mark.parametrize(
    "make, code, name",
    [
        (first, "missing", ""),
        (
            lambda h: {f"{Q}.dora_scale": torch.ones(1)},
            "unsupported",
            "dora_scale",
        ),
        (
            lambda h: {"blocks.7.ffn.0.diff_b": torch.ones(48)},
            "mismatch",
            "blocks.7",
        ),
        (
            lambda h: {f"{Q}.diff_b": torch.ones(31)},
            "mismatch",
            "(31,)",
        ),
        (
            lambda h: {k: torch.ones(3, 5) for k in wan(h)},
            "mismatch",
            "(3, 5)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, code, name, halves, tiny_pair, tmp_path):
    with refuses(code, kind=ModelError) as error:
        weights(tiny_pair, saved(make(halves), tmp_path / "a.safetensors"))
    assert name in str(error.value)


def test_files_and_scales_are_checked_before_anything_is_read(tiny_pair, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with refuses("invalid_value", "scale", InputError) as error:
        NexusPipeline.from_pretrained(tiny_pair, small_lora=f"{tmp_path / 'a.safetensors'}@strong")
    assert "'strong'" in str(error.value)
    with refuses("not_found", "path", InputError) as error:
        NexusPipeline.from_pretrained(tiny_pair, small_lora=tmp_path / "b.safetensors")
    assert "b.safetensors" in str(error.value)
    with refuses("damaged", kind=ModelError):
        NexusPipeline.from_pretrained(tiny_pair, small_lora=tmp_path / "a.safetensors")
    (odd := tmp_path / "a@b.safetensors").write_bytes(b"no")
    with refuses("missing", "large", InputError):
        NexusPipeline.from_pretrained(small=tiny_pair / "small", vae=tiny_pair, large_lora=odd)
    assert Lora.parse(odd) == Lora(odd) and Lora.parse(f"{odd}@2") == Lora(odd, 2.0)


@pytest.mark.slow
@pytest.mark.export
def test_an_engine_of_a_merged_model_is_another_engine_and_says_so(
    halves, tiny_pair, tmp_path, monkeypatch
):
    needs("onnx", "onnxscript", "onnxruntime")
    from nexus_rt import cli
    from nexus_rt.engines.folder import EngineFolder

    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    file = saved(wan(halves), tmp_path / "a.safetensors")
    line = ["export", "--pair", str(tiny_pair), "--parts", "small", "--sizes", "32x32x5", "-o"]
    assert cli.main([*line, str(tmp_path / "merged"), "--small-lora", f"{file}@0.5"]) == 0
    manifest = EngineFolder.read(tmp_path / "merged" / "small").manifest
    assert (
        manifest.lora
        == loras_hash({"small": [Lora(file, 0.5)]})
        != loras_hash({"small": [Lora(file)]})
    )
    assert manifest.parity["passed"]  # compared with the merged model
    options = dict(
        height=32, width=32, num_frames=5, num_inference_steps=2, plan="small", output_type="latent"
    )
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    pipes = [
        NexusPipeline.from_engines(tmp_path / "merged"),
        NexusPipeline.from_pretrained(tiny_pair, small_lora=f"{file}@0.5"),
        NexusPipeline.from_pretrained(tiny_pair),
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    engine, merged, plain = (p("a red circle", latents=x, **options).frames for p in pipes)
    assert torch.allclose(engine, merged, atol=1e-4) and not torch.allclose(
        engine, plain, atol=1e-2
    )


META, BESIDE = "header", "adapter_config.json"


def two(halves):
    """PEFT's names of two of the places."""
    names = ["blocks.0.attn1.to_q", "blocks.0.ffn.net.0.proj"]
    return names, {k: v for k, v in peft(halves).items() if any(f".{n}." in k for n in names)}


@pytest.mark.parametrize("where", [META, BESIDE])
@pytest.mark.parametrize(
    "config, scales",
    [
        ({"r": RANK, "lora_alpha": 8}, (4.0, 4.0)),
        ({"r": RANK, "lora_alpha": 8, "use_rslora": True}, (8 / RANK**0.5, 8 / RANK**0.5)),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, (1.0, 4.0)),
        (
            {
                "r": RANK,
                "lora_alpha": 8,
                "alpha_pattern": {"blocks.0.ffn.net.0.proj": 6, "^to_q": 1},
            },
            (4.0, 3.0),
        ),
        (
            {"r": RANK, "lora_alpha": 8, "alpha_pattern": {r"blocks\.\d+\.attn1\.to_(q|k)": 4}},
            (2.0, 4.0),
        ),
        ({"r": 7, "lora_alpha": 8, "rank_pattern": {"to_q": RANK, "proj": RANK}}, (4.0, 4.0)),
    ],
)
def test_a_scale_outside_the_tensors_counts(where, config, scales, halves, tiny_pair, tmp_path):
    """diffusers writes it into the header under `transformer.`, PEFT beside the file; what its
    patterns match is theirs."""
    import json

    names, tensors = two(halves)
    header = {"format": "pt"}
    if where == META:
        header["lora_adapter_metadata"] = json.dumps(
            {f"transformer.{k}": v for k, v in config.items()}
        )
    else:
        (tmp_path / BESIDE).write_text(
            json.dumps({"peft_type": "LORA", "target_modules": ["to_q"], **config})
        )
    save_file(tensors, tmp_path / "adapter_model.safetensors", header)
    before, after = weights(tiny_pair), weights(tiny_pair, tmp_path)  # the folder is its LoRA
    for name, scale in zip(names, scales, strict=True):
        wanted = before[f"{name}.weight"] + scale * halves[name][1] @ halves[name][0]
        assert torch.allclose(after[f"{name}.weight"], wanted, atol=1e-5), name


@pytest.mark.parametrize(
    "config, code, param",
    [
        ({"r": 3, "lora_alpha": 8}, "mismatch", None),
        (
            {"r": RANK, "lora_alpha": 8, "use_dora": True},
            "unsupported",
            "use_dora",
        ),
        ({"r": RANK, "peft_type": "LOHA"}, "unsupported", "peft_type"),
        (
            {"r": RANK, "init_lora_weights": "pissa_niter_4"},
            "unsupported",
            "init_lora_weights",
        ),
        ({"r": RANK, "lora_alpha": "8"}, "invalid_type", "lora_alpha"),
        ({"r": 0, "lora_alpha": 1}, "out_of_range", "r"),
        (
            {"r": RANK, "lora_alpha": 1, "init_lora_weights": ["pissa"]},
            "invalid_type",
            "init_lora_weights",
        ),
        ({"r": RANK, "lora_alpha": 1, "peft_type": ["LORA"]}, "invalid_type", "peft_type"),
        ({"r": RANK, "lora_alpha": 1, "fan_in_fan_out": True}, "unsupported", "fan_in_fan_out"),
        ({"r": RANK, "lora_alpha": 1, "use_qalora": True}, "unsupported", "use_qalora"),
        (
            {"r": RANK, "lora_alpha": 1, "layer_replication": [[0, 1]]},
            "unsupported",
            "layer_replication",
        ),
        ({"r": [RANK], "lora_alpha": 1}, "invalid_type", "r"),
        (
            {"r": RANK, "lora_alpha": 8, "alpha_pattern": {"(a+)+$" + "(" * 3: 1}},
            "unreadable",
            None,
        ),
        (
            {"r": RANK, "lora_alpha": 8, "alpha_pattern": {"x|" * 200: 1}},
            "too_large",
            None,
        ),
    ],
)
def test_configs_that_mean_something_else_are_refused(
    config, code, param, halves, tiny_pair, tmp_path
):
    import json

    save_file(two(halves)[1], tmp_path / "a.safetensors")
    (tmp_path / BESIDE).write_text(json.dumps(config))
    with refuses(code, param, ModelError):
        weights(tiny_pair, tmp_path / "a.safetensors")


def test_alpha_may_be_a_whole_number_and_must_agree(halves, tiny_pair, tmp_path):
    import json

    names, tensors = two(halves)
    whole = {**tensors, **{f"transformer.{n}.alpha": torch.tensor(6) for n in names}}
    after = weights(tiny_pair, saved(whole, tmp_path / "a.safetensors"))
    place = f"{names[0]}.weight"
    assert torch.allclose(
        after[place],
        weights(tiny_pair)[place] + 3 * halves[names[0]][1] @ halves[names[0]][0],
        atol=1e-5,
    )
    save_file(
        whole,
        tmp_path / "b.safetensors",
        {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})},
    )
    with refuses("conflict", "alpha", ModelError) as error:
        weights(tiny_pair, tmp_path / "b.safetensors")
    assert "lora_adapter_metadata" in str(error.value)


def diffsynth(halves):
    names = {n: f"pipe.dit.{PLACES[n]}" for n in halves}
    return {
        f"{names[n]}.lora_{k}.default.weight": t
        for n, p in halves.items()
        for k, t in zip("AB", p, strict=True)
    }


def kohya_diffusers(halves):
    names = {n: "lora_unet_" + n.replace(".", "_") for n in halves}
    return {
        f"{names[n]}.lora_{k}.weight": t
        for n, p in halves.items()
        for k, t in zip(("down", "up"), p, strict=True)
    }


@pytest.mark.parametrize("layout", [diffsynth, kohya_diffusers])
def test_more_publishers_names(layout, halves, tiny_pair, tmp_path):
    wanted = weights(tiny_pair, saved(peft(halves), tmp_path / "a.safetensors"))
    got = weights(tiny_pair, saved(layout(halves), tmp_path / "b.safetensors"))
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


def test_image_keys_are_skipped_and_counted(halves, tiny_pair, tmp_path):
    image = {
        f"diffusion_model.blocks.0.cross_attn.{n}.lora_down.weight": torch.ones(2, 5)
        for n in ("k_img", "v_img")
    }
    image |= {
        "diffusion_model.img_emb.proj.1.diff_b": torch.ones(3),
        "transformer.blocks.0.attn2.add_k_proj.lora_A.weight": torch.ones(2, 5),
    }
    file = saved({**wan(halves), **image}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="4 keys of the image branch .* are skipped"):
        after = weights(tiny_pair, file)
    wanted = weights(tiny_pair, saved(wan(halves), tmp_path / "b.safetensors"))
    assert all(torch.equal(after[n], wanted[n]) for n in wanted)
    with pytest.warns(UserWarning), refuses("invalid_model", kind=ModelError):
        weights(tiny_pair, saved(image, tmp_path / "c.safetensors"))


NOTHING = {
    "empty": lambda h: {},
    "alphas alone": lambda h: {f"{Q}.alpha": torch.tensor(4.0)},
    "zeros": lambda h: {k: v * (0 if "lora_B" in k else 1) for k, v in peft(h).items()},
    "zero differences": lambda h: {f"{Q}.diff_b": torch.zeros(32)},
    "alpha of zero": lambda h: {
        **{k: v for k, v in wan(h).items() if f".{Q}." in k},
        f"diffusion_model.{Q}.alpha": torch.tensor(0.0),
    },
}


@pytest.mark.parametrize("make", NOTHING.values(), ids=NOTHING)
def test_a_lora_that_changes_nothing_is_refused(make, halves, tiny_pair, tmp_path):
    with refuses("invalid_model", kind=ModelError):
        weights(tiny_pair, saved(make(halves), tmp_path / "a.safetensors"))


ODD = {
    "one place, two names": (lambda h: {**peft(h), **wan(h)}, "duplicate", None, ""),
    "two endings": (
        lambda h: {
            **peft(h),
            **{k.replace("lora_A.", "lora_A.default."): v for k, v in peft(h).items()},
        },
        "duplicate",
        None,
        "",
    ),
    "NaN": (lambda h: {k: v * float("nan") for k, v in peft(h).items()}, "not_finite", None, ""),
    "an infinite alpha": (
        lambda h: {**wan(h), f"diffusion_model.{Q}.alpha": torch.tensor(float("inf"))},
        "not_finite",
        None,
        "",
    ),
    "too large": (lambda h: {k: v * 1e30 for k, v in peft(h).items()}, "out_of_range", None, ""),
    "transposed": (
        lambda h: {"blocks.0.ffn.0.diff": torch.ones(32, 48)},
        "mismatch",
        None,
        "(48, 32)",
    ),
    "as many numbers": (
        lambda h: {"blocks.0.ffn.0.diff": torch.ones(48 * 32)},
        "mismatch",
        None,
        "(1536,)",
    ),
    "whole numbers": (
        lambda h: {k: torch.ones(v.shape, dtype=torch.int8) for k, v in peft(h).items()},
        "invalid_type",
        None,
        "",
    ),
    "several alphas": (
        lambda h: {**wan(h), f"diffusion_model.{Q}.alpha": torch.ones(2)},
        "mismatch",
        "alpha",
        "",
    ),
    "a vector": (
        lambda h: {
            **{f"{Q}.lora_A.weight": torch.ones(32), f"{Q}.lora_B.weight": torch.ones(32, 1)}
        },
        "mismatch",
        None,
        "(32,)",
    ),
}


@pytest.mark.parametrize("make, code, param, name", ODD.values(), ids=ODD)
def test_odd_loras_are_refused_and_nothing_is_changed(
    make, code, param, name, halves, tiny_pair, tmp_path
):
    file = saved(make(halves), tmp_path / "a.safetensors")
    model = load_transformer(tiny_pair / "small", torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with refuses(code, param, ModelError) as error:
        TorchEngine(model).set_loras([Lora(file)])
    assert name in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_a_scale_that_is_not_finite_is_refused(scale, halves, tmp_path):
    file = saved(peft(halves), tmp_path / "a.safetensors")
    with refuses("not_finite", "scale", InputError):
        parse_loras(f"{file}@{scale}")
    with refuses("not_finite", "scale", InputError):
        Lora(file, float(scale))


NAMES = {
    "300 characters": "a" * 300,
    "300 characters of a file": "a" * 300 + ".safetensors",
    "300 characters and a scale": "a" * 300 + ".safetensors@0.5",
    "10,000 folders": "a/" * 10_000 + "a.safetensors",
    "NUL": "a\0b.safetensors",
    "NUL and a scale": "a\0b.safetensors@0.5",
    "half a surrogate pair": "a\ud800.safetensors",
    "nothing": "",
    "an unknown home": "~nobody-of-that-name/a.safetensors",
    "a scale alone": "@0.5",
    "a long scale": "a.safetensors@" + "9" * 400,
    "no scale": "a.safetensors@x\ud800",
    "a device": "/dev/zero",
    "a folder that is a device": "/dev/zero/a.safetensors",
    "None": None,
    "a number": 3,
    "bytes": b"a.safetensors",
    "a list": [["a.safetensors"]],
    "a mapping": {"a.safetensors": 1.0},
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_is_no_files_is_one_sentence(name):
    with pytest.raises(InputError) as error:
        parse_loras(name)
    assert len(str(error.value)) < 700 and str(error.value).encode()


@pytest.mark.parametrize(
    "code, scales",
    [("invalid_type", ["1", None, True, [1.0], 1j]), ("not_finite", [10**400, -(10**400), 1e39])],
)
def test_a_scale_of_another_kind_is_one_sentence(code, scales, tmp_path):
    for scale in scales:
        with refuses(code, "scale", InputError):
            Lora(tmp_path / "a.safetensors", scale)


def test_other_wrong_types_of_a_lora_are_one_sentence(tmp_path):
    with refuses("invalid_type", "path", InputError):
        Lora(3)
    with refuses("unknown_name", "expert", InputError):
        Lora(tmp_path / "a.safetensors", 1.0, "middle")
    assert Lora("a.safetensors").path == Lora(tmp_path / "a.safetensors").path.relative_to(tmp_path)


@pytest.mark.parametrize("kind", ["product", "difference"])
def test_a_scale_that_leaves_float32_is_refused(kind, halves, tiny_pair, tmp_path):
    tensors = peft(halves) if kind == "product" else {"blocks.0.ffn.0.diff": torch.ones(48, 32) * 9}
    file = saved(tensors, tmp_path / "a.safetensors")
    with refuses("out_of_range", "scale", ModelError):
        weights(tiny_pair, f"{file}@3e38")
    after = weights(tiny_pair, f"{file}@1e30")
    assert all(value.isfinite().all() for value in after.values())


def test_a_folder_of_several_loras_is_not_guessed(halves, tmp_path):
    for name in "ab":
        saved(peft(halves), tmp_path / f"{name}.safetensors")
    with refuses("invalid_value", "path", InputError) as error:
        parse_loras(tmp_path)
    assert "a.safetensors, b.safetensors" in str(error.value)
    saved(peft(halves), tmp_path / "pytorch_lora_weights.safetensors")
    assert parse_loras(f"{tmp_path}@0.5") == (
        Lora(tmp_path / "pytorch_lora_weights.safetensors", 0.5),
    )


def test_the_config_beside_a_lora_is_part_of_its_hash(halves, tmp_path):
    file = saved(peft(halves), tmp_path / "a.safetensors")
    plain = loras_hash({"small": [Lora(file)]})
    (tmp_path / BESIDE).write_text('{"r": 2, "lora_alpha": 4}')
    assert loras_hash({"small": [Lora(file)]}) != plain


def test_a_bias_of_a_product_has_its_scale(halves, tiny_pair, tmp_path):
    names, tensors = two(halves)
    bias = torch.randn(32, generator=torch.Generator().manual_seed(1))
    tensors |= {
        f"transformer.{names[0]}.lora_B.bias": bias,
        f"transformer.{names[0]}.alpha": torch.tensor(6.0),
    }
    before, after = (
        weights(tiny_pair),
        weights(tiny_pair, saved(tensors, tmp_path / "a.safetensors")),
    )
    assert torch.allclose(
        after[f"{names[0]}.bias"], before[f"{names[0]}.bias"] + 3 * bias, atol=1e-5
    )


def test_stored_bfloat16_and_a_lora_are_added_in_float32_for_engine_and_reference(
    halves, own_pair, tmp_path
):
    """Rounded to what is stored and widened again, a float32 engine would fail its gate."""
    path = own_pair / "small" / "diffusion_pytorch_model.safetensors"
    stored = {k: v.bfloat16() for k, v in load_file(path).items()}
    save_file(stored, path)
    lora = Lora(saved(peft(halves), tmp_path / "a.safetensors"), 0.37)
    engine = load_transformer(own_pair / "small", torch.float32, loras=[lora])
    place = "blocks.0.attn1.to_q"
    wanted = (
        stored[f"{place}.weight"].double()
        + 0.37 * halves[place][1].double() @ halves[place][0].double()
    )
    got = to_diffusers(engine.state_dict())[f"{place}.weight"]
    assert (got.double() - wanted).abs().max() < 1e-6
    part = GeneratorComponent("small", own_pair / "small", (lora,))
    sizes, cpu = [ClipSize(32, 32, 1)], torch.device("cpu")
    reference, engines = (part.answers(by, sizes, cpu) for by in (None, TorchEngine(engine)))
    assert reference and all(torch.equal(reference[name], engines[name]) for name in reference)
