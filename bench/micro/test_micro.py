"""Micro-benchmarks, each beside its peer and compared with it first:
`pytest bench/ -n 0 --benchmark-only`.

Sizes are those of 480p and 81 frames on a GPU, of the mini pair on a CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

from nexus_rt.bench.architectures import WAN_1_3B
from nexus_rt.bench.peers import diffusers_transformer
from nexus_rt.bench.presets import random_transformer
from nexus_rt.loading.pair_folder import MINI
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.solver import make_solver
from nexus_rt.method.time_grid import time_grid
from nexus_rt.method.upfb import blend, published_blend
from nexus_rt.models.decoder import decode_whole
from nexus_rt.ops.attention import attend

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
LATENT = (1, 16, 21, 60, 104)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def synchronous(call):
    """A call that ends when the device has."""

    def run():
        out = call()
        if CUDA:
            torch.cuda.synchronize()
        return out

    return run


def close(got, wanted, tolerance):
    assert (got.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max()


@pytest.mark.parametrize("split", ["four bands", "gaussian", "fft", "dct"])
def test_blend(benchmark, split):
    a, b = (
        torch.randn(LATENT, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(i))
        for i in (0, 1)
    )
    benchmark.group = "blend, 1x16x21x60x104"
    if split == "four bands":
        call = lambda: published_blend(a, b, 0.6, BlendConfig())
    else:
        call = lambda: blend(a, b, 0.6, BlendConfig(split=split))
    if split == "gaussian":
        close(call(), published_blend(a, b, 0.6, BlendConfig()), 1e-4)
    assert torch.isfinite(benchmark(synchronous(call))).all()


@pytest.mark.parametrize("whose", ["ours", "diffusers"])
def test_solver_step(benchmark, whose):
    """The fourth step: predictor and corrector of second order."""
    grid = time_grid(50)
    x, v = (
        torch.randn(LATENT, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(i))
        for i in (0, 1)
    )

    def theirs():
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(50, device=DEVICE)
        scheduler.sigmas, scheduler.timesteps = (
            torch.tensor(grid.sigmas),
            torch.tensor(grid.timesteps, device=DEVICE),
        )
        latents = x
        for t in scheduler.timesteps[:3]:
            latents = scheduler.step(v, t, latents, return_dict=False)[0]
        return lambda: scheduler.step(v, scheduler.timesteps[3], latents, return_dict=False)[0]

    def ours():
        solver, latents = make_solver("unipc", grid, CUDA), x
        for i in range(3):
            latents = solver.step(i, latents, v)
        return lambda: solver.step(3, latents, v)

    benchmark.group = "UniPC step, 1x16x21x60x104"
    close(ours()(), theirs()(), 1e-4)
    # A step moves the solver on, so every round gets one that stands before it.
    rounds = [ours() if whose == "ours" else theirs() for _ in range(10)]
    benchmark.pedantic(
        lambda call: synchronous(call)(), setup=lambda: ((rounds.pop(),), {}), rounds=10
    )


@pytest.mark.parametrize("whose", ["ours", "diffusers"])
def test_dit_block(benchmark, whose):
    """The last block of a generator, guided: 1.3B at 32,760 tokens on a GPU, the mini pair's large
    one on a CPU."""
    if CUDA:
        model, grid = (
            random_transformer({**WAN_1_3B, "num_layers": 1}, DTYPE, DEVICE),
            (21, 60, 104),
        )
    else:
        model, grid = load_transformer(MINI / "large", DTYPE), (5, 8, 8)
    peer, latents = (
        diffusers_transformer(model),
        torch.randn(2, 16, *grid, device=DEVICE, dtype=DTYPE),
    )
    embeds, timestep = (
        torch.randn(2, 40, model.config.text_dim, device=DEVICE, dtype=DTYPE),
        torch.tensor(500.0, device=DEVICE),
    )
    seen = {}
    for name, block in (("ours", model.blocks[-1]), ("diffusers", peer.blocks[-1])):
        block.register_forward_pre_hook(
            lambda block, args, options, n=name: seen.setdefault(n, (args, options)),
            with_kwargs=True,
        )
    ours = model(latents, timestep, model.prepare_context(embeds))
    close(
        ours,
        peer(latents, timestep.expand(2), embeds, return_dict=False)[0],
        2e-2 if CUDA else 1e-4,
    )
    args, options = seen[whose]
    block = (model if whose == "ours" else peer).blocks[-1]
    benchmark.group = f"DiT block, {model.config.dim} wide, 2 x {grid} latents"
    benchmark(synchronous(lambda: block(*args, **options)))


@pytest.mark.parametrize(
    "backend", ["math", "sdpa", *(["flash", "cudnn", "triton"] if CUDA else [])]
)
def test_attention(benchmark, backend):
    heads, length, width = (12, 32760, 128) if CUDA else (4, 1280, 64)
    q, k, v = (torch.randn(1, length, heads, width, device=DEVICE, dtype=DTYPE) for _ in range(3))
    if backend == "math" and CUDA:
        pytest.skip("a matrix of 32,760 x 32,760 for every head")
    run = lambda name: attend(q, k, v, backend=name)
    # a head's first queries
    one = (x[:, :, :1].transpose(1, 2).float() for x in (q[:, :256], k, v))
    close(
        run(backend)[:, :256, :1].transpose(1, 2),
        F.scaled_dot_product_attention(*one),
        2e-2 if CUDA else 1e-5,
    )
    benchmark.group = f"attention, {heads} heads, {length} tokens, {width} wide"
    benchmark(synchronous(lambda: run(backend)))


@pytest.mark.parametrize("whose", ["ours", "diffusers"])
def test_vae_decoding(benchmark, whose):
    """The mini pair's clip: 17 frames of 64 x 64."""
    vae = AutoencoderKLWan.from_pretrained(MINI / "vae").eval().to(DEVICE)
    z = torch.randn(1, 16, 5, 8, 8, device=DEVICE)
    wanted = vae.decode(z, return_dict=False)[0]
    for p in vae.parameters() if whose == "ours" else ():
        if p.ndim == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    x = z.contiguous(memory_format=torch.channels_last_3d)
    call = (
        (lambda: decode_whole(vae, x))
        if whose == "ours"
        else (lambda: vae.decode(z, return_dict=False)[0])
    )
    close(call(), wanted, 1e-4)
    benchmark.group = "VAE, 17 frames of 64x64"
    benchmark(synchronous(call))
