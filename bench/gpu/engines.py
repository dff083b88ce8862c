"""Engines and the swap in the GPU suite: what replaying and exporting gain, and what the step after
a swap waits for."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

from nexus_rt.bench.gpu import estimates
from nexus_rt.bench.gpu.setting import figure
from nexus_rt.bench.gpu.units import Unit
from nexus_rt.bench.presets import random_transformer

# of the swap: a 14B of a quarter of its blocks, so that twelve steps take seconds
LAYERS = {
    "small": 30,
    "large": 10,
}
STEPS = "small:6 large:6"
SWAPS = ("resident", "prefetched", "swapped", "streamed")


def units(s: Any) -> dict[str, Unit]:
    """A guided step of two blocks of each generator's width: eager, replayed, and by every backend
    that builds here."""
    from nexus_rt.engines.backends import ENGINE_BACKENDS

    rows = {}
    for name in dict.fromkeys(reversed(s.names)):
        blocks = cache(partial(Blocks, s, name))
        rows[f"{name}: torch"] = Unit(partial(_eager, blocks), 60.0)
        if s.device.type == "cuda":
            rows[f"{name}: torch, replayed"] = Unit(partial(_replayed, blocks), 60.0)
        for backend in ENGINE_BACKENDS:
            if not s.dry or backend == "onnx":  # others are compiled and built in their own tests
                rows[f"{name}: {backend}"] = Unit(partial(_exported, s, blocks, backend), 150.0)
    return rows


class Blocks:
    """Two blocks of random weights in a folder, and what they make of one step."""

    def __init__(self, s: Any, name: str) -> None:
        import torch

        from nexus_rt.engines.torch import TorchEngine

        self.s, self.size = s, s.size
        self.folder = tempfile.TemporaryDirectory()
        self.source = _saved(s, {**s.configs[name], "num_layers": 2}, Path(self.folder.name) / "m")
        model = _loaded(s, self.source)
        self.latents = s.random(1, 16, *s.size.latent, dtype=torch.float32)
        self.timestep = torch.tensor(700.0, device=s.device)
        self.embeds = s.random(2, 40, model.config.text_dim)
        self.eager = TorchEngine(model)
        self.wanted = self.velocity(self.eager)().float()

    def velocity(self, engine: Any) -> Any:
        """A step of an engine, as a call."""
        context = engine.prepare(self.embeds)
        return lambda: engine.velocity(self.latents, self.timestep, context)

    @cached_property
    def eager_ms(self) -> float:
        return self.s.ms(self.velocity(self.eager), 5, 1)

    def row(self, engine: Any) -> dict:
        """Its time, against PyTorch's, and how far it is from it."""
        call = self.velocity(engine)
        got, ms = call().float(), self.s.ms(call, 5, 1)
        error = float((got - self.wanted).norm() / self.wanted.norm())
        return {"ms": ms, "against_torch": figure(self.eager_ms / ms), "difference": error}


def _eager(blocks: Any) -> dict:
    return {"ms": blocks().eager_ms}


def _replayed(blocks: Any) -> dict:
    from nexus_rt.engines.cuda_graphs import ReplayedEngine

    return blocks().row(ReplayedEngine(blocks().eager))


def _exported(s: Any, blocks: Any, backend: str) -> dict:
    """Exported as a user would, parity gate and all, from a folder of random weights."""
    from nexus_rt.core.errors import InputError
    from nexus_rt.engines.registry import open_engine
    from nexus_rt.export.build import Target, export_component
    from nexus_rt.export.components import GeneratorComponent

    try:  # before the blocks are made: what is missing here is known without them
        target = Target(backend, "fp32" if s.dry else "bf16", (s.size,), s.device)
        target.builder()
    except InputError as error:
        return {"why": str(error)}
    own = blocks()
    with _cache(own.folder.name):
        start = time.monotonic()
        made = export_component(GeneratorComponent("small", own.source), target, "the GPU suite")
        built = time.monotonic() - start
        engine = open_engine(made.path, s.device)
        start = time.monotonic()
        engine.load()
        loaded = time.monotonic() - start
        row = own.row(engine)
        engine.unload()
    worst = max(r["relative_error"] for r in made.manifest.parity["rows"].values())
    return {
        **row,
        "build_s": round(built, 1),
        "load_s": round(loaded, 2),
        "mb": made.nbytes // 10**6,
        "parity_error": worst,
    }


