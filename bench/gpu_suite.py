"""Everything there is to measure on a GPU, in one run of at most eight minutes.

    python -m nexus_rt.bench.gpu_suite --out bench/results/h200    # on the GPU
    python -m nexus_rt.bench.gpu_suite --dry                       # on a CPU, at tiny sizes

Needs torch, triton, numpy and safetensors; `--wheels DIR` adds a folder of wheels (diffusers, say)
to the path. Sections run in order and each stands alone: one that breaks is written down with its
error, one that the time does not reach is written down as not reached, and the files are written
anew after each, so that a run that is killed leaves what it had measured. Correctness comes first:
a kernel that is wrong gets no speed. Every figure stands beside the roof measured in the same run:
the bandwidth of a large copy, the rate of a large bf16 matrix product.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from nexus_rt.bench.gpu_correctness import correctness
from nexus_rt.bench.gpu_dit import dit
from nexus_rt.bench.gpu_engines import engines, swap
from nexus_rt.bench.gpu_pipeline import pipeline
from nexus_rt.bench.gpu_quantized import quantized
from nexus_rt.bench.gpu_tables import markdown
from nexus_rt.bench.measure import failure, failure_in
from nexus_rt.bench.presets import DRY, WAN_1_3B, WAN_14B
from nexus_rt.bench.results import write_text
from nexus_rt.size import ClipSize

LIMIT_S = 480.0
CONFIGS = {"1.3B": WAN_1_3B, "14B": WAN_14B}
GRID = (21, 30, 52)  # tokens of 480p x 81 frames: 32,760


def figure(value: float) -> float:
    """Four digits of a measurement."""
    return float(f"{value:.4g}")


@dataclass
class Suite:
    """What a run knows: its device and sizes, its deadline, its results."""

    dry: bool
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    seed: int = 0

    def __post_init__(self) -> None:
        import torch

        self.device = torch.device("cpu" if self.dry else "cuda")
        # the interpreter computes bfloat16 wrongly
        self.dtype = torch.float32 if self.dry else torch.bfloat16
        self.half = torch.bfloat16  # moves bytes, computes nothing
        self.grid = (1, 3, 4) if self.dry else GRID
        self.configs = {"tiny": DRY} if self.dry else CONFIGS

    @property
    def size(self) -> ClipSize:
        """The clip's size in pixels and frames."""
        t, h, w = self.grid
        return ClipSize(16 * w, 16 * h, 4 * t - 3)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def random(self, *shape: int, dtype=None):
        import torch

        self.seed += 1
        g = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(*shape, generator=g, device=self.device).to(dtype or self.dtype)

    def ms(
        self, call: Callable[[], Any], runs: int = 10, warmup: int = 3, graph: bool = False
    ) -> float:
        """Median milliseconds, the second-level cache swept between runs on a GPU.

        graph: of a replay, without the launches' own time; a call that waits for the GPU cannot be
            captured and fails.
        """
        import torch

        if self.dry:
            runs, warmup = 1, 0
        for _ in range(warmup):
            call()
        if self.device.type != "cuda":
            times = []
            for _ in range(runs):
                start = time.perf_counter()
                call()
                times.append(1000 * (time.perf_counter() - start))
            return median(times)
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                call()
            call = captured.replay
        sweep = torch.ones(64 * 2**20, dtype=torch.int32, device=self.device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
        for start, stop in events:
            # read, not written: dirty lines would be written back at the expense of what is timed
            sweep.amax()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return median(a.elapsed_time(b) for a, b in events)

    def of_roof(
        self, ms: float, bytes_: float = 0, flops: float = 0, matmul: str = "matmul_tflops"
    ) -> dict:
        """A figure with its rate and its share of the roof."""
        roofs = self.results.get("roofs", {})
        row: dict[str, Any] = {"ms": figure(ms)}
        for kind, amount, unit in (("copy_gbps", bytes_, 1e6), (matmul, flops, 1e9)):
            if amount:
                rate = amount / ms / unit
                row["gbps" if bytes_ else "tflops"] = figure(rate)
                row["percent_of_roof"] = figure(100 * rate / roofs[kind]) if kind in roofs else None
        return row


def roofs(suite: Suite) -> dict:
    """Copy bandwidth (read + write) of 1 GiB, and the rates of a large matrix product in the
    suite's dtype and in fp8."""
    import torch

    count = 2**14 if suite.dry else 2**29
    x = torch.empty(count, dtype=torch.bfloat16, device=suite.device).zero_()
    y = torch.empty_like(x)
    ms = suite.ms(lambda: y.copy_(x), 20)
    n = 64 if suite.dry else 8192
    a, b = suite.random(n, n), suite.random(n, n)
    product = suite.ms(lambda: a @ b, 20)
    results = {
        "copy_gbps": figure(2 * x.nbytes / ms / 1e6),
        "matmul_tflops": figure(2 * n**3 / product / 1e9),
    }
    try:
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        one = torch.ones((), device=suite.device)
        product = suite.ms(
            lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), 20
        )
        results["fp8_matmul_tflops"] = figure(2 * n**3 / product / 1e9)
    except (RuntimeError, NotImplementedError) as error:  # an older GPU, or a CPU
        print(f"no fp8 roof: {str(error).splitlines()[0][:200]}", file=sys.stderr)
    return results


