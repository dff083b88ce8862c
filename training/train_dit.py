"""Train one of the mini pair's Wan DiTs by flow matching on the procedural world's latents.

    python -m training.train_dit --size large --encode 6000       # once: clips -> latents
    python -m training.train_dit --size small --steps 4000
    python -m training.train_dit --size large --steps 6000
    python -m training.train_dit --size small --export nexus_rt/mini/small

x_sigma = (1 - sigma) x_0 + sigma eps, target velocity eps - x_0, timestep 1000 sigma: Wan's
convention. One caption in ten is empty, for classifier-free guidance. The exported weights are an
exponential moving average.
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

from nexus_rt.bench.shapes import world
from nexus_rt.loading.convert_parts import transformer_config
from nexus_rt.loading.layouts import to_diffusers
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.models.wan import WanTransformer
from nexus_rt.models.wan_config import WanConfig
from training.common import (
    RUNS,
    Log,
    Muon,
    Schedule,
    load_checkpoint,
    object_pixels,
    save_checkpoint,
    set_lr,
)
from training.train_text import fillers, tokenize

MINI = Path(__file__).resolve().parent.parent / "nexus_rt" / "mini"
CONTEXT = 512  # Wan pads the prompt to 512 tokens with zeros and attends to them
SIZES = {
    "small": dict(num_attention_heads=4, attention_head_dim=32, ffn_dim=384, num_layers=4),
    "large": dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=704, num_layers=5),
}
# lr of the blocks' matrices, by Muon
TRAIN = {
    "small": dict(lr=1.2e-2, batch=24),
    "large": dict(lr=1.2e-2, batch=24),
}
EMPTY = 0.1  # share of captions dropped
SHIFT = 2.0  # training noise leans to the high end, where meaning and motion are decided


def config(size: str) -> WanConfig:
    return WanConfig(text_dim=128, freq_dim=128, **SIZES[size])


def covered(x: torch.Tensor) -> torch.Tensor:
    """Which latent cells [B, 5, 8, 8] of clips [B, 3, 17, 64, 64] the shape touches."""
    mask = F.max_pool2d(object_pixels(x).squeeze(1).float(), 8)  # [B, 17, 8, 8]
    return torch.stack(
        [mask[:, :1].amax(1)] + [mask[:, 1 + 4 * i : 5 + 4 * i].amax(1) for i in range(4)], 1
    )


@torch.no_grad()
def encode(size: str, count: int, seed: int, vae_folder: Path) -> None:
    """Render `count` clips and keep their normalised latents [count, 16, 5, 8, 8] with each clip's
    scene.

    Rough pictures for the small generator, fine ones for the large: the same scenes at the same
    seed.
    """
    rng = np.random.default_rng(seed)
    vae = AutoencoderKLWan.from_pretrained(vae_folder, torch_dtype=torch.float32)
    for p in vae.parameters():
        if p.dim() == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    order, latents, scenes, masks = {s: i for i, s in enumerate(world.all_scenes())}, [], [], []
    for start in range(0, count, 16):
        chosen = [world.sample_scene(rng) for _ in range(min(16, count - start))]
        x = torch.from_numpy(
            np.stack([world.render(s, rng, rough=size == "small") for s in chosen])
        ).transpose(1, 2)
        z = vae.encode(x.contiguous(memory_format=torch.channels_last_3d)).latent_dist.mode()
        latents.append(((z - mean) / std).half())
        masks.append(covered(x).bool())
        scenes += [order[s] for s in chosen]
        if (start // 16) % 50 == 0:
            print(f"encoded {start + len(chosen)} of {count}", flush=True)
    data = dict(latents=torch.cat(latents), scenes=torch.tensor(scenes), masks=torch.cat(masks))
    save_checkpoint(RUNS / "dit" / f"latents-{size}.pt", **data)


class Captions:
    """Embeddings of captions by the pair's UMT5, zero after each one's last token."""

    def __init__(self, pair: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(pair / "tokenizer")
        self.encoder = UMT5EncoderModel.from_pretrained(
            pair / "text_encoder", dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """[N, L, D], L that of the longest."""
        ids, mask = tokenize(self.tokenizer, texts)
        return self.encoder(ids, mask).last_hidden_state * mask[..., None]


def pad_context(context: torch.Tensor, length: int = CONTEXT) -> torch.Tensor:
    return F.pad(context, (0, 0, 0, length - context.shape[1]))


class Clips:
    """The encoded clips: batches of latents, the scene of each, and the weight of each latent
    cell."""

    def __init__(self, size: str, generator: torch.Generator) -> None:
        data = load_checkpoint(RUNS / "dit" / f"latents-{size}.pt")
        if data is None:
            raise SystemExit(
                f"no latents: run `python -m training.train_dit --size {size} --encode 6000` first"
            )
        self.latents, self.rows, self.masks, self.generator = (
            data["latents"],
            data["scenes"],
            data["masks"],
            generator,
        )
        self.scenes = world.all_scenes()

    def batch(self, count: int) -> tuple[torch.Tensor, list[world.Scene], torch.Tensor]:
        """Latents [N, 16, 5, 8, 8], scenes, and weights [N, 1, 5, 8, 8] of mean 1 that favour the
        shape's cells."""
        pick = torch.randint(len(self.latents), (count,), generator=self.generator)
        weight = 1 + 2 * self.masks[pick].float().unsqueeze(1)
        return (
            self.latents[pick].float(),
            [self.scenes[i] for i in self.rows[pick]],
            weight / weight.mean(),
        )


