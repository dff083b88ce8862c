"""Train the mini pair's shared `AutoencoderKLWan` on the procedural world, on a CPU.

Two stages. `frames`: single frames, where a causal 3-D convolution sees only its last temporal tap,
so that tap alone is computed (a third of the work). `clips`: 17-frame clips, starting from the
frame model *inflated*: past taps zeroed, the temporal resamplers set to copy, so that the first
clip step already decodes every frame.

    python -m training.train_vae --stage frames --steps 3000
    python -m training.train_vae --stage clips --steps 1500
    python -m training.train_vae --export nexus_rt/mini/vae
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from training.common import (
    RUNS,
    Log,
    Muon,
    cosine,
    load_checkpoint,
    object_pixels,
    psnr,
    render_batch,
    save_checkpoint,
    set_lr,
)

CONFIG = dict(base_dim=8, z_dim=16, num_res_blocks=1)
LATENT_NOISE = (
    0.10  # relative to the latents' own spread: the decoder must forgive a generator's small errors
)


def build() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(**CONFIG)
    for p in vae.parameters():  # oneDNN's convolutions are twice as fast in this layout
        if p.dim() == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
        elif p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    return vae


def last_tap_only() -> None:
    """Make a causal convolution over a single frame a 2-D one: the taps it drops multiply zero
    padding."""
    whole = WanCausalConv3d.forward

    def forward(self, x, cache_x=None):
        if (
            cache_x is None
            and x.shape[2] == 1
            and self.kernel_size[0] == 3
            and self._padding[4] == 2
        ):
            weight = self.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
            return F.conv2d(
                x[:, :, 0], weight, self.bias, padding=(self._padding[2], self._padding[0])
            ).unsqueeze(2)
        return whole(self, x, cache_x)

    WanCausalConv3d.forward = forward


@torch.no_grad()
def inflate(vae: AutoencoderKLWan) -> None:
    """Turn a model of single frames into one of clips that starts from copying frames."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :2] = 0
    for half in (vae.encoder, vae.decoder):
        for name, module in half.named_modules():
            if name.endswith("time_conv"):
                out, inner = module.weight.shape[:2]
                module.weight.zero_()
                module.bias.zero_()
                module.weight[:, :, -1, 0, 0] = torch.eye(inner).repeat(out // inner, 1)


def foreground_weight(x: torch.Tensor) -> torch.Tensor:
    """Weights of mean about 1 that count a shape's pixels several times: most of a frame is plain
    background."""
    weight = 1 + 5 * object_pixels(x)
    return weight / weight.float().mean()


class Autoencoder(torch.nn.Module):
    """One training step's forward: clip in, reconstruction and latents out."""

    def __init__(self, vae: AutoencoderKLWan, single: bool) -> None:
        super().__init__()
        self.vae, self.single = vae, single

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vae = self.vae
        if self.single:
            mean = vae.quant_conv(vae.encoder(x))[:, : CONFIG["z_dim"]]
        else:
            mean = vae._encode(x)[:, : CONFIG["z_dim"]]
        z = mean + LATENT_NOISE * mean.detach().std((0, 2, 3, 4), keepdim=True) * noise
        if self.single:
            return vae.decoder(vae.post_quant_conv(z)), mean
        vae.clear_cache()
        z = vae.post_quant_conv(z)
        chunks = []
        # the loop of AutoencoderKLWan._decode, without its clamp (which stops gradients)
        for i in range(z.shape[2]):
            vae._conv_idx = [0]
            chunks.append(
                vae.decoder(z[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx)
            )
        return torch.cat(chunks, 2), mean


def train(stage: str, steps: int, batch: int, lr: float, seed: int, compile_: bool) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    single = stage == "frames"
    path, log = RUNS / "vae" / f"{stage}.pt", Log(RUNS / "vae" / f"{stage}.jsonl")
    vae = build()
    optimizer = Muon(vae.parameters(), lr=lr)
    start, state = 0, load_checkpoint(path)
    if state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    elif not single:
        frames = load_checkpoint(RUNS / "vae" / "frames.pt")
        if frames is None:
            raise SystemExit(
                "no frame model: run `python -m training.train_vae --stage frames` first"
            )
        vae.load_state_dict(frames["model"])
        inflate(vae)
    if single:
        last_tap_only()
    step_fn = Autoencoder(vae, single)
    # a clip's graph, ten times larger, takes longer to compile than it saves
    if compile_ and single:
        step_fn = torch.compile(step_fn)
    recent: list[tuple[float, float]] = []
    frames, shape = (1, (batch, 16, 1, 8, 8)) if single else (17, (batch, 16, 5, 8, 8))
    for step in range(start, steps):
        set_lr(optimizer, cosine(step, steps, lr, lr / 30, warmup=200 if single else 30))
        x = render_batch(rng, batch, frames).contiguous(memory_format=torch.channels_last_3d)
        y, mean = step_fn(x, torch.randn(shape))
        error, weight = y - x, foreground_weight(x)
        loss = (weight * (error.abs() + error.square())).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        recent.append((loss.item(), psnr(y.detach(), x)))
        if (step + 1) % 25 == 0:
            loss_, psnr_ = np.mean(recent[-25:], 0).tolist()
            log(stage=stage, step=step + 1, loss=loss_, psnr=psnr_, std=mean.std().item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_checkpoint(
                path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1
            )


@torch.no_grad()
def export(folder: Path, seed: int = 7) -> None:
    """Write the trained VAE with its latents' measured mean and standard deviation, in bfloat16."""
    vae = build()
    vae.load_state_dict(load_checkpoint(RUNS / "vae" / "clips.pt")["model"])
    z_dim = CONFIG["z_dim"]
    vae.quant_conv.weight[z_dim:] = 0  # the log-variance is not trained: a constant, small one
    vae.quant_conv.bias[z_dim:] = -8.0
    vae = vae.to(torch.bfloat16).to(torch.float32)
    rng = np.random.default_rng(seed)
    sample = torch.cat([vae._encode(render_batch(rng, 8, 17))[:, :z_dim] for _ in range(16)])
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in sample.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(v, 4) for v in sample.std((0, 2, 3, 4)).tolist()],
    )
    x = render_batch(rng, 16, 17, training=False)
    y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    print(f"reconstruction {psnr(y, x):.2f} dB over 16 clips")
    vae.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("frames", "clips"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    if args.stage:
        single = args.stage == "frames"
        train(
            args.stage,
            args.steps,
            args.batch or (16 if single else 2),
            args.lr or (7e-3 if single else 2e-3),
            args.seed,
            args.compile,
        )
    if args.export:
        export(args.export)


if __name__ == "__main__":
    main()