def kernels(suite: Suite) -> dict:
    """Each memory-bound kernel at Wan's sizes: milliseconds, GB/s, percent of the copy; eager
    PyTorch beside it."""
    rows = {}
    for label, (ours, eager, args, moved) in {**block_calls(suite), **loop_calls(suite)}.items():
        if label.split()[0] in suite.wrong:
            rows[label] = {"refused": "it is wrong: see correctness"}
            continue
        with failure_in(rows, label):
            rows[label] = _beside_eager(
                suite, lambda f=ours, a=args: f(*a), lambda f=eager, a=args: f(*a), moved
            )
    return rows


def _beside_eager(suite: Suite, call: Callable, peer: Callable, moved: int) -> dict:
    """A kernel and eager PyTorch as graph replays and as calls, and a copy that moves as many
    bytes."""
    row = suite.of_roof(suite.ms(call, graph=True), bytes_=moved)
    like = suite.random(moved // 4, dtype=suite.half)
    target = like.clone()
    row["percent_of_like_copy"] = figure(
        100 * suite.ms(lambda: target.copy_(like), graph=True) / row["ms"]
    )
    row["eager_ms"] = figure(suite.ms(peer, graph=True))
    row["called_ms"], row["eager_called_ms"] = figure(suite.ms(call)), figure(suite.ms(peer))
    return {**row, "against_eager": figure(row["eager_ms"] / row["ms"])}


def block_calls(suite: Suite) -> dict[str, tuple]:
    """Label -> (kernel, eager PyTorch, arguments, bytes to move), for the norms of a Wan block."""
    import torch

    from nexus_rt.kernels.modulate import modulate, modulate_ref
    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

    calls = {}
    for name, config in suite.configs.items():
        heads, dim = (
            config["num_attention_heads"],
            config["num_attention_heads"] * config["attention_head_dim"],
        )
        for length in (suite.tokens,) if suite.dry else (suite.tokens, 75600):
            x, y = suite.random(1, length, dim), suite.random(1, length, dim)
            scale, shift, gate = (suite.random(1, dim, dtype=torch.float32) for _ in range(3))
            size = f"{name} {length}"
            calls[f"modulate {size}"] = (
                modulate,
                modulate_ref,
                (x, scale, shift, 1e-6),
                2 * x.nbytes,
            )
            gated = (x, scale, shift, 1e-6, y, gate)
            calls[f"modulate gated residual {size}"] = (modulate, modulate_ref, gated, 4 * x.nbytes)
            angle = suite.random(length, config["attention_head_dim"] // 2, dtype=torch.float32)
            args = (
                suite.random(1, length, 3 * dim),
                suite.random(dim),
                suite.random(dim),
                angle.cos(),
                angle.sin(),
                heads,
                1e-6,
            )
            calls[f"qk_norm_rope {size}"] = (
                qk_norm_rope,
                qk_norm_rope_ref,
                args,
                4 * x.nbytes + 2 * angle.nbytes,
            )
    return calls


def loop_calls(suite: Suite) -> dict[str, tuple]:
    """The same for the blend, both generators guided, and the solver step, at 480p and 720p x 81
    frames."""
    import torch

    from nexus_rt.kernels.band_blend import band_blend, band_blend_ref
    from nexus_rt.kernels.band_filter import band_filter, band_filter_ref
    from nexus_rt.kernels.solver_step import solver_step, solver_step_ref
    from nexus_rt.upfb import split_filter

    calls = {}
    for height, width in ((6, 10),) if suite.dry else ((60, 104), (90, 160)):
        four = [suite.random(1, 16, 3 if suite.dry else 21, height, width) for _ in range(4)]
        moved = sum(t.nbytes for t in four) + 4 * four[0].numel()
        args, size = (*four, (5.0, 5.0)), f"{height}x{width}"
        calls[f"band_blend {size}"] = (
            band_blend,
            band_blend_ref,
            (*args, 0.4, 0.42, 0.18, 0.2),
            moved,
        )
        for label, lowpass in (("rank 1", "gaussian"), ("any rank", "butterworth")):
            f = split_filter(height, width, "dct", lowpass, 2, 0.5, suite.device)
            filtered = (*args, 0.42, 0.18, f.left, f.right, f.gain)
            calls[f"band_filter {label} {size}"] = (band_filter, band_filter_ref, filtered, moved)
        x, v, *history = (suite.random(*four[0].shape, dtype=torch.float32) for _ in range(5))
        sums, scalars = (
            band_blend(*args, 0.4, 0.42, 0.18, 0.2)[1],
            [0.9, 0.7, -0.2, 0.35, 0.11, 0.83, 0.4, -0.09],
        )
        step = (x, v, None, 1.0, sums, "progressive", 0.6, scalars, history, 3, 2)
        calls[f"solver_step {size}"] = (solver_step, solver_step_ref, step, 8 * x.nbytes)
    return calls


def attention(suite: Suite) -> dict:
    """Every backend at Wan's shapes, self and cross; each one checked by `decide` before it is
    timed."""
    from nexus_rt.attention import ATTENTION_BACKENDS, Case, decide

    rows = {}
    for name, config in suite.configs.items():
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        for label, keys, biased in (
            ("self", suite.tokens, False),
            ("cross 512", 512, False),
            ("cross biased", 40, True),
        ):
            case = Case(
                1,
                suite.tokens,
                min(keys, 8) if suite.dry else keys,
                heads,
                head_dim,
                suite.dtype,
                suite.device,
                biased,
            )
            # math would hold 86 GB of scores
            names = [n for n in ATTENTION_BACKENDS if n != "math" or suite.dry or keys < 1000]
            candidates = decide(case, names, remeasure=True)["candidates"]
            candidates |= _other_loads(suite, case)
            flops = 4 * case.queries * case.keys * heads * head_dim
            shown, best = {}, min(c["ms"] for n, c in candidates.items() if "ms" in c and _exact(n))
            for backend, c in candidates.items():
                roof = "matmul_tflops" if _exact(backend) else "fp8_matmul_tflops"
                rate = suite.of_roof(c["ms"], flops=flops, matmul=roof) if "ms" in c else {}
                shown[backend] = {
                    **c,
                    **rate,
                    **({"of_best_exact": round(best / c["ms"], 3)} if rate else {}),
                }
            chosen = min(
                (
                    n
                    for n, c in candidates.items()
                    if "ms" in c and n in ATTENTION_BACKENDS and _exact(n)
                ),
                key=lambda n: candidates[n]["ms"],
            )
            rows[f"{label} {name}"] = {"chosen": chosen, "backends": shown}
    return rows


def _exact(backend: str) -> bool:
    from nexus_rt.attention import ATTENTION_BACKENDS

    return ATTENTION_BACKENDS[backend.split(",")[0]].exact


def _other_loads(suite: Suite, case) -> dict[str, dict]:
    """Our kernel by each of its ways to load a tile: what `launch_config` should choose."""
    from nexus_rt.kernels.attention import LOADS, attention
    from nexus_rt.kernels.attention_fp8 import attention_fp8

    shape = (case.batch, case.queries, case.heads, case.head_dim)
    q = suite.random(*shape)
    k, v = (suite.random(case.batch, case.keys, *shape[2:]) for _ in range(2))
    bias = suite.random(case.batch, case.keys).float() if case.biased else None
    rows = {}
    checked = suite.results.get("correctness", {})
    for name, call in (("triton", attention), ("triton-fp8", attention_fp8)):
        kernel = "attention" if call is attention else "attention_fp8"
        for loads in LOADS[1:]:
            wrong = [
                n
                for n, row in checked.items()
                if n.split()[0] == kernel and n.endswith(loads) and not row["right"]
            ]
            if wrong or (kernel in suite.wrong and kernel in checked):  # it did not run at all
                rows[f"{name}, {loads}"] = {"why": "it is wrong: see correctness"}
                continue
            try:
                ms = suite.ms(lambda c=call, how=loads: c(q, k, v, bias, how), 5, 1)
                rows[f"{name}, {loads}"] = {"ms": ms}
            except Exception as error:
                rows[f"{name}, {loads}"] = {"why": failure(error, 200)}
    return rows


PARTS: dict[str, Callable[[Suite], dict]] = {
    "correctness": correctness,
    "roofs": roofs,
    "quantized": quantized,
    "kernels": kernels,
    "attention": attention,
    "dit small": lambda s: dit(s, next(iter(s.configs))),
    "dit large": lambda s: dit(s, list(s.configs)[-1]),
    "pipeline": pipeline,
    "swap": swap,
    "engines": engines,
}


def run(
    suite: Suite, parts: list[str], done: Callable[[dict], None] = lambda results: None
) -> dict:
    """Run the parts in order; what breaks or is not reached is written down. `done` is called with
    all results after each."""
    import torch

    for name in parts:
        start = time.monotonic()
        if start > suite.deadline:
            suite.results[name] = {"not_reached": f"the {LIMIT_S:.0f} s were over"}
        else:
            try:
                suite.results[name] = PARTS[name](suite)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                message = (
                    f"{type(error).__name__}: {str(error)[:500]}"
                    f" ({Path(where.filename).name}:{where.lineno})"
                )
                suite.results[name] = {"failed": message}
            if suite.device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        done(suite.results)
    return suite.results


def keep(out: Path, results: dict) -> None:
    """Write <date>.json and <date>.md; again after every part, so that a run that is killed leaves
    what it had measured."""
    out.mkdir(parents=True, exist_ok=True)
    stem = results["run"]["date"][:16].replace(":", "")
    write_text(out / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    write_text(out / f"{stem}.md", markdown(results))


def fingerprint(suite: Suite) -> dict:
    """Date, commit, versions and device."""
    import torch

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    results = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
        "dry": suite.dry,
    }
    if suite.device.type == "cuda":
        results |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    try:
        import triton

        results["triton"] = triton.__version__
    except ImportError:
        results["triton"] = None
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry", action="store_true", help="every part on a CPU at tiny sizes, kernels interpreted"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="a folder for <date>.json and <date>.md")
    parser.add_argument(
        "--wheels",
        type=Path,
        help="a folder of wheels to import from (diffusers and what it needs)",
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help="seconds after which no further part begins"
    )
    args = parser.parse_args()
    if args.wheels:
        # pure-Python wheels import as they are
        sys.path[:0] = [str(w) for w in sorted(args.wheels.glob("*.whl"))]
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --dry runs every part on a CPU at tiny sizes")
    suite = Suite(args.dry, time.monotonic() + args.limit)
    mark = fingerprint(suite)
    done = lambda results: keep(args.out, {"run": mark, **results}) if args.out else None
    results = {"run": mark, **run(suite, args.parts, done)}
    print(markdown(results))
    failed = [n for n, r in results.items() if isinstance(r, dict) and "failed" in r]
    if failed or suite.wrong:
        raise SystemExit(
            f"failed: {', '.join(failed) or 'none'}; wrong:"
            f" {', '.join(sorted(suite.wrong)) or 'none'}"
        )


if __name__ == "__main__":
    main()
