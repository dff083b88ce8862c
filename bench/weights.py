"""Weights in fewer bits on this machine: what they take, how long a forward is, and how far its
result is from bfloat16's.

    python -m nexus_rt.bench.weights shape pair

shape: a transformer of Wan2.1-1.3B's shape with random weights, 768 tokens; memory is the peak
resident memory of a process that loads it from a bfloat16 folder and runs one forward. pair: clips
of the mini pair against those of its own weights, the same noise.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import torch

from nexus_rt.bench.core import Bench, main, output_of, paired, synthetic_folder
from nexus_rt.bench.quality import psnr
from nexus_rt.loading.packing import WEIGHTS
from nexus_rt.loading.transformer import load_transformer

KINDS = tuple(k for k in WEIGHTS if k not in ("dense", "small"))
GIGABYTES, TOKENS, LATENT = 2.78, 768, (3, 32, 32)
PROMPTS = (
    "a striped red circle moves left on a black background",
    "a dotted blue square moves up on a white background",
    "a plain green triangle stays still on a black background",
)
PROCESS = r"""
import re, sys, torch
from nexus_rt.bench.weights import forward
from nexus_rt.loading.transformer import load_transformer
model = load_transformer(sys.argv[1], torch.bfloat16, weights=sys.argv[2])
forward(model)()
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def forward(model):
    """A call that runs one forward of 768 tokens."""
    x = torch.randn(1, 16, *LATENT, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 24, model.config.text_dim, generator=torch.Generator().manual_seed(1))
    context = model.prepare_context(text)
    return torch.inference_mode()(lambda: model(x, torch.tensor(500.0), context))


def random_folder(folder: Path) -> None:
    """A folder of Wan2.1-1.3B's shape whose weights are random."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    synthetic_folder(folder, GIGABYTES, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            shapes = {k: stored.get_slice(k).get_shape() for k in list(stored.keys())}
        state = {}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5
            ones = "norm" in name and name.endswith("weight")
            state[name] = (1 + value if ones else value).bfloat16()
        save_file(state, file, {"format": "pt"})


def bench_shape(runs: int) -> dict:
    """Memory, time and error of a forward of 1.3B's shape, by kind, against bfloat16."""
    result: dict = {"what": f"Wan2.1-1.3B's shape, random weights, {TOKENS} tokens, bfloat16"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_folder(folder)
        memory = lambda kind: int(output_of(PROCESS, name, kind))
        result["dense"] = {"peak_rss_gb": round(memory("dense") / 1e9, 2)}
        dense = forward(load_transformer(folder, torch.bfloat16))
        want = dense().float()
        for kind in KINDS:
            call = forward(load_transformer(folder, torch.bfloat16, weights=kind))
            error = float((call().float() - want).norm() / want.norm())
            timing = paired(call, dense, runs)
            result[kind] = {
                "peak_rss_gb": round(memory(kind) / 1e9, 2),
                "relative_error": round(error, 4),
                **timing,
            }
    return result


def bench_pair(runs: int) -> dict:
    """Clips of the mini pair by kind: PSNR against its own weights', and milliseconds."""
    from nexus_rt.pipeline.pipeline import NexusPipeline

    def clips(kind: str):
        pipe = NexusPipeline.from_pretrained(weights=kind)
        pipe.set_progress_bar_config(disable=True)
        noise = lambda: [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        return lambda: pipe(list(PROMPTS), generator=noise()).frames

    dense = clips("dense")
    want = dense()
    result: dict = {"what": "mini pair, default plan, three prompts, against its own weights"}
    for kind in KINDS:
        call = clips(kind)
        quality = [psnr(a, b) for a, b in zip(call(), want, strict=True)]
        result[kind] = {
            "psnr_db": [round(q, 1) for q in quality],
            "psnr_db_median": round(median(quality), 1),
            **paired(call, dense, runs),
        }
    return result


BENCHES: dict[str, Bench] = {"shape": (bench_shape, 5), "pair": (bench_pair, 3)}

if __name__ == "__main__":
    main(BENCHES, __doc__)
