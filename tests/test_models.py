"""Text encoder and VAE against diffusers' own pipeline on the same folders."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from nexus_rt.components.text import TextEncoder
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import DecodeError, InputError, ModelError
from nexus_rt.media.latents import read_latents
from nexus_rt.models.coders import clean_prompt
from tests.refusals import refuses

PROMPTS = [
    "a red circle  moves\nleft",
    "the blue square &amp; panda on black background " * 3,
    "",
    "caf\u00c3\u00a9 &lt;b&gt;",
]


@pytest.fixture(scope="module")
def diffusers_pipe(tiny_pair):
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import AutoTokenizer, UMT5EncoderModel

    return WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(tiny_pair / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(tiny_pair / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(tiny_pair / "vae"),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        transformer=WanTransformer3DModel.from_pretrained(tiny_pair / "large"),
    )


def test_embeddings_equal_diffusers(tiny_pair, diffusers_pipe):
    ours = TextEncoder(tiny_pair, torch.float32, "cpu").encode(PROMPTS, 512)
    theirs, _ = diffusers_pipe.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512
    )
    assert ours.shape == theirs.shape == (4, 512, 32)
    assert (ours - theirs).abs().max() <= 1e-5
    used = (ours != 0).any(-1).sum(1)
    # an empty prompt is its end token
    assert torch.equal(used, (theirs != 0).any(-1).sum(1)) and used[2] == 1


def test_long_prompts_are_cut_as_diffusers_cuts_them(tiny_pair, diffusers_pipe):
    long = ["panda " * 50]
    ours = TextEncoder(tiny_pair, torch.float32, "cpu").encode(long, 16)
    theirs, _ = diffusers_pipe.encode_prompt(
        long, do_classifier_free_guidance=False, max_sequence_length=16
    )
    assert (ours - theirs).abs().max() <= 1e-5


def test_prompts_are_cleaned():
    assert clean_prompt("  a \n\t b ") == "a b"
    assert clean_prompt("cafÃ© &amp;amp; x") == "café & x"


def test_the_encoder_can_be_dropped_and_comes_back(tiny_pair):
    text = TextEncoder(tiny_pair, torch.float32, "cpu")
    assert text.model is None  # not read before it is used
    first = text.encode(["a panda"])
    text.drop()
    assert text.model is None
    assert torch.equal(text.encode(["a panda"]), first)


def test_bad_text_folders_and_calls(tiny_pair, tmp_path):
    with refuses("missing", "text_encoder", ModelError):
        TextEncoder(tmp_path, torch.float32, "cpu")
    with refuses("missing", "prompt", InputError):
        TextEncoder(tiny_pair, torch.float32, "cpu").encode([])
    broken = shutil.copytree(tiny_pair, tmp_path / "broken")
    weights = broken / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with refuses("damaged", kind=ModelError) as error:
        TextEncoder(broken, torch.float32, "cpu").encode(["a"])
    assert "text encoder" in str(error.value)


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("whole", [True, False])
def test_decoding_equals_diffusers(tiny_pair, diffusers_pipe, frames, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr("nexus_rt.components.vae.WHOLE", 0)
    latents = torch.randn(2, 16, frames, 4, 6)
    ours = VideoDecoder(tiny_pair / "vae", torch.float32, "cpu").decode(latents)
    vae = diffusers_pipe.vae
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        video = vae.decode(latents * std + mean, return_dict=False)[0]
    theirs = diffusers_pipe.video_processor.postprocess_video(video, output_type="np")
    assert ours.shape == (2, 4 * frames - 3, 3, 32, 48)
    assert np.abs(ours.permute(0, 1, 3, 4, 2).numpy() - theirs).max() <= 1e-5


def test_encode_inverts_the_statistics(tiny_pair):
    """Latents of a clip, denormalised by hand, are diffusers' own."""
    vae = VideoDecoder(tiny_pair / "vae", torch.float32, "cpu")
    clip = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    latents = vae.encode(clip)
    with torch.no_grad():
        raw = vae.model.encode(clip).latent_dist.mode()
    mean = torch.tensor(vae.space["latents_mean"]).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.space["latents_std"]).view(1, -1, 1, 1, 1)
    assert torch.allclose(latents * std + mean, raw, atol=1e-5)


