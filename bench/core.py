"""Figures of the runtime core, each measured beside its peer in the same run after their results
are compared.

python -m nexus_rt.bench.core blend     # one filter against the four-band form
python -m nexus_rt.bench.core dit       # the mini large DiT against diffusers' on the same weights
python -m nexus_rt.bench.core load      # peak memory of loading a synthetic folder of 2 GB
python -m nexus_rt.bench.core mini      # shell to mp4, and the runtime's own share of denoising
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nexus_rt.bench.measure import ratio_of
from nexus_rt.core.part_files import scratch_folder
from nexus_rt.core.size import ClipSize
from nexus_rt.core.timing import elapsed_ms, in_turn, median_ms
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.upfb import blend, published_blend

PROMPT = "a striped red circle moves left on a black background"
CLI = (sys.executable, "-m", "nexus_rt.cli")
Bench = tuple[Callable[[int], dict[str, Any]], int]  # what measures, and how many runs it counts


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def paired(ours: Callable, theirs: Callable, runs: int) -> dict[str, Any]:
    """Run two calls in turn; medians in ms and the median of their ratio, pair by pair (above 1:
    ours is faster)."""
    ms = in_turn({"ours": ours, "theirs": theirs}, elapsed_ms, runs, 1)
    return {
        "ours_ms": round(median(ms["ours"]), 3),
        "theirs_ms": round(median(ms["theirs"]), 3),
        "ratio": round(ratio_of(ms["ours"], ms["theirs"]), 2),
        "runs": runs,
    }


def output_of(program: str, *arguments: object) -> str:
    """What a program prints, in a Python process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def generate_s(folder: str | Path, *options: str) -> float:
    """Seconds of `nexus-rt generate` as a process, from the shell to an mp4 in a folder."""
    command = [*CLI, "generate", PROMPT, "-o", f"{folder}/a.mp4", "--quiet", *options]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def bench_blend(runs: int) -> dict[str, Any]:
    """One filter on one tensor against the four bands as published, at 480p x 81 frames."""
    torch.manual_seed(0)
    v_small, v_large = torch.randn(2, 1, 16, 21, 60, 104)
    four_bands = lambda: published_blend(v_small, v_large, 0.6, BlendConfig())
    expected = four_bands()
    error = ((blend(v_small, v_large, 0.6) - expected).abs().max() / expected.abs().max()).item()
    if error > 1e-5:
        raise SystemExit(f"the two forms differ by {error:.1e}: no speed is worth that")
    timing = paired(lambda: blend(v_small, v_large, 0.6), four_bands, runs)
    extra = {
        split: round(median_ms(partial(blend, v_small, v_large, 0.6, BlendConfig(split=split))), 3)
        for split in ("fft", "dct")
    }
    return {
        "what": "blend, gaussian split, energy reference, 1x16x21x60x104",
        "max_relative_error": error,
        **timing,
        "ms_of": extra,
    }


@torch.inference_mode()
def bench_dit(runs: int) -> dict[str, Any]:
    """A guided step of the mini large DiT against diffusers' transformer on the same weights,
    prompt and latents."""
    from diffusers import WanTransformer3DModel

    from nexus_rt.loading.pair_folder import MINI
    from nexus_rt.loading.transformer import load_transformer
    from nexus_rt.pipeline.pipeline import NexusPipeline

    pipe = NexusPipeline.from_pretrained()
    ours = load_transformer(MINI / "large", torch.float32)
    theirs = WanTransformer3DModel.from_pretrained(MINI / "large", torch_dtype=torch.float32).eval()
    embeds = torch.cat(pipe.encode_prompt(PROMPT))
    d = pipe.defaults
    latents = pipe.prepare_latents(1, ClipSize.of_defaults(d)).repeat(2, 1, 1, 1, 1)
    timestep, context = torch.tensor([700, 700]), ours.prepare_context(embeds)
    a = ours(latents, timestep[0], context)
    b = theirs(latents, timestep, embeds, return_dict=False)[0]
    error = (a - b).abs().max().item()
    if error > 1e-4 * b.abs().max().item():
        raise SystemExit(f"the two forwards differ by {error:.1e}: no speed is worth that")
    timing = paired(
        lambda: ours(latents, timestep[0], context),
        lambda: theirs(latents, timestep, embeds, return_dict=False),
        runs,
    )
    return {
        "what": "mini large DiT, guided step (batch 2), float32, against diffusers",
        "max_error": error,
        **timing,
    }


LOAD = """
import resource, sys, threading, time, torch
from nexus_rt.loading.transformer import load_transformer
def rss():
    with open('/proc/self/statm') as f: return int(f.read().split()[1]) * resource.getpagesize()
from nexus_rt.models.wan import WanConfig, WanTransformer
with torch.device('meta'):  # PyTorch imports its meta kernels on first use (75 MB): no part of any folder
    WanTransformer(WanConfig(num_attention_heads=1, attention_head_dim=8, ffn_dim=8, num_layers=1, text_dim=8))
base, peak, done = rss(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, rss()); time.sleep(0.001)
t = threading.Thread(target=watch); t.start(); start = time.perf_counter()
model = load_transformer(sys.argv[1], getattr(torch, sys.argv[2])); seconds = time.perf_counter() - start
done = True; t.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(base, max(peak, rss()), weights, seconds)
"""


