"""NexusPipeline on a tiny random pair: arguments, reproducibility, control, bad input."""

import contextlib
import json

import numpy as np
import pytest
import torch

from nexus_rt import (
    BlendConfig,
    Cancelled,
    DecodeError,
    InputError,
    ModelError,
    NexusPipeline,
    NumericsError,
)
from nexus_rt.core.size import ClipSize
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Guidance
from nexus_rt.method.loop import sample
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.time_grid import time_grid
from tests.needs import needs
from tests.refusals import refuses

PROMPT = "a red circle moves left"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_same_seed_gives_the_same_frames(tiny_pipe):
    first = tiny_pipe(PROMPT, generator=seeded()).frames
    assert (
        first.shape == (1, 5, 32, 48, 3)
        and first.dtype == np.float32
        and first.min() >= 0
        and first.max() <= 1
    )
    assert np.array_equal(first, tiny_pipe(PROMPT, generator=seeded()).frames)
    assert not np.array_equal(first, tiny_pipe(PROMPT, generator=seeded(1)).frames)


def test_one_and_two_threads_agree(tiny_pipe):
    threads, frames = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            frames.append(tiny_pipe(PROMPT, generator=seeded()).frames)
    finally:
        torch.set_num_threads(threads)
    assert np.abs(frames[0] - frames[1]).max() <= 1e-4


def test_output_types_hold_the_same_video(tiny_pipe):
    array = tiny_pipe(PROMPT, generator=seeded(), output_type="np").frames
    tensor = tiny_pipe(PROMPT, generator=seeded(), output_type="pt").frames
    images = tiny_pipe(PROMPT, generator=seeded(), output_type="pil").frames
    latents = tiny_pipe(PROMPT, generator=seeded(), output_type="latent").frames
    assert tensor.shape == (1, 5, 3, 32, 48) and latents.shape == (1, 16, 2, 4, 6)
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    assert len(images) == 1 and len(images[0]) == 5 and images[0][0].size == (48, 32)
    assert np.abs(np.asarray(images[0][2]) / 255 - array[0, 2]).max() <= 0.5 / 255 + 1e-6
    assert np.array_equal(tiny_pipe.decode(latents), array)


def test_the_pipeline_is_its_parts(tiny_pipe):
    """Prompt encoding, noise, loop and decoding by hand give the pipeline's latents."""
    got = tiny_pipe(
        PROMPT,
        "panda",
        generator=seeded(4),
        plan="reference",
        guidance_scale=3.0,
        guidance_scale_2=2.0,
        shift=3.0,
        output_type="latent",
        blend=BlendConfig(split="fft"),
    ).frames
    embeds = tiny_pipe.text.encode([PROMPT, "panda"])
    prompt = Prompt(embeds[:1], embeds[1:])
    noise = torch.randn(1, 16, 2, 4, 6, generator=seeded(4))
    plan = parse_plan("reference", time_grid(6, 3.0))
    expected = sample(
        noise,
        plan,
        tiny_pipe.engines,
        {"small": prompt, "large": prompt},
        Guidance.of(3.0, 2.0),
        blend=BlendConfig(split="fft"),
    )
    assert torch.equal(got, expected)


def test_the_large_plan_is_diffusers_pipeline_on_this_grid(tiny_pair, tiny_pipe):
    """Same embeddings, noise, grid and solver: diffusers' own transformer gives the same
    latents."""
    import diffusers

    from tests.test_solver import diffusers_solver

    got = tiny_pipe(
        PROMPT, generator=seeded(), plan="large", output_type="latent", num_inference_steps=8
    ).frames
    transformer = diffusers.WanTransformer3DModel.from_pretrained(tiny_pair / "large").eval()
    grid = time_grid(8, 5.0)
    scheduler, x = diffusers_solver(grid), torch.randn(1, 16, 2, 4, 6, generator=seeded())
    cond, uncond = tiny_pipe.text.encode([PROMPT, ""]).split(1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            c, u = (transformer(x, t[None], e, return_dict=False)[0] for e in (cond, uncond))
            x = scheduler.step(u + 6.0 * (c - u), t, x, return_dict=False)[0]
    assert (got - x).abs().max() <= 1e-4 * x.abs().max()


def test_a_pair_may_set_its_own_guidance(own_pair):
    index = json.loads((own_pair / "model_index.json").read_text())
    own = NexusPipeline.from_pretrained(own_pair)
    index["defaults"] |= {"guidance_scale": 3.0, "guidance_scale_2": 2.0}
    (own_pair / "model_index.json").write_text(json.dumps(index))
    pair = NexusPipeline.from_pretrained(own_pair)

    def run(pipe, **scales):
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            PROMPT, generator=seeded(), plan="reference", output_type="latent", **scales
        ).frames

    assert torch.equal(run(pair), run(own, guidance_scale=3.0, guidance_scale_2=2.0))
    assert torch.equal(
        run(pair, guidance_scale_2=5.0), run(own, guidance_scale=3.0, guidance_scale_2=5.0)
    )
    # one scale given is both
    assert torch.equal(run(pair, guidance_scale=4.0), run(own, guidance_scale=4.0))