def flow_loss(
    model: WanTransformer, x0, weight, context, generator: torch.Generator
) -> torch.Tensor:
    """Flow matching at random noise levels: mean weighted squared error of the velocity."""
    u = torch.rand(len(x0), generator=generator)
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn(x0.shape, generator=generator)
    x = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1, 1))
    velocity = model(x, 1000 * sigma, model.prepare_context(context))
    return (weight * (velocity - (noise - x0)).square()).mean()


def dit_optimizer(model: WanTransformer, lr: float) -> Muon:
    """Muon for the blocks' matrices, AdamW for the embeddings and the head."""
    edges = {id(p) for name, p in model.named_parameters() if not name.startswith("blocks.")}
    return Muon(model.parameters(), lr=lr, adam_ratio=0.07, weight_decay=0.01, adam=edges)


@torch.no_grad()
def average(ema: dict[str, torch.Tensor], state: dict[str, torch.Tensor], step: int) -> None:
    """Move the exponential moving average of the weights one step."""
    decay = min(0.998, (step + 1) / (step + 20))
    for key, value in state.items():
        ema[key].lerp_(value, 1 - decay)


def train(
    size: str, schedule: tuple[int | None, float | None], seed: int, pair: Path, init: Path | None
) -> None:
    torch.manual_seed(seed)
    settings = TRAIN[size]
    path, log = RUNS / "dit" / f"{size}.pt", Log(RUNS / "dit" / f"{size}.jsonl")
    model = WanTransformer(config(size))
    for block in model.blocks:  # start each block near the identity: its gates open during training
        block.scale_shift_table.data[:, [2, 5]] *= 0.1
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    if init:
        model.load_state_dict(load_transformer(init, torch.float32).state_dict())
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = dit_optimizer(model, settings["lr"])
    start, spent, state = 0, 0.0, load_checkpoint(path)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema, start, spent = state["ema"], state["step"], state["spent"]
    generator = torch.Generator().manual_seed(seed + start)
    rng = np.random.default_rng([seed, start])
    clips, embed, extra = Clips(size, generator), Captions(pair), fillers()
    print(
        f"{size}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, from step"
        f" {start}",
        flush=True,
    )
    clock, step, running = Schedule(*schedule, spent), start, None
    while clock.progress(step) < 1:
        set_lr(optimizer, clock.lr(step, settings["lr"], settings["lr"] / 50))
        x0, scenes, weight = clips.batch(settings["batch"])
        loss = flow_loss(
            model,
            x0,
            weight,
            pad_context(embed([training_caption(s, rng, extra) for s in scenes])),
            generator,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average(ema, model.state_dict(), step)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            log(size=size, step=step, loss=running, progress=clock.progress(step))
        if step % 250 == 0 or clock.progress(step) >= 1:
            save_checkpoint(
                path,
                model=model.state_dict(),
                ema=ema,
                optimizer=optimizer.state_dict(),
                step=step,
                spent=clock.spent,
            )


def training_caption(scene: world.Scene, rng: np.random.Generator, extra: tuple[str, ...]) -> str:
    """None in one of ten, whole in half, loose in the rest."""
    u = rng.random()
    if u < EMPTY:
        return ""
    return world.caption(scene, rng) if u < 0.6 else world.loose_caption(scene, rng, extra)[0]


def export(size: str, folder: Path, weights: dict[str, torch.Tensor], step: int) -> None:
    """Write averaged weights as a diffusers folder in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.to(torch.bfloat16).contiguous().clone() for k, v in to_diffusers(weights).items()
    }
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    fields = transformer_config(config(size))
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    print(f"{folder}: step {step}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--encode", type=int, metavar="CLIPS", help="render and encode clips for this size"
    )
    parser.add_argument("--vae", type=Path, default=MINI / "vae")
    parser.add_argument(
        "--pair", type=Path, default=MINI, help="the folder whose text encoder reads the captions"
    )
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--minutes",
        type=float,
        help="instead of steps: how long; the learning rate follows the clock",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init", type=Path, help="start from this transformer folder, where there is no checkpoint"
    )
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    if args.encode:
        encode(args.size, args.encode, args.seed, args.vae)
    elif args.steps or args.minutes:
        train(args.size, (args.steps, args.minutes), args.seed, args.pair, args.init)
    if args.export:
        state = load_checkpoint(RUNS / "dit" / f"{args.size}.pt")
        export(args.size, args.export, state["ema"], state["step"])


if __name__ == "__main__":
    main()
