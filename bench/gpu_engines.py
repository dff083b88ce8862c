"""Engines and the swap in the GPU suite: what replaying and exporting gain, and what the step after
a swap waits for."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from nexus_rt.bench.measure import failure_in
from nexus_rt.bench.presets import random_transformer

# of the swap: a 14B of a quarter of its blocks, so that twelve steps take seconds
LAYERS = {
    "small": 30,
    "large": 10,
}
STEPS = "small:6 large:6"


def engines(suite: Any) -> dict:
    """A guided step of two blocks of each generator's width: eager, replayed, and by every backend
    that builds here."""
    rows: dict[str, Any] = {}
    for name, config in suite.configs.items():
        rows |= {f"{name}: {label}": row for label, row in _engines(suite, config).items()}
    return rows


def _engines(suite: Any, config: dict) -> dict:
    """Each is exported as a user would, parity gate and all, from a folder of random weights."""
    import torch

    from nexus_rt.engines.backends import ENGINE_BACKENDS
    from nexus_rt.engines.cuda_graphs import ReplayedEngine
    from nexus_rt.engines.registry import open_engine
    from nexus_rt.engines.torch import TorchEngine
    from nexus_rt.export.build import Target, export_component
    from nexus_rt.export.components import GeneratorComponent

    size, config = suite.size, {**config, "num_layers": 2}
    latents, rows = suite.random(1, 16, *size.latent, dtype=torch.float32), {}
    timestep = torch.tensor(700.0, device=suite.device)
    with tempfile.TemporaryDirectory() as folder, _cache(folder):
        source = _saved(suite, config, Path(folder) / "model")
        model = _loaded(suite, source)
        embeds = suite.random(2, 40, model.config.text_dim)
        eager = TorchEngine(model)
        context = eager.prepare(embeds)
        wanted = eager.velocity(latents, timestep, context).float()
        rows["torch"] = {"ms": suite.ms(lambda: eager.velocity(latents, timestep, context), 5, 1)}
        if suite.device.type == "cuda":
            with failure_in(rows, "torch, replayed"):
                replayed = ReplayedEngine(eager)
                context = replayed.prepare(embeds)
                rows["torch, replayed"] = _row(
                    suite, replayed, latents, timestep, context, wanted, rows["torch"]["ms"]
                )
        precision = "fp32" if suite.dry else "bf16"
        for backend in ENGINE_BACKENDS:
            if suite.dry and backend != "onnx":
                continue  # compiled and built in tests of their own
            with failure_in(rows, backend):
                start = time.monotonic()
                target = Target(backend, precision, (size,), suite.device)
                made = export_component(
                    GeneratorComponent("small", source), target, "the GPU suite"
                )
                built = time.monotonic() - start
                engine = open_engine(made.path, suite.device)
                start = time.monotonic()
                engine.load()
                loaded = time.monotonic() - start
                row = _row(
                    suite,
                    engine,
                    latents,
                    timestep,
                    engine.prepare(embeds),
                    wanted,
                    rows["torch"]["ms"],
                )
                worst = max(r["relative_error"] for r in made.manifest.parity["rows"].values())
                rows[backend] = {
                    **row,
                    "build_s": round(built, 1),
                    "load_s": round(loaded, 2),
                    "mb": made.nbytes // 10**6,
                    "parity_error": worst,
                }
                engine.unload()
    return rows


def swap(suite: Any) -> dict:
    """The step after the handoff against the median of the large one's steps, and peak memory
    against what was planned, in every mode of residency."""
    import torch

    from nexus_rt.engines.torch import TorchEngine
    from nexus_rt.memory.residency import Residency, call_parts, plan_residency
    from nexus_rt.plan_text import parse_plan
    from nexus_rt.sampling import denoise
    from nexus_rt.solver import time_grid
    from nexus_rt.step_runners import Prompt

    cuda = suite.device.type == "cuda"
    size, names = suite.size, list(suite.configs)
    made = {}
    for role, name in (("small", names[0]), ("large", names[-1])):
        layers = min(LAYERS[role], suite.configs[name]["num_layers"])
        config = {**suite.configs[name], "num_layers": layers}
        model = random_transformer(config, suite.dtype, suite.device).use_kernels("auto")
        made[role] = TorchEngine(model, device=suite.device)
        made[role].unload()
    plan = parse_plan(STEPS, time_grid(12))
    embeds = suite.random(1, 40, made["small"].model.config.text_dim)
    prompts, noise = (
        dict.fromkeys(made, Prompt(embeds)),
        suite.random(1, 16, *size.latent, dtype=torch.float32),
    )
    rows: dict[str, Any] = {}
    # the first warms everything up
    for mode in (
        "resident",
        "resident",
        "prefetched",
        "swapped",
        "streamed",
    ):
        with failure_in(rows, mode):
            for engine in made.values():
                engine.unload()
            held = torch.cuda.memory_allocated() if cuda else 0
            decided = plan_residency(plan, call_parts(made, {}, size, 1), mode=mode)
            for engine in made.values() if mode == "resident" else ():
                engine.load()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            clock = _Clock(cuda)
            denoise(
                noise,
                plan,
                made,
                prompts,
                guidance_scale=1.0,
                residency=Residency(decided, made),
                on_step=lambda *_, clock=clock: clock.tick(),
            )
            steps = clock.durations()
            large = steps[6:]
            rows[mode] = {
                "small_ms": median(steps[1:6]),
                "large_ms": median(large[1:]),
                "first_large_ms": large[0],
                "first_over_median": large[0] / median(large[1:]),
            }
            if cuda:
                peak = torch.cuda.max_memory_allocated() - held
                rows[mode] |= {"peak_gib": peak / 2**30, "planned_over_peak": decided.peak / peak}
    short = lambda v: float(f"{v:.4g}")
    return {
        mode: {k: short(v) if isinstance(v, float) else v for k, v in row.items()}
        for mode, row in rows.items()
    }


class _Clock:
    """Milliseconds between ticks: by events on a GPU, so that nothing waits."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.marks = cuda, []
        self.tick()

    def tick(self) -> None:
        import torch

        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def durations(self) -> list[float]:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) if self.cuda else 1000 * (b - a) for a, b in pairs]


def _row(suite: Any, engine: Any, latents, timestep, context, wanted, peer_ms: float) -> dict:
    got = engine.velocity(latents, timestep, context).float()
    ms = suite.ms(lambda: engine.velocity(latents, timestep, context), 5, 1)
    error = float((got - wanted).norm() / wanted.norm())
    return {"ms": ms, "against_torch": float(f"{peer_ms / ms:.4g}"), "difference": error}


@contextlib.contextmanager
def _cache(folder: str):
    """Engines built in a folder that goes away."""
    before = os.environ.get("NEXUS_RT_CACHE")
    os.environ["NEXUS_RT_CACHE"] = str(Path(folder) / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["NEXUS_RT_CACHE"]
        else:
            os.environ["NEXUS_RT_CACHE"] = before


def _saved(suite: Any, config: dict, folder: Path) -> Path:
    """A random model as a folder of weights."""
    import json

    from safetensors.torch import save_file

    from nexus_rt.loading.checkpoint import to_diffusers

    model = random_transformer(config, suite.dtype, suite.device)
    folder.mkdir()
    state = {
        k: v.contiguous().cpu() for k, v in to_diffusers(dict(model.named_parameters())).items()
    }
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **config})
    )
    return folder


def _loaded(suite: Any, folder: Path):
    from nexus_rt.loading.transformer import load_transformer

    return load_transformer(folder, suite.dtype, suite.device)