def test_batches_of_prompts(tiny_pipe):
    out = tiny_pipe(
        [PROMPT, "a blue square"], generator=[seeded(1), seeded(2)], output_type="latent"
    ).frames
    one = tiny_pipe(["a blue square"], generator=[seeded(2)], output_type="latent").frames
    assert out.shape[0] == 2 and torch.allclose(out[1:], one, atol=1e-4)
    twice = tiny_pipe(
        PROMPT, num_videos_per_prompt=2, generator=[seeded(1), seeded(2)], output_type="latent"
    ).frames
    assert torch.allclose(twice[:1], out[:1], atol=1e-4) and not torch.allclose(
        twice[0], twice[1], atol=1e-2
    )


def test_embeddings_may_be_given(tiny_pipe):
    embeds, negative = tiny_pipe.encode_prompt(PROMPT, "panda")
    said = tiny_pipe(PROMPT, "panda", generator=seeded(), output_type="latent").frames
    given = tiny_pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        generator=seeded(),
        output_type="latent",
    ).frames
    assert torch.equal(said, given)
    with refuses("missing", "negative_prompt_embeds", InputError):
        tiny_pipe(prompt_embeds=embeds)
    assert (
        tiny_pipe(prompt_embeds=embeds, guidance_scale=1.0, output_type="latent")
        .frames.isfinite()
        .all()
    )


def test_latents_may_be_given(tiny_pipe):
    noise = tiny_pipe.prepare_latents(1, ClipSize(48, 32, 5), seeded(9))
    a = tiny_pipe(PROMPT, latents=noise, output_type="latent").frames
    assert torch.equal(a, tiny_pipe(PROMPT, generator=seeded(9), output_type="latent").frames)
    with refuses("mismatch", "latents", InputError):
        tiny_pipe(PROMPT, latents=noise[:, :8])


def test_callbacks_see_and_change_latents(tiny_pipe):
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append((index, timestep, sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 5 else None

    out = tiny_pipe(
        PROMPT,
        callback_on_step_end=callback,
        output_type="latent",
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    )
    assert [s[:2] for s in seen] == list(
        enumerate(time_grid(6, 5.0).timesteps)
    ) and torch.count_nonzero(out.frames) == 0
    assert seen[0][2] == ["latents", "prompt_embeds"]
    with refuses("unknown_name", "callback_on_step_end_tensor_inputs", InputError) as caught:
        tiny_pipe(PROMPT, callback_on_step_end_tensor_inputs=["latent"])
    assert "did you mean 'latents'" in str(caught.value)


def test_cancel_from_a_callback(tiny_pipe):
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append(index)
        if index == 2:
            pipe.cancel()

    with refuses("cancelled", kind=Cancelled):
        tiny_pipe(PROMPT, callback_on_step_end=callback)
    assert seen == [0, 1, 2]
    # the next call is not cancelled
    assert tiny_pipe(PROMPT, output_type="latent").frames.isfinite().all()


def test_progress_is_shown(tiny_pipe, capsys):
    tiny_pipe.set_progress_bar_config()
    tiny_pipe(PROMPT, output_type="latent")
    tiny_pipe.set_progress_bar_config(disable=True)
    assert "6/6" in capsys.readouterr().err


def test_one_generator_alone(tiny_pair):
    pipe = NexusPipeline.from_pretrained(
        small=tiny_pair / "small", vae=tiny_pair, text_encoder=tiny_pair
    )
    pipe.set_progress_bar_config(disable=True)
    out = pipe(PROMPT, height=32, width=32, num_frames=1, num_inference_steps=2, plan="small")
    assert out.frames.shape == (1, 1, 32, 32, 3)
    with refuses("missing", "plan", InputError):
        pipe(PROMPT, height=32, width=32, num_frames=1, num_inference_steps=4)


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(height=40), "height is 40; expected a multiple of 16, such as 32 or 48"),
        (dict(width=8), "width is 8; .*such as 16"),
        (dict(height=-16), "height is -16"),
        (dict(num_frames=6), r"num_frames is 6; expected 4k\+1, such as 5 or 9"),
        (dict(num_frames=0), "num_frames is 0"),
        (dict(num_inference_steps=0), "whole number of at least 1"),
        (dict(num_inference_steps=-4), "whole number of at least 1"),
        (dict(shift=-1.0), "shift"),
        (dict(plan="handof=0.3"), "did you mean 'handoff'"),
        (dict(plan="handoff=2000"), "outside the schedule"),
        (dict(plan="handoff=0.5", energy="reference"), "needs both generators"),
        (dict(energy="progresive"), "did you mean 'progressive'"),
        (dict(solver="unipcc"), "did you mean 'unipc'"),
        (dict(output_type="pill"), "did you mean 'pil'"),
        (dict(prompt=[]), "prompt list is empty"),
        (dict(prompt=None), "either prompt or prompt_embeds"),
        (dict(prompt=[PROMPT, PROMPT], negative_prompt=["x"]), "1 negative prompts for 2"),
        (dict(num_videos_per_prompt=0), "num_videos_per_prompt"),
        (dict(generator=[seeded(), seeded()]), "2 generators for 1"),
    ],
)
def test_bad_input_is_named(tiny_pipe, call, words):
    with pytest.raises(InputError, match=words):
        tiny_pipe(**{"prompt": PROMPT, **call})


