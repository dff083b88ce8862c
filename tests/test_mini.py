"""The pair that comes with the package: complete, small, in diffusers' layout, and it shows what it is asked for."""

import av
import numpy as np
import pytest
import torch

from nexus_rt import NexusPipeline
from nexus_rt.cli import main
from nexus_rt.pair import MINI
from training import world
from training.checker import look


@pytest.fixture(scope="module")
def mini():
    pipe = NexusPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_stays_small():
    assert sum(f.stat().st_size for f in MINI.rglob("*") if f.is_file()) <= 16e6


def test_diffusers_and_transformers_load_every_part():
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5EncoderModel

    for name in ("small", "large"):
        model, info = WanTransformer3DModel.from_pretrained(MINI / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert model.config.in_channels == 16
    assert AutoencoderKLWan.from_pretrained(MINI / "vae").config.z_dim == 16
    assert UMT5EncoderModel.from_pretrained(MINI / "text_encoder").config.d_model == model.config.text_dim
    tokenizer = AutoTokenizer.from_pretrained(MINI / "tokenizer")
    ids = tokenizer("a striped red circle moves left on a black background").input_ids
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids and len(ids) == 11


def test_the_vae_keeps_what_the_checker_sees(mini):
    rng = np.random.default_rng(2)
    for _ in range(6):
        scene = world.sample_scene(rng, training=False)
        clip = torch.from_numpy(world.render(scene, rng)).transpose(0, 1)[None]
        back = mini.decode(mini.vae.encode(clip))[0]
        assert all(look(back).matches(scene)), scene
        assert 10 * np.log10(1 / ((back - (clip[0].permute(1, 2, 3, 0).numpy() + 1) / 2) ** 2).mean()) >= 23


def test_the_bridged_pair_shows_what_it_is_asked_for(mini):
    """A guard against a broken pair; how often it is right over hundreds of prompts is in training/README.md."""
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, training=True) for _ in range(12)]
    frames = mini([world.caption(s) for s in scenes], generator=torch.Generator().manual_seed(0), num_inference_steps=20).frames
    hits = np.array([look(v).matches(s) for v, s in zip(frames, scenes, strict=True)])
    shape, colour, motion = hits.mean(0)
    assert colour >= 0.9 and motion >= 0.6 and shape >= 0.4  # chance: 0.17, 0.2, 0.2


def test_the_command_runs_it_by_default(tmp_path):
    out = tmp_path / "out.mp4"
    assert main(["generate", "a red circle moves left on a grey background", "--steps", "6", "--quiet", "-o", str(out)]) == 0
    with av.open(str(out)) as container:
        assert [(f.width, f.height) for f in container.decode(video=0)] == [(64, 64)] * 17
