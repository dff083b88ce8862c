"""LoRA: every published layout is the same change, in PyTorch and in an engine; what does not fit is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus_rt import InputError, ModelError, NexusPipeline
from nexus_rt.models.checkpoint import to_diffusers
from nexus_rt.models.load import load_transformer
from nexus_rt.models.lora import Lora, loras_hash, parse_loras

RANK, Q = 2, "blocks.0.self_attn.q"
PLACES = {  # diffusers' names -> Wan's own
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q", "blocks.0.attn2.to_v": "blocks.0.cross_attn.v",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o", "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2", "proj_out": "head.head",
}  # fmt: skip


@pytest.fixture(scope="module")
def halves(tiny_pair):
    """Of each place: down [RANK, in] and up [out, RANK]."""
    state = load_file(next((tiny_pair / "small").glob("*.safetensors")))
    g = torch.Generator().manual_seed(0)
    shapes = {name: state[f"{name}.weight"].shape for name in PLACES}
    return {n: (torch.randn(RANK, s[1], generator=g), torch.randn(s[0], RANK, generator=g)) for n, s in shapes.items()}


def peft(halves):
    return {f"transformer.{n}.lora_{k}.weight": t for n, pair in halves.items() for k, t in zip("AB", pair, strict=True)}


def wan(halves):
    names = {n: f"diffusion_model.{PLACES[n]}" for n in halves}
    return {f"{names[n]}.lora_{k}.weight": t for n, p in halves.items() for k, t in zip(("down", "up"), p, strict=True)}


def kohya(halves):
    names = {n: "lora_unet_" + PLACES[n].replace(".", "_") for n in halves}
    return {f"{names[n]}.lora_{k}.weight": t for n, p in halves.items() for k, t in zip(("down", "up"), p, strict=True)}


def saved(tensors, path):
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def weights(tiny_pair, *loras, dtype=torch.float32):
    return to_diffusers(load_transformer(tiny_pair / "small", dtype, loras=parse_loras(loras)).state_dict())


@pytest.mark.parametrize("layout", [peft, wan, kohya])
def test_a_product_is_added_where_it_belongs_and_nowhere_else(layout, halves, tiny_pair, tmp_path):
    before, after = weights(tiny_pair), weights(tiny_pair, f"{saved(layout(halves), tmp_path / 'a.safetensors')}@0.5")
    for name in before:
        place = name.removesuffix(".weight")
        wanted = before[name].double()
        if name.endswith(".weight") and place in halves:
            wanted = wanted + 0.5 * halves[place][1].double() @ halves[place][0].double()
        assert torch.allclose(after[name].double(), wanted, atol=1e-6), name


def test_alpha_over_rank_scales_and_differences_are_added(halves, tiny_pair, tmp_path):
    before = weights(tiny_pair)
    table, norm, bias = (torch.randn_like(before[n]) for n in (
        "blocks.0.scale_shift_table", "blocks.0.attn1.norm_q.weight", "blocks.0.attn1.to_k.bias",
    ))  # fmt: skip
    file = saved(
        {
            **wan(halves), **{f"diffusion_model.{n}.alpha": torch.tensor(8.0) for n in PLACES.values()},
            "diffusion_model.blocks.0.diff_m": table, "diffusion_model.blocks.0.self_attn.norm_q.diff": norm,
            "diffusion_model.blocks.0.self_attn.k.diff_b": bias,
        },
        tmp_path / "a.safetensors",
    )  # fmt: skip
    after = weights(tiny_pair, file)
    place = "blocks.0.ffn.net.0.proj"
    wanted = before[f"{place}.weight"] + 8 / RANK * halves[place][1] @ halves[place][0]
    assert torch.allclose(after[f"{place}.weight"], wanted, atol=1e-5)
    for name, change in (("scale_shift_table", table), ("attn1.norm_q.weight", norm), ("attn1.to_k.bias", bias)):
        assert torch.allclose(after[f"blocks.0.{name}"], before[f"blocks.0.{name}"] + change, atol=1e-6)
    twice = weights(tiny_pair, file, f"{file}@-1")
    assert all(torch.allclose(twice[n], before[n], atol=1e-5) for n in before)
    low = weights(tiny_pair, file, dtype=torch.bfloat16)[f"{place}.weight"]
    assert torch.equal(low, after[f"{place}.weight"].bfloat16())  # stored and difference added in float32, rounded once


def first(halves):
    return dict([next(iter(wan(halves).items()))])


@pytest.mark.parametrize(
    "make, words",
    [
        (first, "only one half of its product is there"),
        (lambda h: {f"{Q}.dora_scale": torch.ones(1)}, "1 of its keys are none of a LoRA's, such as .*dora_scale"),
        (lambda h: {"blocks.7.ffn.0.diff_b": torch.ones(48)}, "changes 1 parameters that this model has not, such as blocks.7"),
        (lambda h: {f"{Q}.diff_b": torch.ones(31)}, r"blocks.0.attn1.to_q.bias is \(31,\), and the model's \(32,\)"),
        (lambda h: {k: torch.ones(3, 5) for k in wan(h)}, r"is \(3, 5\) times \(3, 5\), and the model's \("),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, words, halves, tiny_pair, tmp_path):
    with pytest.raises(ModelError, match=words):
        weights(tiny_pair, saved(make(halves), tmp_path / "a.safetensors"))


def test_files_and_scales_are_checked_before_anything_is_read(tiny_pair, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="'strong' is no scale; expected FILE@SCALE"):
        NexusPipeline.from_pretrained(tiny_pair, small_lora=f"{tmp_path / 'a.safetensors'}@strong")
    with pytest.raises(InputError, match="LoRA .*b.safetensors is not a safetensors file here"):
        NexusPipeline.from_pretrained(tiny_pair, small_lora=tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        NexusPipeline.from_pretrained(tiny_pair, small_lora=tmp_path / "a.safetensors")
    (odd := tmp_path / "a@b.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="given for the large generator, which is not loaded"):
        NexusPipeline.from_pretrained(small=tiny_pair / "small", vae=tiny_pair, large_lora=odd)
    assert Lora.parse(odd) == Lora(odd) and Lora.parse(f"{odd}@2") == Lora(odd, 2.0)


def test_an_engine_of_a_merged_model_is_another_engine_and_says_so(halves, tiny_pair, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    from nexus_rt import cli
    from nexus_rt.engines.folder import EngineFolder

    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    file = saved(wan(halves), tmp_path / "a.safetensors")
    line = ["export", "--pair", str(tiny_pair), "--parts", "small", "--sizes", "32x32x5", "-o"]
    assert cli.main([*line, str(tmp_path / "merged"), "--small-lora", f"{file}@0.5"]) == 0
    manifest = EngineFolder.read(tmp_path / "merged" / "small").manifest
    assert manifest.lora == loras_hash({"small": [Lora(file, 0.5)]}) != loras_hash({"small": [Lora(file)]})
    assert manifest.parity["passed"]  # compared with the merged model
    options = dict(height=32, width=32, num_frames=5, num_inference_steps=2, plan="small", output_type="latent")
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    pipes = [
        NexusPipeline.from_engines(tmp_path / "merged"), NexusPipeline.from_pretrained(tiny_pair, small_lora=f"{file}@0.5"),
        NexusPipeline.from_pretrained(tiny_pair),
    ]  # fmt: skip
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    engine, merged, plain = (p("a red circle", latents=x, **options).frames for p in pipes)
    assert torch.allclose(engine, merged, atol=1e-4) and not torch.allclose(engine, plain, atol=1e-2)
