"""Stage 1: align the connector and the small generator with the understanding model, which stays
frozen.

First the connector alone: its tokens for a riddle learn to be the text encoder's states of the
plain caption the riddle means (minutes; no generator runs). Then both, by flow matching on the
small generator's clips: what it is told is the packed context of a riddle or a plain caption, as at
inference. Held-out triples of kinds are never seen.

    python -m training.train_align --connector-steps 800 --steps 12000 --init nexus_rt/mini/small
    python -m training.train_align --export nexus_rt/mini
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer

from nexus_rt.bench.shapes import world
from nexus_rt.components.context import unpad
from nexus_rt.loading.connector import save_connector
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.models.connector import SPECIAL_TOKENS, Connector, ConnectorConfig
from nexus_rt.models.template import Template
from nexus_rt.models.wan import WanTransformer
from training.common import (
    RUNS,
    Log,
    Muon,
    Schedule,
    cosine,
    load_checkpoint,
    save_checkpoint,
    set_lr,
)
from training.train_dit import (
    EMPTY,
    MINI,
    Captions,
    Clips,
    average,
    config,
    dit_optimizer,
    export,
    flow_loss,
)
from training.train_lm import CHAT, IMAGE, VIDEO, sample_prompt, tokenize

TEMPLATE = Template(VIDEO, IMAGE, chat=CHAT.partition(" {answer}")[0])
CONFIG = ConnectorConfig(
    llm_hidden_size=128,
    vision_dim=128,
    vision_queries=4,
    text_dim=128,
    adapter_queries=4,
    num_layers=1,
    num_heads=4,
    template=TEMPLATE,
)
LR, CONNECTOR_LR, BATCH = 1.2e-2, 6e-3, 24
PLAIN = 0.2  # share of prompts that are plain captions


class Understanding:
    """The frozen language model: hidden states of prompts, padded to the longest."""

    def __init__(self, pair: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(pair / "understanding")
        self.model = AutoModel.from_pretrained(pair / "understanding", dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States [N, L, D], and True [N, L] where a row is padding."""
        ids, mask = tokenize(self.tokenizer, [TEMPLATE.render(p) for p in prompts])
        return self.model(ids, mask).last_hidden_state, ~mask.bool()


def build_connector() -> tuple[Connector, nn.ParameterDict]:
    """The connector, and its special tokens as parameters: learned with the rest, carried by the
    checkpoint."""
    connector = Connector(CONFIG)
    markers = nn.ParameterDict(
        {name: nn.Parameter(torch.randn(1, CONFIG.text_dim) * 0.5) for name in SPECIAL_TOKENS}
    )
    connector.special_tokens = dict(markers.items())
    return connector, markers


def batch_prompts(scenes: list[world.Scene], rng: np.random.Generator) -> list[str]:
    """For each scene a riddle, a plain caption or nothing."""
    prompts = []
    for scene in scenes:
        u = rng.random()
        plain = u < EMPTY + PLAIN
        text = (
            ""
            if u < EMPTY
            else world.caption(scene, rng)
            if plain
            else sample_prompt(rng, scene).text
        )
        prompts.append(text)
    return prompts


def contexts(
    connector: Connector, understand: Understanding, embed: Captions, prompts: list[str]
) -> torch.Tensor:
    """Packed contexts [N, 2560, 128]."""
    hidden, padding = understand(prompts)
    adapter = connector(hidden, padding=padding)
    return torch.stack(
        [connector.pack(unpad(t), a) for t, a in zip(embed(prompts), adapter, strict=True)]
    )


