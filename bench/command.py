"""`nexus-rt bench`: arguments to results, and results to a table, JSON, HTML and SVG."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nexus_rt.bench import results as files
from nexus_rt.bench.estimate import estimate, matrix_tflops
from nexus_rt.bench.latency import Clip, Engine, quiet, suite
from nexus_rt.bench.page import drawing, page
from nexus_rt.bench.peers import measure_peers, parse_peers
from nexus_rt.bench.presets import (
    PROMPT,
    Need,
    find_preset,
    need_of,
    random_pipeline,
    random_prompt,
)
from nexus_rt.bench.scaling import scaling
from nexus_rt.bench.schema import report_of
from nexus_rt.bench.terminal import text
from nexus_rt.core.checks import number, whole
from nexus_rt.core.errors import InputError, ModelError, NexusError, choose
from nexus_rt.core.limits import MAX_FRAMES, MAX_SIDE, MAX_STEPS
from nexus_rt.core.part_files import scratch_folder
from nexus_rt.core.paths import as_path, check_outputs
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.backends import ENGINE_BACKENDS
from nexus_rt.engines.experts import changed
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.loading.experts import GeneratorSource
from nexus_rt.loading.packing import check_dense
from nexus_rt.method.plan_options import has_clocks
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.pipeline.assemble import default_device, default_dtype
from nexus_rt.pipeline.defaults import pair_defaults, pair_index
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.pipeline.request import default_grid, make_guidance
from nexus_rt.pipeline.settings import CallSettings, Defaults
from nexus_rt.pipeline.sources import ModelSources

ENGINES = ("torch", "compiled", *ENGINE_BACKENDS)
ESTIMATES = ("auto", "never", "always")
RANGES = (  # of whole numbers: option, least, most
    ("runs", 1, 10_000),
    ("warmup", 0, 10_000),
    ("accuracy", 0, 100_000),
    ("steps", 1, MAX_STEPS),
    ("frames", 1, MAX_FRAMES),
    ("seed", 0, 2**64 - 1),
)
RANDOM = (
    "random weights of the true architecture: the latency is valid, the pictures are not;"
    " embeddings are given, no text is read"
)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Measure, or compare two files."""
    if args.action:
        if args.action[0] != "compare" or len(args.action) != 3:
            raise InputError(
                f"{' '.join(args.action)!r} is nothing to do; expected `nexus-rt bench compare"
                " A.json B.json`, or options.",
                code="unknown_name",
                param="action",
            )
        return compare(*args.action[1:])
    check_outputs(args.json, args.html, args.plot)
    if args.plot and Path(args.plot).suffix != ".svg":
        raise InputError(
            f"--plot is {args.plot}; it draws SVG: expected a name that ends in .svg.", param="plot"
        )
    for name, least, most in RANGES:
        if (value := getattr(args, name)) is not None:
            whole(f"--{name}", value, least, most)
    for side in args.size or ():
        whole("--size", side, 1, MAX_SIDE)
    if args.tflops is not None:
        number("--tflops", args.tflops, 1e-6, 1e9)
    measured = files.finite({"rows": [], **measure(args)})
    print(text(report_of(measured)))
    write(measured, args)
    return 0


def compare(before: str, after: str) -> int:
    """Print what changed; 1 where something became worse beyond noise."""
    lines, worse = files.compare(files.read(before), files.read(after))
    print("\n".join(lines))
    if worse:
        print("\n".join(["", f"{len(worse)} regressions beyond noise:", *worse]))
        return 1
    print("no regression beyond noise")
    return 0


