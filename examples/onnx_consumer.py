"""A clip of exported engines by ONNX Runtime alone: no PyTorch, no nexus_rt. What it relies on is
the manifests' contract.

    nexus-rt export --backend onnx --parts large,vae,text_encoder -o engines
    python examples/onnx_consumer.py engines "a red circle moves left" clip.npy

The large generator alone, guided, by Euler's method on Wan's time grid: the plan `large` with
`--solver euler`. Needs numpy, onnxruntime and tokenizers.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Engine:
    """An engine folder: a session a graph, inputs and outputs by the names of the manifest's
    contract."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.contract = self.manifest["contract"]
        self.sessions = {
            g: onnxruntime.InferenceSession(str(folder / f"{g}.onnx")) for g in self.contract
        }

    def run(self, graph: str, *inputs: np.ndarray) -> list[np.ndarray]:
        names = [i["name"] for i in self.contract[graph]["inputs"]]
        return self.sessions[graph].run(None, dict(zip(names, inputs, strict=True)))


def time_grid(steps: int, shift: float) -> np.ndarray:
    """Wan's sigmas [steps + 1], the last 0."""
    s = np.linspace(0.999, 0, steps + 1)[:-1]
    return np.append((shift * s / (1 + (shift - 1) * s)).astype(np.float32), np.float32(0))


def embed(text: Engine, tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """Embeddings [1, L, D] of a prompt's own tokens."""
    ids = np.array([tokenizer.encode(prompt).ids], np.int64)
    (states,) = text.run("encode", ids, np.ones_like(ids))
    return states


def padded(rows: np.ndarray, length: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings with one zero row that stands for the padding to Wan's 512 tokens, and the bias
    that says so."""
    tokens = rows.shape[1]
    bias = np.zeros((1, tokens + 1), np.float32)
    bias[0, tokens] = np.log(length - tokens)
    return np.concatenate([rows, np.zeros_like(rows[:, :1])], 1), bias


def decode(vae: Engine, latents: np.ndarray) -> np.ndarray:
    """Latents [1, C, T, H, W] to frames [F, height, width, 3] in [0, 1]: a latent frame at a time,
    states handed on."""
    space = vae.manifest["architecture"]
    mean, std = (
        np.array(space[k], np.float32).reshape(1, -1, 1, 1, 1)
        for k in ("latents_mean", "latents_std")
    )
    z, frames, states = latents * std + mean, [], []
    for i in range(z.shape[2]):
        video, *states = vae.run("next" if i else "first", z[:, :, i : i + 1], *states)
        frames.append(video)
    video = np.concatenate(frames, 2)[0].transpose(1, 2, 3, 0)
    return np.clip(video / 2 + 0.5, 0, 1)


def generate(
    folder: Path, prompt: str, noise: np.ndarray, steps: int, shift: float, guidance: float
) -> np.ndarray:
    """Frames of a prompt from noise [1, C, T, H, W]."""
    large, vae, text = (Engine(folder / name) for name in ("large", "vae", "text_encoder"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    contexts = []
    for words in (prompt, ""):
        rows, bias = padded(embed(text, tokenizer, words))
        contexts.append((*large.run("context", rows), bias))
    x, sigmas = noise, time_grid(steps, shift)
    for sigma, after in itertools.pairwise(sigmas):
        timestep = np.array(int(np.float32(1000) * sigma), np.float32)
        conditional, unconditional = (
            large.run("velocity", x, timestep, *context)[0] for context in contexts
        )
        x = x + (after - sigma) * (unconditional + guidance * (conditional - unconditional))
    return decode(vae, x)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    width, height, frames = json.loads((root / "large" / "manifest.json").read_text())["buckets"][0]
    shape = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    start = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    clip = generate(root, sys.argv[2], start, steps=20, shift=3.0, guidance=3.0)
    np.save(sys.argv[3], clip)
    print(f"{sys.argv[3]}: {clip.shape[0]} frames of {width}x{height}")