def imitate(
    connector: Connector, understand: Understanding, embed: Captions, steps: int, seed: int
) -> None:
    """Teach the connector to say what the plain caption's embedding says."""
    rng = np.random.default_rng([seed, 1])
    optimizer, log = (
        Muon(connector.parameters(), lr=1e-2, adam_ratio=0.1),
        Log(RUNS / "align" / "connector.jsonl"),
    )
    count = CONFIG.vision_queries * CONFIG.adapter_queries
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, 1e-2, 3e-4))
        prompts = [sample_prompt(rng) for _ in range(48)]
        wanted = [unpad(e) for e in embed([world.caption(r.scene) for r in prompts])]
        # a short caption begins again
        wanted = torch.stack([w[torch.arange(count) % len(w)] for w in wanted])
        hidden, padding = understand([r.text for r in prompts])
        loss = F.mse_loss(connector(hidden, padding=padding), wanted) / wanted.var()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(connector.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            log(stage="connector", step=step + 1, loss=loss.item())


def train(
    schedule: tuple[int | None, float | None],
    connector_steps: int,
    seed: int,
    pair: Path,
    init: Path,
) -> None:
    torch.manual_seed(seed)
    path, log = RUNS / "align" / "small.pt", Log(RUNS / "align" / "small.jsonl")
    understand, embed, (connector, markers) = Understanding(pair), Captions(pair), build_connector()
    model = WanTransformer(config("small"))
    model.load_state_dict(load_transformer(init, torch.float32).state_dict())
    both = nn.ModuleDict({"model": model, "connector": connector, "markers": markers})
    state = load_checkpoint(path)
    if state is None:
        imitate(connector, understand, embed, connector_steps, seed)
    ema = {k: v.detach().clone() for k, v in both.state_dict().items()}
    optimizers = [
        dit_optimizer(model, LR),
        Muon([*connector.parameters(), *markers.parameters()], lr=CONNECTOR_LR, adam_ratio=0.1),
    ]
    step, spent = 0, 0.0
    if state:
        both.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        ema, step, spent = state["ema"], state["step"], state["spent"]
    generator = torch.Generator().manual_seed(seed + step)
    rng, clips, clock, running = (
        np.random.default_rng([seed, 2, step]),
        Clips("small", generator),
        Schedule(*schedule, spent),
        None,
    )
    while clock.progress(step) < 1:
        for optimizer, lr in zip(optimizers, (LR, CONNECTOR_LR), strict=True):
            set_lr(optimizer, clock.lr(step, lr, lr / 50))
            optimizer.zero_grad(set_to_none=True)
        x0, scenes, weight = clips.batch(BATCH)
        loss = flow_loss(
            model,
            x0,
            weight,
            contexts(connector, understand, embed, batch_prompts(scenes, rng)),
            generator,
        )
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average(ema, both.state_dict(), step)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            log(stage="align", step=step, loss=running, progress=clock.progress(step))
        if step % 250 == 0 or clock.progress(step) >= 1:
            save_checkpoint(
                path,
                model=both.state_dict(),
                ema=ema,
                optimizers=[o.state_dict() for o in optimizers],
                step=step,
                spent=clock.spent,
            )


def export_pair(folder: Path, pair: Path) -> None:
    """Write `small/` and `connector/` from the averaged weights."""
    state = load_checkpoint(RUNS / "align" / "small.pt")
    part = lambda name: {
        k.removeprefix(name + "."): v for k, v in state["ema"].items() if k.startswith(name + ".")
    }
    export("small", folder / "small", part("model"), state["step"])
    connector = Connector(CONFIG)
    connector.load_state_dict(part("connector"))
    connector.special_tokens = part("markers")
    connector.unconditional_text = unpad(Captions(pair)([""])[0])
    connector.unconditional_hidden = Understanding(pair)([""])[0][0]
    save_connector(connector, folder / "connector")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--minutes",
        type=float,
        help="instead of steps: how long; the learning rate follows the clock",
    )
    parser.add_argument("--connector-steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pair", type=Path, default=MINI, help="the folder with text_encoder/ and understanding/"
    )
    parser.add_argument(
        "--init", type=Path, default=MINI / "small", help="the small generator to align"
    )
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    if args.steps or args.minutes:
        train((args.steps, args.minutes), args.connector_steps, args.seed, args.pair, args.init)
    if args.export:
        export_pair(args.export, args.pair)


if __name__ == "__main__":
    main()