def swap(s: Any) -> dict[str, Unit]:
    """The step after the handoff against the median of the large one's steps, and peak memory
    against what was planned, in every mode of residency."""
    pair, configs = cache(partial(Pair, s)), list(shortened(s).values())
    seconds = {
        "resident": estimates.compile_s(4) + estimates.swap_s(s, configs, 6, 2),
        "prefetched": estimates.swap_s(s, configs, 6, 1),
    }
    return {m: Unit(partial(_swapped, pair, m), 60.0, seconds.get(m, 0.0)) for m in SWAPS}


def shortened(s: Any) -> dict[str, dict[str, Any]]:
    """Architectures of the swap's generators, "small" and "large"."""
    out = {}
    for role, name in zip(("small", "large"), s.names, strict=True):
        config = s.configs[name]
        out[role] = {**config, "num_layers": min(LAYERS[role], config["num_layers"])}
    return out


class Pair:
    """Both generators, the large one of a quarter of its blocks, on their way in and out."""

    def __init__(self, s: Any) -> None:
        import torch

        from nexus_rt.engines.torch import TorchEngine
        from nexus_rt.method.generator import Prompt
        from nexus_rt.method.plan_text import parse_plan
        from nexus_rt.method.time_grid import time_grid

        self.s, self.engines = s, {}
        for role, config in shortened(s).items():
            model = random_transformer(config, s.dtype, s.device).use_kernels(
                s.kernels, s.attention
            )
            self.engines[role] = TorchEngine(model, device=s.device)
            self.engines[role].unload()
        self.plan = parse_plan(STEPS, time_grid(12))
        embeds = s.random(1, 40, self.engines["small"].model.config.text_dim)
        self.prompts = dict.fromkeys(self.engines, Prompt(embeds))
        self.noise = s.random(1, 16, *s.size.latent, dtype=torch.float32)
        self.walk("resident", lambda *_: None)  # warms everything up

    def walk(self, mode: str, on_step: Any) -> Any:
        """The plan once; what residency was decided."""
        from nexus_rt.method.guidance import Guidance
        from nexus_rt.method.hooks import Hooks
        from nexus_rt.method.loop import sample
        from nexus_rt.pipeline.memory_use import call_parts
        from nexus_rt.pipeline.residency import Residency, plan_residency

        for engine in self.engines.values():
            engine.unload()
        parts = call_parts(self.engines, {}, self.s.size, 1)
        decided = plan_residency(self.plan, parts, mode=mode)
        for engine in self.engines.values() if mode == "resident" else ():
            engine.load()
        sample(
            self.noise,
            self.plan,
            self.engines,
            self.prompts,
            Guidance.of(1.0),
            kernels=self.s.kernels,
            hooks=Hooks(on_step=on_step, residency=Residency(decided, self.engines)),
        )
        return decided


def _swapped(pair: Any, mode: str) -> dict:
    import torch

    own = pair()
    cuda = own.s.device.type == "cuda"
    for engine in own.engines.values():
        engine.unload()
    held = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = _Clock(cuda)
    decided = own.walk(mode, lambda *_: clock.tick())
    steps = clock.durations()
    large = steps[6:]
    row = {
        "small_ms": figure(median(steps[1:6])),
        "large_ms": figure(median(large[1:])),
        "first_large_ms": figure(large[0]),
        "first_over_median": figure(large[0] / median(large[1:])),
    }
    if cuda:
        peak = torch.cuda.max_memory_allocated() - held
        row |= {"peak_gib": figure(peak / 2**30), "planned_over_peak": figure(decided.peak / peak)}
    return row


class _Clock:
    """Milliseconds between ticks: by events on a GPU, so that nothing waits."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[Any] = []  # events, or seconds
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


def _saved(s: Any, config: dict, folder: Path) -> Path:
    """A random model as a folder of weights."""
    import json

    from safetensors.torch import save_file

    from nexus_rt.loading.layouts import to_diffusers

    model = random_transformer(config, s.dtype, s.device)
    folder.mkdir()
    state = {
        k: v.contiguous().cpu() for k, v in to_diffusers(dict(model.named_parameters())).items()
    }
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **config})
    )
    return folder


def _loaded(s: Any, folder: Path):
    from nexus_rt.loading.transformer import load_transformer

    return load_transformer(folder, s.dtype, s.device)