def write(report: dict[str, Any], args: argparse.Namespace) -> None:
    # the page has them
    without = {
        **report,
        "rows": [{k: v for k, v in r.items() if k != "thumbnail"} for r in report["rows"]],
    }
    made = (
        (args.json, lambda: json.dumps(without, indent=1) + "\n"),
        (args.html, lambda: page(report)),
        (args.plot, lambda: drawing(report) + "\n"),
    )
    for path, content in made:
        if path:
            files.write_text(as_path("output", path), content())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the arguments ask for, as a results file holds it."""
    preset, peers = find_preset(args.preset), parse_peers(args.vs)
    choose("estimate", args.estimate, ESTIMATES)
    engines = [choose("engine", e.strip(), ENGINES) for e in args.engines.split(",")]
    device = default_device(args.device)
    dtype = default_dtype(getattr(torch, args.dtype) if args.dtype else None, device)
    named = args.pair or args.small or args.large
    configs = None if named else preset.configs
    real = configs is None  # weights of folders
    notes: list[str] = []
    report: dict[str, Any] = {
        "schema": files.SCHEMA,
        "kind": files.KIND,
        "preset": preset.name,
        "notes": notes,
    }
    mark = lambda weights: files.fingerprint(device, weights, args.line)
    prompt: str | None = None
    embeds: dict[str, torch.Tensor] = {}
    make: Callable[[], NexusPipeline] | None = None
    if configs is None:
        pipe, make, folders = _real(args, device, dtype)
        report["fingerprint"] = mark(files.weights_fingerprint(folders))
        prompt = args.prompt or PROMPT
    else:
        size = _size(args, preset.size or ClipSize.of_defaults(Defaults()))
        configs = _configs(args, configs)
        need = need_of(configs, dtype, device, size)
        if args.estimate == "always" or need.short:
            sentence = need.sentence(preset.name, device)
            if need.short and args.estimate == "never":
                raise ModelError(f"{sentence}.", code="out_of_memory", param="estimate")
            notes.append(
                f"{sentence}. Estimated on the meta device instead."
                if need.short
                else "estimated, as asked"
            )
            say(notes[0])
            return {
                **report,
                "fingerprint": mark({}),
                "estimate": _estimate(args, configs, need, size, device, dtype),
            }
        notes.append(RANDOM)
        say(RANDOM)
        pipe = random_pipeline(configs, dtype, device, size)
        embeds, report["fingerprint"] = random_prompt(pipe, dtype), mark({})
    quiet(pipe)
    d = pipe.defaults
    own = ClipSize.of_defaults(d)
    size = _size(args, preset.size or own)
    steps = len(default_grid(d, args.steps))
    pipe.grid.check(size)
    shipped = real and not named and len(pipe.engines) > 1
    riddles = args.accuracy if shipped and size == own else 0
    clip = Clip(size, steps, args.seed, prompt, embeds, riddles)
    plans = _plans(args.plans, pipe.engines, d.plan)
    for name in plans:  # a plan that does not parse is raised before anything is measured
        pipe.make_plan(name, None if has_clocks(name) else steps)
    report |= {"prompt": prompt, "size": list(size), "steps": steps, "seed": args.seed}
    with scratch_folder("nexus-rt-bench") as place:
        made, failed = [Engine("torch", pipe, make)], []
        for name in dict.fromkeys(engines):
            if name == "torch":
                continue
            try:
                made.append(_engine(name, args, pipe, real, size, device, place, notes))
            except NexusError as error:
                failed += [
                    {
                        "plan": p,
                        "engine": name,
                        "size": list(size),
                        "steps": steps,
                        "failed": str(error),
                    }
                    for p in plans
                ]
        wanted = [e for e in made if e.name in engines]
        traces = as_path("--trace", args.trace) if args.trace else None
        if wanted and wanted[0] is not made[0]:
            wanted.insert(0, made[0])
        report |= suite(wanted or made, plans, clip, args.runs, args.warmup, traces, say)
        report["rows"] += failed
    if peers:
        embeds = embeds or _embeds(pipe, prompt or PROMPT)
        both = replace(clip, embeds=embeds)
        rows = []
        for name in peers:
            say(f"peer: {name}")
            rows += measure_peers(pipe, (name,), both, args.runs, max(1, args.warmup), tuple(plans))
        report["peers"] = rows
    if args.scaling:
        report["scaling"] = scaling(pipe, clip, args.runs, say)
    return report


def _size(args: argparse.Namespace, usual: ClipSize) -> ClipSize:
    width, height = args.size or usual[:2]
    return ClipSize(width, height, args.frames or usual.frames)


def _plans(text: str | None, generators: Iterable[str], plan: str) -> list[str]:
    """Plans of `--plans`, or those that tell a pair's price, `plan` its own."""
    if text:
        return _plan_names(text)
    names = list(generators)
    return names if len(names) < 2 else list(dict.fromkeys(["reference", plan, "auto=0.02"]))


