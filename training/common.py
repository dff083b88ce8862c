"""What every training script shares: the run folder, checkpoints that resume, the learning rate,
the log."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from nexus_rt.bench.shapes import world

# five Newton-Schulz steps forgive bfloat16, and processors that multiply in it do so two to three
# times faster
NEWTON_SCHULZ = (
    torch.bfloat16 if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)() else torch.float32
)
# ignored by git
RUNS = Path(os.environ.get("NEXUS_RT_RUNS", Path(__file__).resolve().parent / "runs"))


def cosine(step: int, steps: int, peak: float, final: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then a cosine from `peak` to `final`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


class Schedule:
    """How far a run is, from 0 to 1: by steps, or by the minutes it may take (its own only,
    whatever it shares)."""

    def __init__(self, steps: int | None, minutes: float | None, spent: float = 0.0) -> None:
        if (steps is None) == (minutes is None):
            raise SystemExit("say how long to train: either --steps or --minutes")
        self.steps, self.minutes, self.before, self.start = steps, minutes, spent, time.time()

    @property
    def spent(self) -> float:
        """Seconds of training so far, those before a restart included."""
        return self.before + time.time() - self.start

    def progress(self, step: int) -> float:
        return min(1.0, step / self.steps if self.steps else self.spent / (60 * self.minutes))

    def lr(self, step: int, peak: float, final: float, warmup: int = 100) -> float:
        """Linear warm-up over steps, then a cosine from `peak` to `final`."""
        return cosine(round(1e4 * self.progress(step)), 10000, peak, final, warmup=0) * min(
            1.0, (step + 1) / warmup
        )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Newton-Schulz) for weights of two or more
    dimensions, AdamW for the rest.

    K. Jordan's Muon: every direction of a weight moves equally far, which here learns colours and
    edges several times sooner than AdamW does, and has no spikes where a normalisation meets a flat
    background. `lr` is for the matrices; the rest learn at `lr * adam_ratio`. `adam` names
    parameters (by identity) that AdamW takes though they are matrices.
    """

    def __init__(
        self,
        parameters,
        lr: float,
        adam_ratio: float = 0.1,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adam: set[int] = frozenset(),
    ) -> None:
        super().__init__(
            parameters,
            dict(lr=lr, adam_ratio=adam_ratio, momentum=momentum, weight_decay=weight_decay),
        )
        self.adam = adam

    @staticmethod
    def orthogonalise(g: torch.Tensor) -> torch.Tensor:
        x = (g / (g.norm() + 1e-7)).to(NEWTON_SCHULZ)
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.T if tall else x).to(g.dtype)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, mu = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad
                if not state:
                    state["step"], state["m"], state["v"] = (
                        0,
                        torch.zeros_like(p),
                        torch.zeros_like(p),
                    )
                state["step"] += 1
                m = state["m"]
                if p.ndim >= 2 and min(p.flatten(1).shape) > 1 and id(p) not in self.adam:
                    m.lerp_(g, 1 - mu)
                    update = self.orthogonalise(torch.lerp(g, m, mu).reshape(p.shape[0], -1)).view(
                        p.shape
                    )
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-lr * max(1.0, p.shape[0] / p[0].numel()) ** 0.5)
                else:
                    m.lerp_(g, 0.1)
                    state["v"].lerp_(g * g, 0.02)
                    bias = (1 - 0.98 ** state["step"]) ** 0.5 / (1 - 0.9 ** state["step"])
                    p.addcdiv_(m, state["v"].sqrt() + 1e-8, value=-lr * group["adam_ratio"] * bias)


def save_checkpoint(path: Path, **state: object) -> None:
    """Write a checkpoint so that an interruption leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path: Path) -> dict | None:
    return torch.load(path, weights_only=True) if path.exists() else None


class Log:
    """Prints a line and appends it as JSON to the run folder."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.start = path, time.time()

    def __call__(self, **fields: object) -> None:
        fields = {k: round(v, 6) if isinstance(v, float) else v for k, v in fields.items()}
        fields["seconds"] = round(time.time() - self.start, 1)
        print(" ".join(f"{k}={v}" for k, v in fields.items()), flush=True)
        with self.path.open("a") as f:
            f.write(json.dumps(fields) + "\n")


def render_batch(
    rng: np.random.Generator, count: int, frames: int, training: bool = True
) -> torch.Tensor:
    """Random scenes as one tensor [B, 3, T, H, W] in [-1, 1]."""
    clips = [world.render(world.sample_scene(rng, training), rng, frames) for _ in range(count)]
    return torch.from_numpy(np.stack(clips)).transpose(1, 2)


def object_pixels(x: torch.Tensor) -> torch.Tensor:
    """Which pixels [B, 1, T, H, W] of clips [B, 3, T, H, W] are not background, which is constant
    along a row."""
    return (x - x.median(-1, keepdim=True).values).abs().amax(1, keepdim=True) > 0.06


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """PSNR in dB of images in [-1, 1]."""
    mse = ((a.clamp(-1, 1) - b) ** 2).mean()
    return float(10 * torch.log10(4 / mse))
