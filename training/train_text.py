"""Train the mini pair's tokenizer and its small UMT5 encoder on the caption grammar.

The encoder learns to say, from the state of every token, what the whole caption asks for (one classifier a field of
`world.Scene`), so that a token's state carries its caption and not only its word. The classifiers are thrown away.

    python -m training.train_text --export nexus_rt/mini
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from training import world
from training.common import RUNS, Log, cosine, save_checkpoint, set_lr

FIELDS = {
    "shape": world.SHAPES, "colour": tuple(world.COLOURS), "texture": world.TEXTURES,
    "motion": tuple(world.MOTIONS), "background": tuple(world.BACKGROUNDS),
}  # fmt: skip
MAX_TOKENS = 24
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()"
WORDS = pre_tokenizers.Sequence(
    [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
)


def captions(rng: np.random.Generator, count: int) -> tuple[list[str], torch.Tensor]:
    """Random captions and the index of each of their fields [count, 5]."""
    scenes = [world.sample_scene(rng) for _ in range(count)]
    labels = [[names.index(getattr(s, field)) for field, names in FIELDS.items()] for s in scenes]
    return [world.caption(s, rng) for s in scenes], torch.tensor(labels)


def train_tokenizer(rng: np.random.Generator) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer: the grammar's words at their log frequency, and single characters for everything else.

    (The library's Unigram trainer prunes a vocabulary this small down to letters.)
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(r"\s+", " ")])
    counts = Counter(
        word for text in captions(rng, 5000)[0] for word, _ in WORDS.pre_tokenize_str(normalizer.normalize_str(text))
    )
    total = sum(counts.values())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(word, math.log(count / total)) for word, count in sorted(counts.items(), key=lambda c: (-c[1], c[0]))]
    vocab += [(c, -20.0) for c in ["▁", *LETTERS] if c not in counts]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, WORDS
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [N, MAX_TOKENS]."""
    batch = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def train(folder: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = train_tokenizer(rng)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=16, relative_attention_max_distance=64, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    encoder = UMT5EncoderModel(config)
    heads = nn.ModuleList([nn.Linear(config.d_model, len(names)) for names in FIELDS.values()])
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer, log = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01), Log(RUNS / "text" / "train.jsonl")
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, 2e-3, 1e-4))
        texts, labels = captions(rng, 64)
        ids, mask = tokenize(tokenizer, texts)
        states = encoder(ids, mask).last_hidden_state
        logits = [head(states) for head in heads]  # per field [N, L, classes]
        real = mask.bool()
        loss = (
            sum(F.cross_entropy(x[real], labels[:, i : i + 1].expand(-1, MAX_TOKENS)[real]) for i, x in enumerate(logits))
            + 1e-3 * states[real].square().mean()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = torch.stack([(x.argmax(-1) == labels[:, i : i + 1])[real] for i, x in enumerate(logits)])
            log(step=step + 1, loss=loss.item(), right=right.all(0).float().mean().item(), spread=states[real].std().item())
    save_checkpoint(RUNS / "text" / "encoder.pt", model=encoder.state_dict())
    encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer_config.json"  # a class name that transformers 4 and 5 both know
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, required=True)
    args = parser.parse_args()
    train(args.export, args.steps, args.seed)


if __name__ == "__main__":
    main()
