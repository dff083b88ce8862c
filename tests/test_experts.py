"""Generators of two experts, as Wan2.2-T2V-A14B: which runs when, how they are moved, and that it
is what diffusers' pipeline computes."""

import json
import shutil

import pytest
import torch

from nexus_rt import InputError, ModelError, NexusPipeline
from nexus_rt.cli import main
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.experts import ExpertsEngine, engines_by_name
from nexus_rt.loading.experts import ExpertFolders, find_experts, split_source
from nexus_rt.loading.lora import Lora
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.time_grid import time_grid
from nexus_rt.pipeline.memory_use import MemoryUse
from nexus_rt.pipeline.residency import MODES, plan_residency
from tests import published
from tests.needs import needs
from tests.omnivideo import original_wan_names
from tests.refusals import refuses

TINY = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=48)
CALL = dict(width=48, height=32, num_frames=5, num_inference_steps=8, output_type="latent")


@pytest.fixture(scope="module")
def a14b(tiny_pair, tmp_path_factory):
    """diffusers' layout: transformer/, transformer_2/, vae/, text_encoder/, tokenizer/."""
    folder = tmp_path_factory.mktemp("wan22") / "Wan2.2-T2V-A14B-Diffusers"
    for name, seed in (("transformer", 21), ("transformer_2", 22)):
        published.wan_model(seed, **TINY).save_pretrained(folder / name)
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(tiny_pair / name, folder / name)
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875}
    index |= {n: ["diffusers", "WanTransformer3DModel"] for n in ("transformer", "transformer_2")}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def pipe(a14b):
    made = NexusPipeline.from_pretrained(large=a14b)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_is_diffusers_pipeline_with_transformer_2(a14b, pipe):
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    grid = pipe.make_plan("large", 8, shift=5.0).grid

    class OnOurGrid(UniPCMultistepScheduler):
        def set_timesteps(self, count, device=None, **ignored):
            super().set_timesteps(count, device=device)
            self.sigmas, self.timesteps = torch.tensor(grid.sigmas), torch.tensor(grid.timesteps)

    theirs = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan.from_pretrained(a14b / "vae"),
        scheduler=OnOurGrid(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=WanTransformer3DModel.from_pretrained(a14b / "transformer"),
        transformer_2=WanTransformer3DModel.from_pretrained(a14b / "transformer_2"),
        boundary_ratio=0.875,
    )
    theirs.set_progress_bar_config(disable=True)
    positive, negative = pipe.encode_prompt("a red circle", "blue")
    told = dict(prompt_embeds=positive, negative_prompt_embeds=negative)
    want = theirs(
        **told, **CALL, guidance_scale=4.0, guidance_scale_2=3.0, generator=seeded()
    ).frames
    got = pipe(
        **told, **CALL, plan="large", shift=5.0, guidance_scale_2=(4.0, 3.0), generator=seeded()
    ).frames
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    # with one expert's scale for both, and with either expert alone, it is another clip
    other = pipe(**told, **CALL, plan="large", shift=5.0, guidance_scale_2=4.0, generator=seeded())
    assert (other.frames - want).abs().max() > 1e-3


def test_the_plan_says_which_expert_runs(pipe):
    plan = pipe.make_plan("large", 8, shift=5.0)
    experts = [step.expert("large") for step in plan.steps]
    assert experts == ["high" if t >= 875 else "low" for t in plan.grid.timesteps]
    assert set(experts) == {"high", "low"} and plan.engines == ("large:high", "large:low")
    assert plan.steps[0].engines == ("large:high",)
    assert [s.scale("large", (4.0, 3.0)) for s in plan.steps] == [
        4.0 if e == "high" else 3.0 for e in experts
    ]
    at_it = parse_plan("large", time_grid(4)).with_experts({"large": 0.0001})
    assert {s.expert("large") for s in at_it.steps} == {"high"}


def test_the_command_line_prints_the_experts(a14b, capsys):
    command = ["plan", "--large", str(a14b), "--plan", "large", "--steps", "6", "--size", "48x32"]
    assert main([*command, "--frames", "5", "--guidance-2", "4,3"]) == 0
    out = capsys.readouterr().out
    assert "large:high" in out and "large:low" in out and " 4 " in out and " 3 " in out


def test_an_expert_is_used_where_it_should_be(pipe):
    """Each engine sees its own timesteps, and prepares its own context once."""
    seen = {name: [] for name in engines_by_name(pipe.engines)}
    prepared = []

    class Watched:
        def __init__(self, name, engine):
            self.name, self.engine = name, engine

        def __getattr__(self, attribute):
            return getattr(self.engine, attribute)

        def prepare(self, context):
            prepared.append(self.name)
            return self.engine.prepare(context)

        def velocity(self, latents, timestep, context):
            seen[self.name].append(int(timestep))
            return self.engine.velocity(latents, timestep, context)

    own = pipe.engines
    experts = own["large"]
    try:
        pipe.engines = {
            "large": ExpertsEngine(
                {n: Watched(f"large:{n}", e) for n, e in experts.experts.items()}, experts.boundary
            )
        }
        pipe("a red circle", **CALL, plan="large", generator=seeded())
    finally:
        pipe.engines = own
    assert seen["large:high"] and all(t >= 875 for t in seen["large:high"])
    assert seen["large:low"] and all(t < 875 for t in seen["large:low"])
    assert len(seen["large:high"] + seen["large:low"]) == 8
    assert prepared == ["large:high", "large:low"]


