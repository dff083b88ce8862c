"""`nexus-rt export`: arguments to a target, a pair's folders to engines."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nexus_rt.core.errors import InputError, choose
from nexus_rt.core.log import chose
from nexus_rt.core.paths import as_path
from nexus_rt.core.progress import progress_bar
from nexus_rt.core.size import parse_sizes
from nexus_rt.engines.folder import EngineFolder
from nexus_rt.export.build import Target, export_components
from nexus_rt.export.components import (
    Component,
    DecoderComponent,
    GeneratorComponent,
    TextComponent,
)
from nexus_rt.loading.experts import ExpertFolders, GeneratorSource, transformers_of
from nexus_rt.loading.locate import find_text
from nexus_rt.loading.lora import Lora, loras_of, parse_loras
from nexus_rt.loading.pair_folder import PairFolders, pair_index
from nexus_rt.pipeline.assemble import default_device
from nexus_rt.pipeline.recipes import find_recipes, with_recipes
from nexus_rt.pipeline.sources import ModelSources

NAMES = ("small", "large", "vae", "text_encoder")


@contextlib.contextmanager
def progress(parts: list[Component]) -> Iterator[Callable[[str], None]]:
    """Something to call with a line a stage: on a terminal a bar over the stages, whose clock goes
    on while one builds for minutes; elsewhere the lines."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    stages = sum(3 + len(p.graphs()) for p in parts)  # reading, tracing, each graph, comparing
    over, width = threading.Event(), shutil.get_terminal_size().columns or 80
    with progress_bar(
        total=stages,
        unit="stage",
        bar_format="{percentage:3.0f}% {elapsed} {desc}",
        ncols=width,
        nrows=9,
    ) as bar:

        def say(line: str) -> None:
            bar.update(bar.n < stages)
            bar.set_description_str(line)

        def tick() -> None:
            while not over.wait(1):
                bar.refresh()

        clock = threading.Thread(target=tick, daemon=True)
        clock.start()
        try:
            yield say
        finally:
            over.set()
            clock.join()


def run(args: argparse.Namespace) -> int:
    """Export what the arguments name."""
    device = default_device(args.device)
    pretrained, pair = ModelSources.of(vars(args)).find()
    d = pair.defaults
    usual = f"{d.width}x{d.height}x{d.num_frames}"
    sizes, ends = parse_sizes(usual if args.sizes is None else args.sizes)
    precision = args.precision or ("fp32" if device.type == "cpu" else "bf16")
    if not args.precision:
        chose("precision", precision, f"the device is {device}")
    sm = None if args.sm is None else capability(args.sm)
    target = Target(
        args.backend,
        precision,
        sizes,
        device,
        args.opset,
        sm,
        args.weight_streaming,
        args.refit,
        ends,
    )
    target.builder()  # what cannot be built is raised before anything is read
    loras = {
        n: parse_loras(sources)
        for n in ("small", "large")
        if (sources := getattr(args, f"{n}_lora"))
    }
    parts = chosen_components(pair, args.parts, loras)
    names = {"small": args.small_recipe, "large": args.large_recipe}
    recipes = find_recipes(pair.generators, loras, names)
    # engines are run as what they were made of
    defaults = with_recipes(pair.defaults, recipes)
    index = pair_index(Path(pretrained) if pretrained else None, defaults)
    output = as_path("--output", args.output)
    with progress(parts) as say:
        built = export_components(
            parts, folders_beside(pair, parts), index, target, output, args.line, say
        )
    for name, engine in built.items():
        print(f"{output / name}: {engine.nbytes / 1e6:.1f} MB, {_verdict(engine)}")
    return 0


def capability(text: str) -> str:
    """A compute capability as "8.9", however it is written: 8.9, 89, sm_89, sm89.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(?:sm_?)?([0-9]{1,2})\.?([0-9])a?", text.strip().lower())
    if not match:
        raise InputError(
            f"--sm is {text!r}; expected a compute capability, such as 8.9.", param="sm"
        )
    return f"{int(match[1])}.{match[2]}"


def chosen_components(
    pair: PairFolders,
    names: str | None,
    loras: Mapping[str, tuple[Lora, ...]] | None = None,
) -> list[Component]:
    """Components of a pair to export: those named, or its generators, with what is merged into
    them.

    Raises:
        InputError: an unknown part, or one that the pair has not.
    """
    chosen = [n.strip() for n in names.split(",")] if names else list(pair.generators)
    parts: list[Component] = []
    for name in dict.fromkeys(choose("part", n, NAMES) for n in chosen):
        folder = {**pair.generators, "vae": pair.vae, "text_encoder": pair.text}.get(name)
        if folder is None:
            raise InputError(
                f"there is no {name} here to export; pass --{name.replace('_', '-')}, or other"
                " --parts.",
                code="missing",
                param=name,
            )
        if name == "vae":
            parts.append(DecoderComponent(folder))
        elif name == "text_encoder":
            parts.append(TextComponent(folder, pair.tokenizer))
        else:
            parts += _generators(name, folder, (loras or {}).get(name, ()))
    return parts


def _generators(name: str, source: GeneratorSource, loras: Sequence[Lora]) -> list[Component]:
    """A generator's engines: one, or one for each expert."""
    folders = transformers_of(source)
    own = loras_of(name, folders, loras)
    boundary = source.boundary if isinstance(source, ExpertFolders) else None
    return [
        GeneratorComponent(f"{name}-{e}" if e else name, folder, tuple(own[e]), boundary)
        for e, folder in folders.items()
    ]


def folders_beside(pair: PairFolders, parts: list[Component]) -> dict[str, Path]:
    """What a folder of engines needs besides them: encoders and VAE that are not exported, and the
    tokenizer."""
    folders = {"vae": pair.vae, "understanding": pair.understanding, "connector": pair.connector}
    if pair.text is not None:
        folders |= dict(
            zip(("text_encoder", "tokenizer"), find_text(pair.text, pair.tokenizer), strict=True)
        )
    exported = {p.name for p in parts}
    beside = {name: f for name, f in folders.items() if f is not None and name not in exported}
    for name, folder in beside.items():
        if folder.is_file():
            raise InputError(
                f"the {name.replace('_', ' ')} is a single file, {folder}, and engines stand beside"
                " folders; make one of it first: `nexus-rt convert wan`.",
                code="unsupported",
                param=name,
            )
    return beside


def _verdict(engine: EngineFolder) -> str:
    rows = engine.manifest.parity["rows"].values()
    worst = max((r["relative_error"] for r in rows), default=0.0)
    return (
        f"{len(rows)} comparisons passed, relative error at most {worst:.1e}"
        if rows
        else "NOT COMPARED"
    )
