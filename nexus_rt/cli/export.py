"""`nexus-rt export`: arguments to a target, a pair's folders to engines."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_rt.cli.arguments import models
from nexus_rt.cli.pipeline import check_device
from nexus_rt.core.errors import InputError
from nexus_rt.engines.backends import ENGINE_BACKENDS
from nexus_rt.pipeline.sources import ModelSources

if TYPE_CHECKING:
    from nexus_rt.engines.folder import EngineFolder
    from nexus_rt.export.components import Component


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    export = commands.add_parser(
        "export",
        parents=[models()],
        help="make engines of a pair's parts, compared before they count",
    )
    export.add_argument(
        "--backend", default="onnx", help=f"{' | '.join(ENGINE_BACKENDS)} (default onnx)"
    )
    export.add_argument(
        "--precision",
        default=None,
        help="fp32 | fp16 | bf16 | int8 (onnx on a CPU; default: bf16 on a GPU, fp32 on a CPU)",
    )
    export.add_argument(
        "--parts",
        metavar="A,B,...",
        help="parts to export: small, large, vae, text_encoder (default: small,large)",
    )
    export.add_argument(
        "--sizes",
        metavar="WxHxF,...",
        help=(
            "such as 832x480x81,1280x720x81, or a range 256x256x17..832x480x81 (default: the"
            " pair's)"
        ),
    )
    export.add_argument(
        "--opset",
        type=int,
        default=23,
        help="ONNX operator set: 23 (default), or 20 for consumers that lack it",
    )
    export.add_argument(
        "--sm",
        metavar="X.Y",
        help="compute capability that tensorrt-rtx builds for (default: all it knows)",
    )
    export.add_argument(
        "--weight-streaming",
        action="store_true",
        help="TensorRT: allow weights to stay in host memory",
    )
    export.add_argument(
        "--refit", action="store_true", help="TensorRT: allow weights to be replaced in the engine"
    )
    export.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="DIR",
        help="the folder for `generate --engines DIR`",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    from nexus_rt.core.log import chose
    from nexus_rt.core.paths import as_path
    from nexus_rt.core.size import parse_sizes
    from nexus_rt.export.build import Target, export_components
    from nexus_rt.export.components import chosen_components, folders_beside
    from nexus_rt.loading.lora import parse_loras
    from nexus_rt.pipeline.assemble import default_device
    from nexus_rt.pipeline.defaults import pair_defaults, pair_index
    from nexus_rt.pipeline.recipes import find_recipes, with_recipes

    check_device(args.device)
    device = default_device(args.device)
    pretrained, pair = ModelSources.of(vars(args)).find()
    d = pair_defaults(pair.stated)
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
    defaults = with_recipes(d, recipes)
    index = pair_index(Path(pretrained) if pretrained else None, defaults)
    output = as_path("--output", args.output)
    with progress(parts) as say:
        built = export_components(
            parts, folders_beside(pair, parts), index, target, output, args.line, say
        )
    for name, engine in built.items():
        print(f"{output / name}: {engine.nbytes / 1e6:.1f} MB, {_verdict(engine)}")
    return 0


@contextlib.contextmanager
def progress(parts: list[Component]) -> Iterator[Callable[[str], None]]:
    """Something to call with a line a stage: on a terminal a bar over the stages, whose clock goes
    on while one builds for minutes; elsewhere the lines."""
    from nexus_rt.core.progress import progress_bar

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


def _verdict(engine: EngineFolder) -> str:
    rows = engine.manifest.parity["rows"].values()
    worst = max((r["relative_error"] for r in rows), default=0.0)
    return (
        f"{len(rows)} comparisons passed, relative error at most {worst:.1e}"
        if rows
        else "NOT COMPARED"
    )