def synthetic_folder(folder: Path, gigabytes: float, dtype: torch.dtype) -> None:
    """A Wan transformer of about this size, in shards of a fifth, with weights of a fixed
    pattern."""
    from safetensors.torch import save_file

    from nexus_rt.loading.layouts import diffusers_shapes
    from nexus_rt.models.wan import WanTransformer
    from nexus_rt.models.wan_config import WanConfig

    dim, ffn = 1536, 8960
    layers = max(1, round(gigabytes * 1e9 / dtype.itemsize / (8 * dim * dim + 2 * dim * ffn)))
    fields: dict[str, Any] = dict(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=ffn, num_layers=layers
    )
    with torch.device("meta"):
        shapes = diffusers_shapes(WanTransformer(WanConfig(**fields)))
    names, shards = list(shapes), 5
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        save_file({n: torch.full(shapes[n], 0.01, dtype=dtype) for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **fields})
    )


def bench_load(runs: int, gigabytes: float = 2.2) -> dict[str, Any]:
    """Peak resident memory of loading, above what the process had before, over the bytes of the
    loaded weights."""
    if not Path("/proc/self/statm").exists():
        raise SystemExit("peak memory is read from /proc/self/statm: run this on Linux")
    result: dict = {
        "what": (
            f"load a sharded folder of {gigabytes} GB, peak resident memory over the weights' bytes"
        )
    }
    for stored, target in ((torch.bfloat16, "bfloat16"), (torch.float32, "bfloat16")):
        with scratch_folder("nexus-rt-bench") as folder:
            synthetic_folder(folder, gigabytes, stored)
            out = [output_of(LOAD, folder, target).split() for _ in range(min(runs, 3))]
        ratios = [(int(peak) - int(base)) / int(weights) for base, peak, weights, _ in out]
        result[f"{str(stored)[6:]} as {target}"] = {
            "peak_ratio": round(max(ratios), 3),
            "weights_bytes": int(out[0][2]),
            "seconds": round(median(float(o[3]) for o in out), 2),
        }
    return result


class Timed:
    """An engine that adds up the time it spends."""

    def __init__(self, engine) -> None:
        self.engine, self.seconds = engine, 0.0

    def _timed(self, call: Callable, *args):
        start = time.perf_counter()
        out = call(*args)
        self.seconds += time.perf_counter() - start
        return out

    def prepare(self, context):
        return self._timed(self.engine.prepare, context)

    def velocity(self, *args):
        return self._timed(self.engine.velocity, *args)


def bench_mini(runs: int) -> dict[str, Any]:
    """`nexus-rt generate PROMPT` as a process, and what the loop costs outside the two DiTs."""
    from nexus_rt.method.loop import sample
    from nexus_rt.pipeline.pipeline import NexusPipeline
    from nexus_rt.pipeline.request import make_guidance
    from nexus_rt.pipeline.settings import CallSettings

    with scratch_folder("nexus-rt-bench") as folder:
        walls = [generate_s(folder) for _ in range(runs)]
    pipe = NexusPipeline.from_pretrained()
    prompts = pipe.encode(PROMPT)
    d, shares = pipe.defaults, {}
    guidance = make_guidance(CallSettings(), d)
    noise = pipe.prepare_latents(1, ClipSize.of_defaults(d), torch.Generator().manual_seed(0))
    decode = elapsed_ms(lambda: pipe.decode(noise)) / 1000
    for spec in (d.plan, "reference"):
        plan, own = pipe.make_plan(spec), []
        for _ in range(max(3, runs)):
            engines = {n: Timed(e) for n, e in pipe.engines.items()}
            whole = elapsed_ms(partial(sample, noise, plan, engines, prompts, guidance)) / 1000
            own.append((whole, 1 - sum(e.seconds for e in engines.values()) / whole))
        shares[plan.name] = {
            "denoise_s": round(median(w for w, _ in own), 3),
            "own_share_percent": round(100 * median(s for _, s in own), 2),
        }
    return {
        "what": "mini pair, default settings, shell to mp4",
        "wall_s": round(median(walls), 2),
        "wall_s_max": round(max(walls), 2),
        "runs": runs,
        "decode_s": round(decode, 3),
        "loop": shares,
    }


BENCHES: dict[str, Bench] = {
    "blend": (bench_blend, 20),
    "dit": (bench_dit, 20),
    "load": (bench_load, 3),
    "mini": (bench_mini, 5),
}


def main(benches: Mapping[str, Bench], doc: str | None) -> None:
    """The command line of a module of benches: name -> what measures it, and how many runs it
    counts."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", nargs="+", choices=benches)
    parser.add_argument(
        "--runs",
        type=int,
        help=f"counted runs ({', '.join(f'{n} {r}' for n, (_, r) in benches.items())})",
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    results = {"machine": machine()}
    for name in args.bench:
        call, runs = benches[name]
        results[name] = call(args.runs or runs)
    text = json.dumps(results, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main(BENCHES, __doc__)
