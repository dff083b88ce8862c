"""Train the mini pair's tokenizer and its small UMT5 encoder on the caption grammar.

The encoder learns to say, from the state of every token, what the whole caption asks for (one
classifier a field of `world.Scene`, with a class for "does not say"), so that a token's state
carries its caption and not only its word. The classifiers are thrown away. It knows every word of
the reasoning grammar apart from every other, but meets those that name no field as fillers only: it
learns nothing of what they mean.

    python -m training.train_text --export nexus_rt/mini
    python -m training.train_text --init nexus_rt/mini --export nexus_rt/mini     # new words

With `--init` the states of whole captions are held to what they were, so that generators trained on
them go on.
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

from nexus_rt.bench.shapes import riddles, world
from training.common import RUNS, Log, cosine, save_checkpoint, set_lr

FIELDS = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "texture": world.TEXTURES,
    "motion": tuple(world.MOTIONS),
    "background": tuple(world.BACKGROUNDS),
}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()"
WORDS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Punctuation(),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
    ]
)


def fillers() -> tuple[str, ...]:
    """The words of the reasoning grammar that name no field."""
    names = {word for values in FIELDS.values() for word in values}
    return tuple(w for w in riddles.words() if w.isalpha() and w not in names)


def captions(
    rng: np.random.Generator, count: int, extra: tuple[str, ...] = ()
) -> tuple[list[str], torch.Tensor]:
    """Random captions and the index of each of their fields [count, 5]; the last class where one is
    not said."""
    texts, labels = [], []
    for _ in range(count):
        scene = world.sample_scene(rng)
        text, said = (
            (world.caption(scene, rng), (True,) * 5)
            if rng.random() < 0.4
            else world.loose_caption(scene, rng, extra)
        )
        texts.append(text)
        labels.append(
            [
                n.index(getattr(scene, f)) if s else len(n)
                for (f, n), s in zip(FIELDS.items(), said, strict=True)
            ]
        )
    return texts, torch.tensor(labels)


def train_tokenizer(rng: np.random.Generator, init: Path | None) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer: the grammar's words at their log frequency, and single characters for
    everything else.

    (The library's Unigram trainer prunes a vocabulary this small down to letters.)
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(r"\s+", " ")])
    split = lambda text: [
        word for word, _ in WORDS.pre_tokenize_str(normalizer.normalize_str(text))
    ]
    counts = Counter(word for text in captions(rng, 5000)[0] for word in split(text))
    total = sum(counts.values())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [
        (word, math.log(count / total))
        for word, count in sorted(counts.items(), key=lambda c: (-c[1], c[0]))
    ]
    if init is not None:
        vocab = [
            tuple(v)
            for v in json.loads((init / "tokenizer" / "tokenizer.json").read_text())["model"][
                "vocab"
            ]
        ]
    known = {word for word, _ in vocab}
    new = [word for text in riddles.words() for word in split(text) if word not in known]
    vocab += [(word, -10.0) for word in dict.fromkeys(new)]
    vocab += [(c, -20.0) for c in ["▁", *LETTERS] if c not in {word for word, _ in vocab}]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, WORDS
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def tokenize(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [N, L], L that of the longest."""
    batch = tokenizer(texts, padding="longest", return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def train(folder: Path, steps: int, seed: int, init: Path | None) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer, extra = train_tokenizer(rng, init), fillers()
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    encoder, anchor = UMT5EncoderModel(config), None
    if init is not None:
        anchor = UMT5EncoderModel.from_pretrained(init / "text_encoder", dtype=torch.float32)
        encoder = UMT5EncoderModel.from_pretrained(init / "text_encoder", dtype=torch.float32)
        encoder.resize_token_embeddings(len(tokenizer))
    heads = nn.ModuleList([nn.Linear(config.d_model, len(names) + 1) for names in FIELDS.values()])
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer, log = (
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
        Log(RUNS / "text" / "train.jsonl"),
    )
    for step in range(steps):
        set_lr(optimizer, cosine(step, steps, 2e-3 if init is None else 1e-3, 1e-4))
        texts, labels = captions(rng, 64, extra)
        ids, mask = tokenize(tokenizer, texts)
        states = encoder(ids, mask).last_hidden_state
        logits = [head(states) for head in heads]  # per field [N, L, classes]
        real = mask.bool()
        loss = (
            sum(
                F.cross_entropy(x[real], labels[:, i : i + 1].expand_as(mask)[real])
                for i, x in enumerate(logits)
            )
            + 1e-3 * states[real].square().mean()
        )
        if anchor is not None:
            known, known_mask = tokenize(
                tokenizer, [world.caption(world.sample_scene(rng), rng) for _ in range(32)] + [""]
            )
            with torch.no_grad():
                wanted = anchor(known, known_mask).last_hidden_state
            drift = (
                (encoder(known, known_mask).last_hidden_state - wanted)[known_mask.bool()]
                .square()
                .mean()
            )
            loss = loss + 10 * drift / wanted[known_mask.bool()].var()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = torch.stack(
                [(x.argmax(-1) == labels[:, i : i + 1])[real] for i, x in enumerate(logits)]
            )
            moved = {} if anchor is None else {"drift": (drift / wanted.var()).item()}
            log(step=step + 1, loss=loss.item(), right=right.all(0).float().mean().item(), **moved)
    save_checkpoint(RUNS / "text" / "encoder.pt", model=encoder.state_dict())
    encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    # a class name that transformers 4 and 5 both know
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init", type=Path, help="a pair folder whose encoder goes on, with the words it lacks"
    )
    parser.add_argument("--export", type=Path, required=True)
    args = parser.parse_args()
    train(args.export, args.steps, args.seed, args.init)


if __name__ == "__main__":
    main()
