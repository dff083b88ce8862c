"""Compile every kernel variant the runtime launches for GPUs that need not be here, and read what
it takes of them.

    python -m nexus_rt.bench.aot                       # a Markdown table: registers, spills, ...
    python -m nexus_rt.bench.aot --arch 90 --json -    # one architecture, as JSON
    python -m nexus_rt.bench.aot --arch 90 --loops attention    # the inner loops of such names

Needs triton, no GPU and no driver: Triton compiles to PTX, and the `ptxas` it ships assembles that
for sm_80, sm_90a, sm_100a and sm_120a and prints what the program uses. Occupancy is computed from
that by the rules of the CUDA C++ programming guide ("Compute Capabilities"), not measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nexus_rt.bench.sass import disassemble, inner_loop

# files of kernels/ with a `variants()`
KERNELS = (
    "band_blend",
    "band_filter",
    "solver_step",
    "modulate",
    "quantise_rows",
    "qk_norm_rope",
    "attention",
    "attention_fp8",
)
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
REGISTERS = 65536  # a multiprocessor, on all of them


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds: resident warps, blocks, bytes of shared memory; each block takes
    1 KiB more than it asks."""

    warps: int
    blocks: int
    shared: int


LIMITS = {
    80: Limits(64, 32, 164 << 10),
    90: Limits(64, 32, 228 << 10),
    100: Limits(64, 32, 228 << 10),
    120: Limits(48, 24, 100 << 10),
}


def occupancy(arch: int, warps: int, registers: int, shared: int) -> tuple[int, str]:
    """Warps that a multiprocessor holds at once of a program, and what keeps it from more:
    "registers", "shared memory", "warps" or "blocks".

    Args:
        warps: of a block. registers: of a thread; given out to warps in units of 256, a quarter of
            them in each of four partitions. shared: bytes of a block.
    """
    most = LIMITS[arch]
    each = -(-registers * 32 // 256) * 256
    fit = {
        "warps": most.warps // warps,
        "blocks": most.blocks,
        "registers": REGISTERS // 4 // each * 4 // warps,
        "shared memory": most.shared // (shared + 1024),
    }
    by = min(fit, key=fit.__getitem__)
    return fit[by] * warps, by


def all_variants() -> list:
    """The variants of every kernel file."""
    return [
        v
        for name in KERNELS
        for v in importlib.import_module(f"nexus_rt.kernels.{name}").variants()
    ]


def ptxas() -> Path:
    """Triton's own assembler (newer architectures have one of their own beside it)."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def compile_variant(variant, arch: int) -> dict:
    """Registers, spilled bytes, shared memory and PTX of one variant on one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constants else variant.signature[n] for n in names}
    # pointers are aligned to 16 bytes, as PyTorch allocates them: what a launch would specialise on
    even = lambda n: signature[n].startswith("*") or n in variant.aligned
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if even(n)}
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(k),): v for k, v in variant.constants.items()},
        aligned,
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    blackwell = ptxas().with_name("ptxas-blackwell")
    tool = blackwell if arch >= 100 and blackwell.exists() else ptxas()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        cubin = Path(folder) / "kernel.cubin"
        output = subprocess.run(
            [tool, "-v", f"-arch={ARCHITECTURES[arch]}", file, "-o", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        loop = inner_loop(disassemble(cubin)) if variant.label.startswith("attention") else None
    used = re.search(r"Used (\d+) registers", output)
    assert used is not None  # `ptxas -v` says so of every program
    registers, shared = int(used[1]), int(compiled.metadata.shared)
    # warp groups of a specialised kernel are counted there
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)
    warps = int(threads[1]) // 32 if threads else variant.num_warps
    resident, limit = occupancy(arch, warps, registers, shared)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", output)]
    return {
        "variant": variant.label,
        "arch": ARCHITECTURES[arch],
        "warps": variant.num_warps,
        "registers": registers,
        "spilled_bytes": sum(spills),
        "shared_bytes": shared,
        "block_warps": warps,
        "resident_warps": resident,
        "limited_by": limit,
        "loop": loop
        and {
            "instructions": loop.instructions,
            "products": loop.products,
            "keys": variant.constants["COLUMNS"],
            "kinds": loop.kinds(),
        },
        "wide_loads": len(re.findall(r"ld\.global\S*\.v[24]\.", ptx)),
        "wgmma": "wgmma" in ptx,
        "fp8_products": "e4m3.e4m3" in ptx or "kind::f8f6f4" in ptx,
        "copied_by_descriptor": ptx.count("cp.async.bulk.tensor"),
        "warp_specialised": "setmaxnreg" in ptx,
    }


def _compile_one(which: tuple[int, int]) -> dict:
    """In a process of its own: kernels do not travel, their numbers do."""
    return compile_variant(all_variants()[which[0]], which[1])


def _loop(row: dict) -> str:
    own = row["loop"]
    return f" / {own['instructions']} + {own['products']} / {own['keys']}" if own else ""


def table(rows: list[dict]) -> str:
    """Markdown, a line a variant: registers / spilled bytes / shared bytes / resident warps on each
    architecture that launches it, and for attention the inner loop: instructions + matrix products
    / keys."""
    arches = list(dict.fromkeys(r["arch"] for r in rows))
    lines = [f"| variant | warps | {' | '.join(arches)} |", "|---|---|" + "---|" * len(arches)]
    for label in dict.fromkeys(r["variant"] for r in rows):
        own = {r["arch"]: r for r in rows if r["variant"] == label}
        cells = [
            (
                f"{r['registers']} / {r['spilled_bytes']} / {r['shared_bytes']} /"
                f" {r['resident_warps']}{_loop(r)}"
                if (r := own.get(arch))
                else ""
            )
            for arch in arches
        ]
        lines.append(f"| {label} | {next(iter(own.values()))['warps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def loops_table(rows: list[dict]) -> str:
    """Markdown, a line a variant and architecture: registers / spilled bytes, and the instructions
    of the inner loop."""
    lines = [
        "| variant | arch | registers | instructions | products | of them, by kind |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        loop = row["loop"] or {"instructions": "-", "products": "-", "kinds": {}}
        kinds = ", ".join(f"{k} {n}" for k, n in loop["kinds"].items())
        lines.append(
            f"| {row['variant']} | {row['arch']} | {row['registers']} / {row['spilled_bytes']} |"
            f" {loop['instructions']} | {loop['products']} | {kinds} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--json", metavar="FILE", help="also write JSON ('-': only print it)")
    parser.add_argument(
        "--loops",
        metavar="NAME",
        help="the inner loops of the variants whose names begin so, instead of the table",
    )
    args = parser.parse_args()
    from nexus_rt.kernels.triton_op import INTERPRETED, triton

    if triton is None or INTERPRETED:
        raise SystemExit("ahead-of-time compilation needs triton, and TRITON_INTERPRET unset")
    todo = [
        (i, arch)
        for i, v in enumerate(all_variants())
        for arch in args.arch
        if arch in (v.arches or ARCHITECTURES) and v.label.startswith(args.loops or "")
    ]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(_compile_one, todo))
    if args.json == "-":
        json.dump(rows, sys.stdout)
        return
    print(loops_table(rows) if args.loops else table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
