"""`nexus-rt export`: arguments to a target, a pair's folders to engines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from nexus_rt.engines.exported import Bucket
from nexus_rt.export.build import Target, export_pair
from nexus_rt.pair import MINI, find_parts


def run(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Export what the arguments name."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = ("small", "large", "vae", "text_encoder", "understanding", "connector")
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    pretrained = args.pair if args.pair or args.small or args.large else MINI
    parts = find_parts(pretrained, given, {"local_files_only": args.local_files_only})
    d = parts.defaults
    sizes = args.sizes.split(",") if args.sizes else [f"{d.width}x{d.height}x{d.num_frames}"]
    precision = args.precision or ("fp32" if device.type == "cpu" else "bf16")
    target = Target(
        args.backend, precision, tuple(Bucket.parse(s) for s in sizes), device, args.opset, args.sm,
        args.weight_streaming, args.refit,
    )  # fmt: skip
    target.builder()  # what cannot be built is said before the encoders are linked
    encoders = {"vae": parts.vae, "understanding": parts.understanding, "connector": parts.connector}
    if parts.text is not None:
        encoders |= {part: parts.text / part for part in ("text_encoder", "tokenizer")}
    index = Path(pretrained) / "model_index.json" if pretrained and (Path(pretrained) / "model_index.json").is_file() else None
    output = Path(args.output).expanduser()
    present = {part: folder for part, folder in encoders.items() if folder is not None}
    built = export_pair(parts.generators, present, index, target, output, args.line, say)
    for name, engine in built.items():
        rows = engine.manifest.parity["rows"].values()
        worst = max((r["relative_error"] for r in rows), default=0.0)
        verdict = f"{len(rows)} comparisons passed, relative error at most {worst:.1e}" if rows else "NOT COMPARED"
        print(f"{output / name}: {engine.nbytes / 1e6:.1f} MB, {verdict}")
    return 0
