"""Distil the large mini generator to three steps without guidance, as a LoRA.

The teacher is the large generator itself, guided, on a fine clock: from where the small generator
hands over it walks twelve steps. The student learns to be, after each third of them, where the
teacher is: one Euler step for four guided ones. It starts from the teacher's latents or from its
own, half and half, so that it mends what it did. Only trajectories that end in a clip which the
checker reads right are learned from.

    python -m training.distil --collect 2400
    python -m training.distil --minutes 75 --export nexus_rt/mini/loras/few_step.safetensors

What is trained: a low-rank product beside every matrix of the blocks, and their biases, norms and
modulation tables as they are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nexus_rt import NexusPipeline
from nexus_rt.bench.shapes import world
from nexus_rt.bench.shapes.checker import look
from nexus_rt.loading.layouts import fused_parts
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.models.layers import Linear
from nexus_rt.models.wan import WanTransformer
from nexus_rt.pipeline.recipes import METADATA
from training.common import RUNS, Log, Schedule, load_checkpoint, save_checkpoint, set_lr
from training.train_dit import MINI, pad_context
from training.train_lm import sample_prompt

SEAMS = ("small:4/10", "small:4/9", "small:4/8")  # where the small generator may hand over
STEPS, FINE, GUIDANCE = 3, 12, 3.0
PLAN = "small:4/8 large:3"  # of the recipe in the LoRA's header
RANK = 32
FOLDER = RUNS / "distil"


@torch.no_grad()
def collect(count: int, seed: int, batch: int = 24) -> None:
    """Teacher's trajectories: latents at the seam and after every `FINE / STEPS` steps, sigmas
    there, and what the large generator was told."""
    pipe = NexusPipeline.from_pretrained(MINI)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng([seed, 11])
    kept: list[dict[str, Tensor]] = []
    seen = 0
    while sum(len(k["states"]) for k in kept) < count:
        prompts = [sample_prompt(rng) for _ in range(batch)]
        texts = [p.text for p in prompts]
        told = pipe.encode_prompt(pipe.rewrite(texts, "auto").texts)[0]
        seam = SEAMS[len(kept) % len(SEAMS)]
        plan = pipe.make_plan(f"{seam} large:{FINE}@{GUIDANCE:g}")
        first = len(plan) - FINE
        states: list[Tensor] = []

        def keep(pipe, index, timestep, tensors, states=states, first=first):
            if index >= first - 1 and (index - first + 1) % (FINE // STEPS) == 0:
                states.append(tensors["latents"].clone())

        noise = [torch.Generator().manual_seed(seed * 10**6 + seen + i) for i in range(batch)]
        clips = pipe(
            texts,
            prompt_embeds_2=None,
            rewrite="auto",
            plan=plan,
            generator=noise,
            callback_on_step_end=keep,
        ).frames
        right = [
            all(look(c).matches(p.scene)) and not world.held_out(p.scene)
            for c, p in zip(clips, prompts, strict=True)
        ]
        pick = torch.tensor(right).nonzero().flatten()
        edges = [*range(first, len(plan) + 1, FINE // STEPS)]
        length = int((told != 0).any(-1).sum(-1).max()) + 1
        kept.append(
            {
                "states": torch.stack(states, 1)[pick].half(),  # [n, STEPS + 1, C, T, H, W]
                "sigmas": torch.tensor([plan.grid.sigmas[e] for e in edges]).expand(len(pick), -1),
                "context": torch.nn.functional.pad(
                    told[pick, :length], (0, 0, 0, max(0, 32 - length))
                )[:, :32],
            }
        )
        seen += batch
        done = sum(len(k["states"]) for k in kept)
        print(f"{done} of {count} kept, {seen} drawn", flush=True)
    save_checkpoint(
        FOLDER / "trajectories.pt", **{k: torch.cat([one[k] for one in kept]) for k in kept[0]}
    )


class LowRank(nn.Module):
    """A weight plus a product of rank `RANK`, zero at the start."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def student(folder: Path) -> tuple[WanTransformer, dict[str, LowRank], dict[str, nn.Parameter]]:
    """The large generator with what is trained: products by parameter, and plain parameters."""
    model = load_transformer(folder, torch.float32).requires_grad_(False)
    products, plain = {}, {}
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and name.startswith("blocks."):
            product = LowRank(module.weight)
            parametrize.register_parametrization(module, "weight", product)
            products[f"{name}.weight"] = product
    for name, parameter in model.named_parameters():
        if "parametrizations" not in name and (parameter.ndim == 1 or "table" in name):
            plain[name] = parameter.requires_grad_(True)
    return model, products, plain


def shape_weight(clean: Tensor) -> Tensor:
    """Weights [N, 1, T, H, W] of mean 1 that count the shape's latent cells, which are not as their
    row, three times."""
    differs = (clean - clean.median(-1, keepdim=True).values).abs().mean(1, keepdim=True)
    weight = 1 + 2 * (differs > differs.mean((2, 3, 4), keepdim=True)).float()
    return weight / weight.mean((2, 3, 4), keepdim=True)