def test_both_layouts_and_two_files_are_one_generator(a14b, pipe, tiny_pair, tmp_path):
    from diffusers import WanTransformer3DModel

    original = tmp_path / "Wan2.2-T2V-A14B"
    for name, theirs in (("high_noise_model", "transformer"), ("low_noise_model", "transformer_2")):
        model = WanTransformer3DModel.from_pretrained(a14b / theirs)
        (original / name).mkdir(parents=True)
        published.save(
            original_wan_names(model.state_dict()),
            original / name / "diffusion_pytorch_model.safetensors",
        )
        config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 32, "num_heads": 2}
        config |= {"ffn_dim": 48, "num_layers": 1, "text_dim": 4096, "freq_dim": 256}
        (original / name / "config.json").write_text(
            json.dumps({**config, "text_dim": 32, "freq_dim": 32})
        )
    coders = dict(vae=a14b, text_encoder=a14b)
    options = dict(**CALL, plan="large", guidance_scale_2=(4.0, 3.0))
    want = pipe("a red circle", generator=seeded(), **options).frames
    both = (original / "high_noise_model", original / "low_noise_model")
    for source in (original, both, ",".join(map(str, both))):
        made = NexusPipeline.from_pretrained(large=source, **coders)
        made.set_progress_bar_config(disable=True)
        assert torch.equal(made("a red circle", generator=seeded(), **options).frames, want)
    # `convert wan` writes diffusers' layout
    assert main(["convert", "wan", str(original), str(tmp_path / "made")]) == 0
    assert find_experts(tmp_path / "made").boundary == 0.875
    made = NexusPipeline.from_pretrained(large=tmp_path / "made", **coders)
    made.set_progress_bar_config(disable=True)
    assert torch.equal(made("a red circle", generator=seeded(), **options).frames, want)


def test_a_boundary_of_ones_own(a14b):
    made = NexusPipeline.from_pretrained(large=a14b, boundary_ratio=0.5)
    plan = made.make_plan("large", 8)
    assert [s.expert("large") for s in plan.steps] == [
        "high" if t >= 500 else "low" for t in plan.grid.timesteps
    ]
    with refuses("out_of_range", "boundary_ratio", InputError):
        NexusPipeline.from_pretrained(large=a14b, boundary_ratio=2)


def test_the_small_generator_hands_over_to_the_experts(a14b, tiny_pair):
    """A published small generator in the same latent space, bridged to the two."""
    made = NexusPipeline.from_pretrained(small=tiny_pair / "small", large=a14b)
    made.set_progress_bar_config(disable=True)
    options = dict(**CALL, plan="handoff=0.25", shift=12.0, guidance_scale=5.0)
    out = made("a red circle", generator=seeded(), guidance_scale_2=(4.0, 3.0), **options)
    assert out.plan.engines == ("small", "large:high", "large:low")
    assert out.frames.isfinite().all()
    with refuses("unsupported", "guidance_scale", InputError):
        made("a red circle", **{**options, "guidance_scale": (4.0, 3.0)})


def test_either_generator_may_be_of_experts(a14b, tiny_pair):
    made = NexusPipeline.from_pretrained(small=a14b, large=tiny_pair / "large")
    made.set_progress_bar_config(disable=True)
    plan = made("a red circle", **CALL, plan="handoff=0.8", generator=seeded()).plan
    assert plan.engines == ("small:high", "small:low", "large")


@pytest.mark.parametrize("mode", MODES)
def test_residency_moves_three_engines(mode):
    plan = parse_plan("small:3 bridge:1 large:8", time_grid(12, 5.0)).with_experts({"large": 0.875})
    parts = {n: MemoryUse(100, 10, 20) for n in ("small", "large:high", "large:low")}
    parts |= {"text encoder": MemoryUse(50), "vae": MemoryUse(5, 5)}
    made = plan_residency(plan, parts, mode=mode)
    runs = [p.runs for p in made.phases if p.first >= 0]
    assert runs == [("small",), ("small", "large:high"), ("large:high",), ("large:low",)]
    arriving = [p.arriving for p in made.phases if p.first >= 0]
    if mode == "prefetched":
        assert arriving == [("large:high",), (), ("large:low",), ()]
        assert made.peak == 210
    else:
        assert not any(arriving)
    peaks = {"resident": 365, "freed": 310, "prefetched": 210, "swapped": 210, "streamed": 50}
    assert made.peak == peaks[mode]