def test_tiles_are_used_above_the_limit_only(tiny_pair, monkeypatch):
    vae = VideoDecoder(tiny_pair / "vae", torch.float32, "cpu")
    # 320 x 320 pixels, larger than a 256-pixel tile
    latents = torch.randn(1, 16, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    vae.load()
    tiles = []
    whole = type(vae.model).tiled_decode
    monkeypatch.setattr(
        type(vae.model), "tiled_decode", lambda self, z, **k: tiles.append(1) or whole(self, z, **k)
    )
    plain = vae.decode(latents)
    assert not tiles
    monkeypatch.setattr("nexus_rt.components.vae.TILE_ABOVE", 300 * 300)
    tiled = vae.decode(latents)
    assert tiles and tiled.shape == plain.shape
    # Far from a tile's borders only the decoder's one attention, which sees a tile and not the
    # frame, differs.
    assert (tiled - plain)[..., :64, :64].abs().max() <= 0.1 * plain.std()


def test_a_decoding_failure_keeps_the_latents(tiny_pair, tmp_path, monkeypatch):
    vae = VideoDecoder(tiny_pair / "vae", torch.float32, "cpu")
    vae.load()
    monkeypatch.setattr(
        "nexus_rt.components.vae.decode_whole",
        lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")),
    )
    latents = torch.randn(1, 16, 2, 4, 6)
    with refuses("decode_failed", kind=DecodeError) as caught:
        vae.decode(latents, tmp_path)
    assert "no memory" in str(caught.value)
    assert caught.value.latents_path.parent == tmp_path
    assert torch.equal(read_latents(caught.value.latents_path), latents)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_latents_that_cannot_be_saved_do_not_hide_the_failure(tiny_pair, tmp_path):
    vae = VideoDecoder(tiny_pair / "vae", torch.float32, "cpu")
    tmp_path.chmod(0o500)
    with refuses("decode_failed", kind=DecodeError) as caught:
        vae.decode(torch.randn(1, 15, 2, 4, 6), tmp_path)
    saved = caught.value.latents_path  # among the system's temporary files
    assert saved.is_file() and saved.parent != tmp_path
    saved.unlink()


def test_latents_with_nowhere_to_go_do_not_hide_the_failure(tiny_pair, tmp_path):
    vae = VideoDecoder(tiny_pair / "vae", torch.float32, "cpu")
    with refuses("decode_failed", kind=DecodeError) as caught:
        vae.decode(torch.randn(1, 15, 2, 4, 6), tmp_path / "missing")
    assert caught.value.latents_path is None


def test_bad_vae_folders(tiny_pair, tmp_path):
    with refuses("not_found", kind=ModelError):
        VideoDecoder(tmp_path, torch.float32, "cpu")
    broken = shutil.copytree(tiny_pair / "vae", tmp_path / "vae")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with refuses("damaged", kind=ModelError) as error:
        VideoDecoder(broken, torch.float32, "cpu").load()
    assert "VAE" in str(error.value)
    weights.unlink()
    with refuses("missing", kind=ModelError):
        VideoDecoder(broken, torch.float32, "cpu")
    with refuses("not_found", kind=ModelError):
        read_latents(tmp_path / "none.safetensors")


VAE_DAMAGE = {
    "a weight is missing": (
        lambda s, c: s.pop("decoder.conv_out.weight"),
        "mismatch",
        None,
        "decoder.conv_out.weight",
    ),
    "a weight more": (lambda s, c: s.update(extra=torch.zeros(1)), "mismatch", None, "extra"),
    "scaled fp8": (
        lambda s, c: s.update({"decoder.conv_in.scale_weight": torch.full((1,), 2.0)}),
        "mismatch",
        None,
        "decoder.conv_in.scale_weight",
    ),
    "another shape": (
        lambda s, c: s.update({"decoder.conv_out.bias": torch.zeros(4)}),
        "mismatch",
        None,
        "conv_out.bias",
    ),
    "Wan's own names": (
        lambda s, c: [s.update({f"model.{k}": s.pop(k)}) for k in list(s)],
        "mismatch",
        None,
        "unknown",
    ),
    "another width": (lambda s, c: c.update(base_dim=8), "mismatch", None, "of another shape"),
    "more blocks": (lambda s, c: c.update(num_res_blocks=2), "mismatch", None, "missing"),
    "absurd": (lambda s, c: c.update(num_res_blocks=10**9), "out_of_range", "num_res_blocks", ""),
    "not a number": (lambda s, c: c.update(base_dim="96"), "invalid_type", "base_dim", ""),
    "another class": (
        lambda s, c: c.update(_class_name="AutoencoderKL"),
        "unsupported",
        "_class_name",
        "",
    ),
}


@pytest.mark.parametrize("change, code, param, name", VAE_DAMAGE.values(), ids=VAE_DAMAGE)
def test_a_vae_that_does_not_fit_is_found_when_the_pipeline_is_made(
    own_pair, change, code, param, name
):
    from safetensors.torch import load_file, save_file

    from nexus_rt import NexusPipeline

    file, config = (
        own_pair / "vae" / "diffusion_pytorch_model.safetensors",
        own_pair / "vae" / "config.json",
    )
    state, fields = (
        {k: v.clone() for k, v in load_file(file).items()},
        json.loads(config.read_text()),
    )
    change(state, fields)
    save_file(state, file)
    config.write_text(json.dumps(fields))
    with refuses(code, param, ModelError) as error:
        NexusPipeline.from_pretrained(own_pair)
    assert name in str(error.value)


WAN_VAES = {
    "tiny": {"base_dim": 4, "z_dim": 15, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    "published": {},
    "attention at a scale": {"base_dim": 8, "num_res_blocks": 1, "attn_scales": [0.5]},
    "a decoder of its own width": {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "temperal_downsample": [True, False, True],
    },
}


@pytest.mark.parametrize("config", WAN_VAES.values(), ids=WAN_VAES)
def test_our_tree_of_the_vae_is_diffusers_own(config):
    from diffusers import AutoencoderKLWan

    from nexus_rt.models.wan_vae import WanVae

    with torch.device("meta"):
        ours, theirs = WanVae(config), AutoencoderKLWan(**config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.packaging
def test_a_small_clip_needs_no_diffusers(tiny_pair):
    code = f"""if True:
        import sys
        from nexus_rt import NexusPipeline
        pipe = NexusPipeline.from_pretrained({str(tiny_pair)!r})
        pipe("a heron", height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=1.0)
        heavy = {{"diffusers", "av"}} & set(sys.modules)
        assert not heavy, heavy
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_trees_of_the_vae_share_their_weights_and_agree(tiny_pair):
    vae = VideoDecoder(tiny_pair / "vae", torch.float32, "cpu")
    z = torch.randn(1, 16, 2, 4, 6)
    mean, std = (
        torch.tensor(vae.space[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )

    def whole():
        with torch.no_grad():
            frames = vae.model.decode(z * std + mean, return_dict=False)[0]
        return frames.add(1).div(2).clamp(0, 1).transpose(1, 2)

    small = vae.decode(z)
    assert type(vae.model).__name__ == "AutoencoderKLWan"
    torch.testing.assert_close(small, whole(), atol=1e-5, rtol=0)
    for parameter in vae.model.parameters():
        parameter.data.mul_(0.9)
    changed = vae.decode(z)
    assert (changed - small).abs().max() > 1e-3
    torch.testing.assert_close(changed, whole(), atol=1e-5, rtol=0)