def rewrite(path, **change):
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_generators_of_other_latent_spaces_are_refused(own_pair):
    import shutil

    def load():
        return NexusPipeline.from_pretrained(own_pair)

    shutil.copy(own_pair / "large" / "config.json", own_pair / "kept.json")
    for change, field in (
        ({"in_channels": 12}, "in_channels (16 and 12)"),
        ({"patch_size": [1, 1, 1]}, "patch_size"),
        ({"text_dim": 48}, "text_dim"),
    ):
        shutil.copy(own_pair / "kept.json", own_pair / "large" / "config.json")
        rewrite(own_pair / "large" / "config.json", **change)
        with refuses("mismatch", kind=ModelError) as caught:
            load()
        assert field in str(caught.value)
    shutil.copy(own_pair / "kept.json", own_pair / "large" / "config.json")
    for name in ("small", "large"):
        shutil.copytree(own_pair / "vae", own_pair / name / "vae")
    rewrite(own_pair / "small" / "vae" / "config.json", latents_mean=[0.0] * 16)
    with refuses("mismatch", kind=ModelError) as caught:
        NexusPipeline.from_pretrained(
            small=own_pair / "small", large=own_pair / "large", text_encoder=own_pair
        )
    assert "latents_mean" in str(caught.value)
    rewrite(own_pair / "small" / "vae" / "config.json", z_dim=8)
    with refuses("mismatch", kind=ModelError) as caught:
        NexusPipeline.from_pretrained(small=own_pair / "small", text_encoder=own_pair)
    assert "z_dim" in str(caught.value)


def test_folders_that_are_no_pair(own_pair, tmp_path):
    with refuses("missing", "pretrained", ModelError):
        NexusPipeline.from_pretrained(tmp_path)
    rewrite(own_pair / "model_index.json", _class_name="WanPipeline")
    with refuses("unsupported", "pretrained", ModelError):
        NexusPipeline.from_pretrained(own_pair)
    with refuses("missing", "text_encoder", ModelError):
        NexusPipeline.from_pretrained(small=own_pair / "small", vae=own_pair)(
            PROMPT, height=32, width=32, plan="small"
        )
    with refuses("missing", "vae", ModelError):
        NexusPipeline.from_pretrained(small=own_pair / "small", text_encoder=own_pair)(
            PROMPT, plan="small"
        )


