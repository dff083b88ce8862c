"""Start-up and endurance on the mini pair: from the shell to an mp4 and where that goes, the first
calls, and many calls.

python -m nexus_rt.bench.startup command parts calls --json bench/results/cpu/startup.json
python -m nexus_rt.bench.startup soak --runs 200 --json bench/results/cpu/soak.json
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from nexus_rt.bench.core import CLI, PROMPT, Bench, generate_s, main, output_of
from nexus_rt.core.timing import elapsed_ms, in_turn

SIZES = ((64, 64, 17), (64, 64, 5), (48, 64, 9), (32, 32, 13))  # width, height, frames, of the soak

PARTS = """
import json, sys, time
last, parts = time.perf_counter(), {"start of Python": time.time() - float(sys.argv[3])}
def lap(name):
    global last
    now = time.perf_counter()
    parts[name], last = now - last, now
    return name
import torch; lap("import torch")
import nexus_rt
from nexus_rt.pipeline import pipeline; lap("import nexus_rt.pipeline.pipeline")
pipe = pipeline.NexusPipeline.from_pretrained(); lap("from_pretrained: configs, both generators, comparisons")
pipe.text.tokenizer; lap("tokenizer, import of the tokenizers library included")
pipe.text.load(); lap("text encoder: weights")
pipe.context.understanding.load(); lap("understanding model: weights")
pipe.context.load(); lap("connector: weights")
pipe.vae.load(); lap("VAE: weights")
pipe.set_progress_bar_config(disable=True)
clip = pipe(sys.argv[1]).frames[0]; lap("the call: prompts, denoising, decoding")
from nexus_rt import save_video
save_video(clip, sys.argv[2]); lap("write the mp4, PyAV's import included")
print(json.dumps(parts))
"""


def _exported(backend: str, folder: Path) -> Path:
    """Every part of the mini pair as engines at its own size."""
    sizes = ",".join("x".join(map(str, s)) for s in SIZES)
    command = [
        *CLI,
        "export",
        "--backend",
        backend,
        "--parts",
        "small,large,vae,text_encoder",
        "--sizes",
        sizes,
    ]
    made = folder / backend
    done = subprocess.run(
        [*command, "-o", str(made)],
        env={**os.environ, "NEXUS_RT_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"export of {backend} failed:\n{done.stderr[-2000:]}")
    return made


def bench_command(runs: int) -> dict:
    """`nexus-rt generate` as a process: PyTorch, and ONNX engines. A run first fills the page
    cache."""
    with tempfile.TemporaryDirectory() as folder:
        engines = str(_exported("onnx", Path(folder)))
        ways = {
            "torch": partial(generate_s, folder),
            "onnx engines": partial(generate_s, folder, "--engines", engines),
        }
        walls = in_turn(ways, lambda generate: generate(), runs, 1)
    return {
        n: {"wall_s": round(median(w), 2), "max_s": round(max(w), 2), "runs": runs}
        for n, w in walls.items()
    }


def bench_parts(runs: int) -> dict:
    """Where start-up goes, part by part in a process of its own; medians in seconds."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(runs + 1):
            start = time.perf_counter()
            parts = json.loads(output_of(PARTS, PROMPT, f"{folder}/a.mp4", time.time()))
            wall = time.perf_counter() - start
            rows.append({**parts, "end of Python": wall - sum(parts.values())})
    return {part: round(median(f[part] for f in rows[1:]), 3) for part in rows[0]}


def _pipeline(way: str, folder: Path):
    from nexus_rt import NexusPipeline

    pipe = (
        NexusPipeline.from_pretrained()
        if way == "torch"
        else NexusPipeline.from_engines(_exported(way, folder))
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bench_calls(runs: int) -> dict:
    """The first ten calls of a pipeline, ms: the first loads what is not loaded yet."""
    del runs
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pipe = _pipeline("torch", Path(folder))
        for i in range(10):
            call = partial(pipe, PROMPT, generator=torch.Generator().manual_seed(i))
            rows.append(round(elapsed_ms(call), 1))
    return {"calls_ms": rows, "second_over_tenth": round(rows[1] / rows[-1], 2)}


def _now() -> dict[str, int]:
    """Of this process: resident kB, open files, threads of Python and of the system."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss_kb": int(status["VmRSS"].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "python_threads": threading.active_count(),
        "threads": int(status["Threads"]),
    }


def bench_soak(runs: int) -> dict:
    """Many clips of sizes in a random order by PyTorch, ONNX and AOTI: memory's slope over the
    second half, files, threads."""
    report: dict[str, dict] = {}
    for way in ("torch", "onnx", "aoti"):
        with tempfile.TemporaryDirectory() as folder:
            pipe, order, seen = _pipeline(way, Path(folder)), random.Random(0), []
            for i in range(runs):
                width, height, frames = order.choice(SIZES)
                pipe(
                    PROMPT,
                    width=width,
                    height=height,
                    num_frames=frames,
                    plan=pipe.make_plan(None, 4),
                    generator=torch.Generator().manual_seed(i),
                )
                seen.append(_now())
            half = [s["rss_kb"] for s in seen[runs // 2 :]]
            slope = float(np.polyfit(range(len(half)), half, 1)[0]) if len(half) > 1 else 0.0
            report[way] = {
                "clips": runs,
                "rss_mb_end": round(seen[-1]["rss_kb"] / 1000),
                "slope_kb_a_clip": round(slope, 1),
            }
            for name in ("files", "python_threads", "threads"):
                report[way][name] = [seen[runs // 10][name], seen[-1][name]]
    return report


BENCHES: dict[str, Bench] = {
    "command": (bench_command, 5),
    "parts": (bench_parts, 5),
    "calls": (bench_calls, 1),
    "soak": (bench_soak, 200),
}


if __name__ == "__main__":
    main(BENCHES, __doc__)
