"""Train the mini pair's understanding model: a tiny causal language model that works riddles out.

Half of every batch is conversation: the user's riddle, answered by the plain caption it means,
learned by next-token prediction. The other half ends in `[GEN_VID]`, as generation asks; there,
linear classifiers read the five fields of the scene off the state, so that the meaning stands where
the connector will look for it. The classifiers are thrown away. Held-out triples of kinds are never
seen.

    python -m training.train_lm --steps 2500 --export nexus_rt/mini
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nexus_rt.bench.shapes import riddles, world
from training.common import RUNS, Log, Muon, Schedule, load_checkpoint, save_checkpoint, set_lr
from training.train_text import FIELDS, LETTERS, WORDS

SPECIAL = (
    "<pad>",
    "<unk>",
    "<|user|>",
    "<|assistant|>",
    "<|end_of_text|>",
    "[GEN_VID]",
    "[GEN_IMG]",
)
VIDEO = "<|user|> Generate a video about: {prompt} <|assistant|> [GEN_VID] <|end_of_text|>"
IMAGE = "<|user|> Generate an image about: {prompt} <|assistant|> [GEN_IMG] <|end_of_text|>"
CHAT = "<|user|> {prompt} <|assistant|> {answer} <|end_of_text|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the grammar, single characters for all else; spaces are not kept."""
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(r"\s+", " ")])
    texts = [
        *riddles.words(),
        "Generate a video about : an image",
        *(w for v in FIELDS.values() for w in v),
    ]
    texts += [world.caption(s, np.random.default_rng(i)) for i, s in enumerate(world.all_scenes())]
    words = dict.fromkeys(
        word for t in texts for word, _ in WORDS.pre_tokenize_str(normalizer.normalize_str(t))
    )
    vocab = [(name, 0.0) for name in SPECIAL] + [(word, -8.0) for word in words]
    vocab += [(c, -20.0) for c in ["▁", *LETTERS] if c not in words]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=1))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, WORDS
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end_of_text|>",
        additional_special_tokens=list(SPECIAL[2:4] + SPECIAL[5:]),
        model_max_length=512,
    )


def sample_prompt(
    rng: np.random.Generator, scene: world.Scene | None = None, training: bool = True
) -> riddles.Riddle:
    """A riddle, or in a tenth of training a plain caption."""
    scene = scene or world.sample_scene(rng)
    if training and rng.random() < 0.1:
        return riddles.Riddle(world.caption(scene, rng), scene, ("plain",) * 3)
    return riddles.riddle(scene, riddles.sample_kinds(rng, training), rng)


def tokenize(tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer(texts, padding="longest", add_special_tokens=False, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def label(scenes: list[world.Scene]) -> torch.Tensor:
    return torch.tensor([[n.index(getattr(s, f)) for f, n in FIELDS.items()] for s in scenes])


@torch.no_grad()
def read(model, heads, tokenizer, prompts: list[riddles.Riddle]) -> np.ndarray:
    """Which fields [N, 5] the classifiers read right at the end of the prompts."""
    ids, mask = tokenize(tokenizer, [VIDEO.format(prompt=r.text) for r in prompts])
    states = model.model(ids, mask).last_hidden_state[torch.arange(len(ids)), mask.sum(1) - 2]
    return np.stack(
        [
            (h(states).argmax(-1) == y).numpy()
            for h, y in zip(heads, label([r.scene for r in prompts]).T, strict=True)
        ],
        1,
    )


def train(folder: Path, schedule: tuple[int | None, float | None], seed: int) -> None:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|end_of_text|>"),
    )
    model = LlamaForCausalLM(config)
    heads = nn.ModuleList([nn.Linear(config.hidden_size, len(names)) for names in FIELDS.values()])
    edges = {id(p) for m in (model.model.embed_tokens, heads) for p in m.parameters()}
    optimizer = Muon(
        [*model.parameters(), *heads.parameters()],
        lr=1.5e-2,
        adam_ratio=0.15,
        weight_decay=0.01,
        adam=edges,
    )
    path, log = RUNS / "lm" / "lm.pt", Log(RUNS / "lm" / "train.jsonl")
    step, spent, state = 0, 0.0, load_checkpoint(path)
    if state:
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    rng, clock = np.random.default_rng([seed, step]), Schedule(*schedule, spent)
    begin, pad = tokenizer.convert_tokens_to_ids("<|assistant|>"), tokenizer.pad_token_id
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)}"
        " tokens",
        flush=True,
    )
    while clock.progress(step) < 1:
        set_lr(optimizer, clock.lr(step, 1.5e-2, 2e-4))
        prompts = [sample_prompt(rng) for _ in range(48)]
        talk, ask = prompts[:24], prompts[24:]
        ids, mask = tokenize(
            tokenizer, [CHAT.format(prompt=r.text, answer=world.caption(r.scene)) for r in talk]
        )
        spoken = (ids == begin).cumsum(1).bool() & (ids != pad)
        logits = model(ids, mask).logits[:, :-1]
        target, said = ids[:, 1:], spoken[:, :-1] & mask[:, 1:].bool()
        speech = F.cross_entropy(logits[said], target[said])
        ids, mask = tokenize(tokenizer, [VIDEO.format(prompt=r.text) for r in ask])
        # at [GEN_VID]
        states = model.model(ids, mask).last_hidden_state[torch.arange(len(ids)), mask.sum(1) - 2]
        fields = label([r.scene for r in ask])
        reading = sum(F.cross_entropy(h(states), fields[:, i]) for i, h in enumerate(heads))
        loss = speech + reading
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            test = [sample_prompt(rng, training=False) for _ in range(96)]
            right = read(model, heads, tokenizer, test)
            log(
                step=step,
                speech=speech.item(),
                reading=reading.item(),
                held_out=right.all(1).mean().item(),
                fields=" ".join(f"{v:.2f}" for v in right.mean(0)),
                progress=clock.progress(step),
            )
        if step % 250 == 0 or clock.progress(step) >= 1:
            save_checkpoint(
                path,
                model=model.state_dict(),
                heads=heads.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                spent=clock.spent,
            )
            out = folder / "understanding"
            model.save_pretrained(out)
            small = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
            small.save_pretrained(out)
            tokenizer.save_pretrained(out)
            file = out / "tokenizer_config.json"  # a class name that transformers 4 and 5 both know
            file.write_text(
                json.dumps(
                    {**json.loads(file.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"},
                    indent=2,
                )
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="instead of steps: how long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, required=True)
    args = parser.parse_args()
    train(args.export, (args.steps, args.minutes), args.seed)


if __name__ == "__main__":
    main()