def train(schedule: tuple[int | None, float | None], batch: int, lr: float) -> None:
    """Regress the student's Euler steps on the teacher's positions."""
    torch.manual_seed(0)
    data = load_checkpoint(FOLDER / "trajectories.pt")
    if data is None:
        raise SystemExit("no trajectories: run `python -m training.distil --collect 2400` first")
    model, products, plain = student(MINI / "large")
    trained = [*(p for m in products.values() for p in m.parameters()), *plain.values()]
    groups = [
        {"params": [p for m in products.values() for p in m.parameters()], "ratio": 1.0},
        {"params": list(plain.values()), "ratio": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    path, log = FOLDER / "student.pt", Log(FOLDER / "student.jsonl")
    step, spent, state = 0, 0.0, load_checkpoint(path)
    if state:
        for p, value in zip(trained, state["trained"], strict=True):
            p.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    ema = [p.detach().clone() for p in trained] if not state else state["ema"]
    generator = torch.Generator().manual_seed(step)
    clock, running = Schedule(*schedule, spent), None
    while clock.progress(step) < 1:
        now = clock.lr(step, lr, lr / 50)
        set_lr(optimizer, now)
        for group in optimizer.param_groups:
            group["lr"] = now * group["ratio"]
        pick = torch.randint(len(data["states"]), (batch,), generator=generator)
        states, sigmas = data["states"][pick].float(), data["sigmas"][pick]
        # padded as at inference: the padding counts in the attention
        context = model.prepare_context(pad_context(data["context"][pick].float()))
        weight = shape_weight(states[:, -1])
        own = torch.rand(batch, generator=generator) < 0.5
        x, total = states[:, 0], 0.0
        optimizer.zero_grad(set_to_none=True)
        for k in range(STEPS):
            gap = (sigmas[:, k] - sigmas[:, k + 1]).view(-1, 1, 1, 1, 1)
            velocity = model(x, torch.trunc(1000 * sigmas[:, k]), context)
            wanted = (x - states[:, k + 1]) / gap
            loss = (weight * ((velocity - wanted) * gap * (k + 1)).square()).mean() * 10
            loss.backward(retain_graph=k + 1 < STEPS)
            total += loss.item()
            x = torch.where(
                own.view(-1, 1, 1, 1, 1), (x - gap * velocity).detach(), states[:, k + 1]
            )
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for mean, p in zip(ema, trained, strict=True):
                mean.lerp_(p, 1 - decay)
        running = total if running is None else 0.98 * running + 0.02 * total
        step += 1
        if step % 50 == 0:
            log(step=step, loss=running, progress=clock.progress(step))
        if step % 200 == 0 or clock.progress(step) >= 1:
            save_checkpoint(
                path,
                trained=[p.detach() for p in trained],
                ema=ema,
                optimizer=optimizer.state_dict(),
                step=step,
                spent=clock.spent,
            )


@torch.no_grad()
def export(file: Path) -> None:
    """Write the averaged student as a LoRA in diffusers' names, with its recipe in the header."""
    state = load_checkpoint(FOLDER / "student.pt")
    _, products, plain = student(MINI / "large")
    before = {n: p.detach().clone() for n, p in plain.items()}
    trained = [*(p for m in products.values() for p in m.parameters()), *plain.values()]
    for p, value in zip(trained, state["ema"], strict=True):
        p.data.copy_(value)
    out: dict[str, Tensor] = {}
    half = lambda t: t.to(torch.bfloat16).contiguous().clone()
    for name, product in products.items():
        parts = fused_parts(name)
        for theirs, up in zip(parts, product.up.chunk(len(parts)), strict=True):
            module = "transformer." + theirs.removesuffix(".weight")
            out[f"{module}.lora_A.weight"] = half(product.down)
            out[f"{module}.lora_B.weight"] = half(up)
    for name, p in plain.items():
        parts = fused_parts(name)
        for theirs, change in zip(parts, (p - before[name]).chunk(len(parts)), strict=True):
            module, _, leaf = theirs.rpartition(".")
            key = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}.get(
                leaf, f"{module or 'head'}.diff_m"
            )
            out[f"transformer.{key}"] = half(change)
    recipe = {"plan": PLAN, "guidance_scale": 1.0, "solver": "euler"}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, file, metadata={"format": "pt", METADATA: json.dumps(recipe)})
    print(f"{file}: step {state['step']}, {file.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", type=int, metavar="CLIPS")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    if args.collect:
        collect(args.collect, args.seed)
    if args.steps or args.minutes:
        train((args.steps, args.minutes), args.batch, args.lr)
    if args.export:
        export(args.export)


if __name__ == "__main__":
    main()