def _plan_names(text: str) -> list[str]:
    """A list of plans; those that hold commas themselves (`handoff=0.3,bridge=4`) are joined
    again."""
    chosen: list[str] = []
    for piece in text.split(","):
        if piece.strip().startswith("bridge=") and chosen:
            chosen[-1] += f",{piece.strip()}"
        elif piece.strip():
            chosen.append(piece.strip())
    return list(dict.fromkeys(chosen))


def _configs(
    args: argparse.Namespace, configs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Architectures of the generators that the plans run: with `--plans large` the small one is not
    made."""
    plans = _plan_names(args.plans) if args.plans else []
    alone = [n for n in configs if plans and all(p == n for p in plans)]
    return {n: c for n, c in configs.items() if not alone or n in alone}


def _real(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[NexusPipeline, Callable[[], NexusPipeline], dict[str, GeneratorSource]]:
    """A pipeline of folders, a way to read it again, and the generators' folders."""
    sources = ModelSources.of(vars(args))
    folders = sources.find()[1].generators
    make = lambda: NexusPipeline.from_pretrained(
        **sources.keywords,
        torch_dtype=dtype,
        kernels=args.kernels,
        attention=args.attention,
    )
    return make(), make, folders


def _engine(
    name: str,
    args: argparse.Namespace,
    pipe: NexusPipeline,
    real: bool,
    size: ClipSize,
    device: torch.device,
    place: Path,
    notes: list[str],
) -> Engine:
    """The pair on another engine: its blocks compiled, or exported (and kept in the cache) with its
    VAE and text encoder."""
    if name == "compiled":
        from copy import copy

        twin = copy(pipe)
        compiled = lambda engine: TorchEngine(_compiled(engine.model))
        twin.engines = {n: changed(e, compiled) for n, e in pipe.engines.items()}
        return Engine(name, twin)
    if not real:
        raise InputError(
            "engines are exported of folders of weights; pass --small and --large",
            code="missing",
            param="engines",
        )
    from nexus_rt.export.build import Target, export_components
    from nexus_rt.export.components import chosen_components, folders_beside
    from nexus_rt.loading.lora import parse_loras

    precision = "fp32" if device.type == "cpu" else "bf16"
    target = Target(name, precision, (size,), device)
    target.builder()
    pretrained, parts_found = ModelSources.of(vars(args)).find()
    others = {"vae": parts_found.vae, "text_encoder": parts_found.text}
    exported = (
        args.parts.split(",")
        if args.parts
        else [*parts_found.generators, *(n for n, f in others.items() if f)]
    )
    loras = {
        n: parse_loras(sources)
        for n in ("small", "large")
        if (sources := getattr(args, f"{n}_lora"))
    }
    parts = chosen_components(parts_found, ",".join(exported), loras)
    index = pair_index(Path(pretrained) if pretrained else None, pair_defaults(parts_found.stated))
    export_components(
        parts,
        folders_beside(parts_found, parts),
        index,
        target,
        place / name,
        args.line,
        say,
        lasting=False,
    )
    make = lambda: NexusPipeline.from_engines(place / name, device=device, kernels=args.kernels)
    notes.append(f"{name}: {', '.join(exported)} as engines in {precision}, the rest in PyTorch")
    return Engine(name, quiet(make()), make)


def _compiled(model: Any) -> Any:
    """A transformer on the same memory whose blocks are compiled.

    Raises:
        InputError: its weights are quantised.
    """
    check_dense(model)
    from nexus_rt.models.wan import WanTransformer

    with torch.device("meta"):
        twin = WanTransformer(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.use_kernels(model.ops.name, "auto").eval()
    for block in twin.blocks:
        block.compile()
    return twin


def _embeds(pipe: NexusPipeline, prompt: str) -> dict[str, torch.Tensor]:
    embeds, none = pipe.encode_prompt(prompt)
    return {"prompt_embeds": embeds, "negative_prompt_embeds": none}


def _estimate(
    args: argparse.Namespace,
    configs: dict[str, dict[str, Any]],
    need: Need,
    size: ClipSize,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    d = Defaults()
    grid = default_grid(d, args.steps)
    plans = [parse_plan(name, grid) for name in _plans(args.plans, configs, d.plan)]
    tflops = args.tflops or matrix_tflops(device, dtype)
    guidance = make_guidance(CallSettings(), d)
    return estimate(configs, need, size, plans, (guidance.small, guidance.large), tflops)