def test_of_two_repositories_one_text_encoder_is_fetched(tiny_pair, tmp_path, monkeypatch):
    import shutil

    repositories, asked = {}, []
    for name in ("small", "large"):
        repositories[f"owner/{name}"] = root = tmp_path / name
        shutil.copytree(tiny_pair / name, root / "transformer")
        for part in ("vae", "text_encoder", "tokenizer"):
            shutil.copytree(tiny_pair / part, root / part)

    def fetch(repo, *, allow_patterns, ignore_patterns, **options):
        asked.append((repo, tuple(allow_patterns), options["revision"]))
        assert "*.pth" in ignore_patterns and "*.bin" in ignore_patterns
        return str(repositories[repo])

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    pipe = NexusPipeline.from_pretrained(small="owner/small", large="owner/large", revision="main")
    assert set(pipe.engines) == {"small", "large"} and pipe.text.folder == tmp_path / "large"
    encoders = [repo for repo, patterns, _ in asked if "text_encoder/*" in patterns]
    assert encoders == ["owner/large"] and {r for *_, r in asked} == {"main"}


def test_an_unknown_backend_suggests_the_nearest(tiny_pair):
    with refuses("unknown_name", "backend", InputError) as caught:
        NexusPipeline.from_pretrained(tiny_pair, backend="troch")
    assert "did you mean 'torch'" in str(caught.value)


@pytest.mark.parametrize("generator", ["small", "large"])
def test_nan_weights_name_the_generator_and_the_parameter(own_pair, generator):
    """Of a memory fault, or a caller's change: a checkpoint's are refused when it is read."""
    from safetensors.torch import load_file, save_file

    pipe = NexusPipeline.from_pretrained(own_pair)
    pipe.set_progress_bar_config(disable=True)
    name = "blocks.0.ffn.net.2.weight"
    with torch.no_grad():
        dict(pipe.engines[generator].model.named_parameters())[name][3, 3] = float("nan")
    path = own_pair / generator / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state[name][3, 3] = float("nan")
    save_file(state, path)
    with refuses("not_finite", kind=ModelError) as caught:
        NexusPipeline.from_pretrained(own_pair)
    assert name in str(caught.value) and f"{generator}/" in str(caught.value)
    with refuses("not_finite", generator, NumericsError) as caught:
        pipe(PROMPT, plan="reference")
    assert "step 0 " in str(caught.value) and "blocks.0.ffn" in str(caught.value)


def test_decoding_failure_reaches_the_caller_with_the_latents(tiny_pair, tmp_path, monkeypatch):
    pipe = NexusPipeline.from_pretrained(tiny_pair)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(
        type(pipe.vae), "load", lambda self: (_ for _ in ()).throw(MemoryError("no memory"))
    )
    with pytest.raises(DecodeError) as caught:
        pipe(PROMPT)
    assert caught.value.latents_path.is_file()


def test_low_precision_generators_run(tiny_pair):
    exact = NexusPipeline.from_pretrained(tiny_pair)
    low = NexusPipeline.from_pretrained(tiny_pair, torch_dtype=torch.bfloat16)
    for pipe in (exact, low):
        pipe.set_progress_bar_config(disable=True)
    a, b = (p(PROMPT, generator=seeded(), output_type="latent").frames for p in (exact, low))
    assert b.dtype == torch.float32 and (a - b).norm() / a.norm() <= 0.05


def test_triton_kernels_make_the_same_latents(tiny_pair, tiny_pipe):
    """Text to latents with every kernel of the runtime, interpreted: DiT, attention, blend,
    solver."""
    needs("triton")
    fused = NexusPipeline.from_pretrained(tiny_pair, kernels="triton")
    fused.set_progress_bar_config(disable=True)
    options = dict(
        height=32,
        width=32,
        num_frames=1,
        num_inference_steps=4,
        plan="small:1 bridge:2 large:1",
        output_type="latent",
    )
    wanted, got = (
        p("a red circle", generator=torch.Generator().manual_seed(0), **options).frames
        for p in (tiny_pipe, fused)
    )
    assert fused.kernels == "triton" and fused.engines["small"].model.ops.name == "triton"
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_wrong_bar_holds_no_other_threads_bar_up(tiny_pipe):
    """tqdm keeps its lock where drawing a bar raises."""
    import threading

    from tqdm import tqdm

    for options in ({"bar_format": "{nothing}"}, {"unit_scale": object()}, {"ncols": "wide"}):
        with contextlib.suppress(InputError):
            tiny_pipe.set_progress_bar_config(**options)
    made = threading.Event()

    def bar():
        tqdm(total=1, disable=True).close()
        made.set()

    threading.Thread(target=bar, daemon=True).start()
    assert made.wait(10)
    with refuses("invalid_value", kind=InputError):
        tiny_pipe.set_progress_bar_config(bar_format="{nothing}")
    tiny_pipe.set_progress_bar_config(disable=True)
