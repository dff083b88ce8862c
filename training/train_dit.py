"""Train one of the mini pair's Wan DiTs by flow matching on the procedural world's latents.

    python -m training.train_dit --encode 6000            # once: clips -> latents, kept in the run folder
    python -m training.train_dit --size small --steps 4000
    python -m training.train_dit --size large --steps 6000
    python -m training.train_dit --size small --export nexus_rt/mini/small

x_sigma = (1 - sigma) x_0 + sigma eps, target velocity eps - x_0, timestep 1000 sigma: Wan's convention. One caption in
ten is empty, for classifier-free guidance. The exported weights are an exponential moving average.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from nexus_rt.models.checkpoint import to_diffusers
from nexus_rt.models.load import load_transformer
from nexus_rt.models.wan import WanConfig, WanTransformer
from training import world
from training.common import RUNS, Log, Muon, cosine, load_checkpoint, save_checkpoint, set_lr
from training.train_text import MAX_TOKENS, tokenize

MINI = Path(__file__).resolve().parent.parent / "nexus_rt" / "mini"
CONTEXT = 512  # Wan pads the prompt to 512 tokens with zeros and attends to them
SIZES = {
    "small": dict(num_attention_heads=4, attention_head_dim=32, ffn_dim=384, num_layers=4),
    "large": dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=704, num_layers=5),
}
TRAIN = {"small": dict(lr=1.2e-2, batch=24), "large": dict(lr=1.5e-2, batch=24)}  # lr of the blocks' matrices, by Muon
EMPTY = 0.1  # share of captions dropped
SHIFT = 2.0  # training noise leans to the high end, where meaning and motion are decided


def config(size: str) -> WanConfig:
    return WanConfig(text_dim=128, freq_dim=128, **SIZES[size])


@torch.no_grad()
def encode(count: int, seed: int, vae_folder: Path) -> None:
    """Render `count` clips and keep their normalised latents [count, 16, 5, 8, 8] with each clip's scene."""
    rng = np.random.default_rng(seed)
    vae = AutoencoderKLWan.from_pretrained(vae_folder, torch_dtype=torch.float32)
    for p in vae.parameters():
        if p.dim() == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    order, latents, scenes = world.all_scenes(), [], []
    for start in range(0, count, 16):
        chosen = [world.sample_scene(rng) for _ in range(min(16, count - start))]
        x = torch.from_numpy(np.stack([world.render(s, rng) for s in chosen])).transpose(1, 2)
        z = vae.encode(x.contiguous(memory_format=torch.channels_last_3d)).latent_dist.mode()
        latents.append(((z - mean) / std).half())
        scenes += [order.index(s) for s in chosen]
        if start % 800 == 0:
            print(f"encoded {start + len(chosen)} of {count}", flush=True)
    save_checkpoint(RUNS / "dit" / "latents.pt", latents=torch.cat(latents), scenes=torch.tensor(scenes))


@torch.no_grad()
def embed_captions() -> torch.Tensor:
    """Embeddings of every paraphrase of every scene, then of the empty caption: [scenes * 3 + 1, MAX_TOKENS, D]."""

    class Fixed:
        def __init__(self, k: int) -> None:
            self.k = k

        def integers(self, n: int) -> int:
            return self.k

    texts = [world.caption(s, Fixed(k)) for s in world.all_scenes() for k in range(3)] + [""]
    tokenizer = AutoTokenizer.from_pretrained(MINI / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(MINI / "text_encoder", torch_dtype=torch.float32)
    out = []
    for start in range(0, len(texts), 256):
        ids, mask = tokenize(tokenizer, texts[start : start + 256])
        out.append(encoder(ids, mask).last_hidden_state * mask[..., None])
    return torch.cat(out)


def train(size: str, steps: int, seed: int, stop: int | None, compile_: bool, init: Path | None) -> None:
    torch.manual_seed(seed)
    settings = TRAIN[size]
    path, log = RUNS / "dit" / f"{size}.pt", Log(RUNS / "dit" / f"{size}.jsonl")
    data = load_checkpoint(RUNS / "dit" / "latents.pt")
    if data is None:
        raise SystemExit("no latents: run `python -m training.train_dit --encode 6000` first")
    latents, scenes, texts = data["latents"], data["scenes"], embed_captions()
    model = WanTransformer(config(size))
    for block in model.blocks:  # start each block near the identity: its gates open during training
        block.scale_shift_table.data[:, [2, 5]] *= 0.1
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    if init:
        model.load_state_dict(load_transformer(init, torch.float32).state_dict())
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    edges = {id(p) for name, p in model.named_parameters() if not name.startswith("blocks.")}
    optimizer = Muon(model.parameters(), lr=settings["lr"], adam_ratio=0.07, weight_decay=0.01, adam=edges)
    start, state = 0, load_checkpoint(path)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start = state["ema"], state["step"]
    generator = torch.Generator().manual_seed(seed + start)
    print(f"{size}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step {start}", flush=True)
    forward = torch.compile(model, dynamic=False) if compile_ else model
    running = None
    for step in range(start, min(steps, stop or steps)):
        set_lr(optimizer, cosine(step, steps, settings["lr"], settings["lr"] / 50, warmup=100))
        pick = torch.randint(len(latents), (settings["batch"],), generator=generator)
        x0 = latents[pick].float()
        row = scenes[pick] * 3 + torch.randint(3, pick.shape, generator=generator)
        row[torch.rand(pick.shape, generator=generator) < EMPTY] = len(texts) - 1
        context = F.pad(texts[row], (0, 0, 0, CONTEXT - MAX_TOKENS))
        u = torch.rand(pick.shape, generator=generator)
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        noise = torch.randn(x0.shape, generator=generator)
        x = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1, 1))
        velocity = forward(x, 1000 * sigma, model.prepare_context(context, at_least=MAX_TOKENS))
        loss = (velocity - (noise - x0)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        for key, value in model.state_dict().items():
            ema[key].lerp_(value, 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            log(size=size, step=step + 1, loss=running)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(path, model=model.state_dict(), ema=ema, optimizer=optimizer.state_dict(), step=step + 1)


def export(size: str, folder: Path) -> None:
    """Write the averaged weights as a diffusers folder in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    state = load_checkpoint(RUNS / "dit" / f"{size}.pt")
    weights = {k: v.to(torch.bfloat16).contiguous().clone() for k, v in to_diffusers(state["ema"]).items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    c = config(size)
    fields = {
        "_class_name": "WanTransformer3DModel", "patch_size": list(c.patch_size), "qk_norm": "rms_norm_across_heads",
        "in_channels": c.in_channels, "out_channels": c.out_channels, "text_dim": c.text_dim, "freq_dim": c.freq_dim,
        "cross_attn_norm": True, "eps": c.eps, "rope_max_seq_len": c.rope_max_seq_len, "added_kv_proj_dim": None,
        "image_dim": None, **SIZES[size],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    print(f"{folder}: step {state['step']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encode", type=int, metavar="CLIPS")
    parser.add_argument("--vae", type=Path, default=MINI / "vae")
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--stop", type=int, help="stop at this step; run again to go on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="start from this transformer folder, where there is no checkpoint")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    if args.encode:
        encode(args.encode, args.seed, args.vae)
    if args.size and args.steps:
        train(args.size, args.steps, args.seed, args.stop, args.compile, args.init)
    if args.size and args.export:
        export(args.size, args.export)


if __name__ == "__main__":
    main()