def test_a_budget_gives_the_same_clip(a14b, pipe):
    options = dict(**CALL, plan="large", guidance_scale_2=(4.0, 3.0))
    want = pipe("a red circle", generator=seeded(), **options).frames
    tight = NexusPipeline.from_pretrained(large=a14b, vram="1GB")
    tight.set_progress_bar_config(disable=True)
    parts = tight.call_parts(ClipSize(48, 32, 5))
    assert {"large:high", "large:low"} <= parts.keys()
    assert torch.equal(tight("a red circle", generator=seeded(), **options).frames, want)


def test_a_lora_of_one_expert(a14b, tmp_path):
    """`FILE@SCALE:high` is merged into that expert alone, and without it into both."""
    key = "transformer.blocks.0.attn1.to_q"
    file = published.save(
        {
            f"{key}.lora_A.weight": torch.randn(2, 32, generator=seeded()),
            f"{key}.lora_B.weight": torch.randn(32, 2, generator=seeded(1)),
        },
        tmp_path / "a.safetensors",
    )
    weight = lambda made, name: (
        made.engines["large"].experts[name].model.blocks[0].attn1.to_qkv.weight
    )
    plain = NexusPipeline.from_pretrained(large=a14b)
    for spec, changed in (
        (f"{file}@0.5:high", ("high",)),
        (f"{file}@1:low", ("low",)),
        (file, ("high", "low")),
    ):
        made = NexusPipeline.from_pretrained(large=a14b, large_lora=spec)
        for name in ("high", "low"):
            differs = not torch.equal(weight(made, name), weight(plain, name))
            assert differs == (name in changed)
    assert Lora.parse(f"{file}@0.5:high") == Lora(file, 0.5, "high")
    with refuses("unknown_name", "expert", InputError) as error:
        Lora.parse(f"{file}@1:middle")
    assert "'middle'" in str(error.value)


def test_a_lora_for_an_expert_of_one_transformer_is_refused(tiny_pair, tmp_path):
    file = published.save({"x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "a.safetensors")
    with refuses("unsupported", "expert", InputError):
        NexusPipeline.from_pretrained(tiny_pair, small_lora=f"{file}@1:high")


def test_halves_of_a_generator_are_refused(a14b, tmp_path, tiny_pair):
    half = tmp_path / "half"
    shutil.copytree(a14b / "transformer", half / "high_noise_model")
    with refuses("missing", kind=ModelError) as error:
        NexusPipeline.from_pretrained(large=half)
    assert "low_noise_model/" in str(error.value)
    unsaid = tmp_path / "unsaid"
    shutil.copytree(a14b, unsaid)
    (unsaid / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with refuses("missing", "boundary_ratio", ModelError):
        find_experts(unsaid)
    (unsaid / "model_index.json").write_text(json.dumps({"boundary_ratio": 7}))
    with refuses("out_of_range", "boundary_ratio", ModelError):
        find_experts(unsaid)
    with pytest.raises(ModelError) as error:
        NexusPipeline.from_pretrained(large=(a14b / "transformer", tiny_pair / "large"))
    assert "architecture" in str(error.value)
    with refuses("mismatch", kind=InputError):
        split_source(("a", "b", "c"))
    with pytest.raises(InputError) as error:
        NexusPipeline.from_pretrained(tiny_pair, boundary_ratio=0.9)
    assert "boundary_ratio" in str(error.value)
    assert find_experts(tiny_pair / "small") is None
    assert find_experts(a14b) == ExpertFolders(a14b / "transformer", a14b / "transformer_2", 0.875)


@pytest.mark.slow
@pytest.mark.export
def test_experts_are_exported_an_engine_each(a14b, tiny_pair, pipe, tmp_path, monkeypatch):
    needs("onnx", "onnxscript", "onnxruntime")
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "engines"
    command = ["export", "--large", str(a14b), "--boundary", "0.8", "--sizes", "48x32x5"]
    assert main([*command, "-o", str(out)]) == 0
    assert {"large-high", "large-low"} <= {p.name for p in out.iterdir()}
    made = NexusPipeline.from_engines(out)
    made.set_progress_bar_config(disable=True)
    assert made.engines["large"].boundary == 0.8
    options = dict(**CALL, guidance_scale_2=(4.0, 3.0))
    got = made("a red circle", plan="large", generator=seeded(), **options)
    assert got.plan.engines == ("large:high", "large:low")
    exact = NexusPipeline.from_pretrained(large=a14b, boundary_ratio=0.8)
    exact.set_progress_bar_config(disable=True)
    want = exact("a red circle", plan="large", generator=seeded(), **options).frames
    torch.testing.assert_close(got.frames, want, atol=1e-3, rtol=1e-3)
    shutil.rmtree(out / "large-low")
    with refuses("missing", "large-low", ModelError):
        NexusPipeline.from_engines(out)
