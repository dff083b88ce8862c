"""Everything there is to measure on a GPU, in one run of at most nine minutes, whatever fails.

    python -m nexus_rt.bench.gpu.suite --fetch-wheels wheels          # where there is a network
    python -m nexus_rt.bench.gpu.suite --wheels wheels --out bench/results/h200    # on the GPU
    python -m nexus_rt.bench.gpu.suite --wheels wheels --out bench/results/h200 --resume FILE
    python -m nexus_rt.bench.gpu.suite --dry                          # on a CPU, at tiny sizes
    python -m nexus_rt.bench.gpu.suite --estimate                     # headline rows, predicted

Needs torch, triton, numpy, safetensors, transformers and the wheels of `--fetch-wheels`: msgspec,
diffusers and its importlib_metadata, and av. The headline rows of all parts come first, in the
order of the parts, then the other rows; `--estimate` shows the headline's predicted seconds. Every
row is made in a process that a hang, a kill or an illegal access of the row before cannot have
harmed, and is written as it comes. A row has a time limit, a part too, and what the time does not
reach is written down as not reached: `--resume` makes those rows, and those that failed, and keeps
the others. Correctness comes first: a kernel that is wrong gets no speed. Every figure stands
beside the roof measured in the same run: the bandwidth of a large copy, the rate of a large matrix
product.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# other modules may come with `--wheels`, and are imported when those are there
from nexus_rt.bench.failures import failure
from nexus_rt.bench.gpu.units import NOT_REACHED, Part, run_part
from nexus_rt.bench.gpu.wheels import absent, fetch, import_from, shortages, unpack

if TYPE_CHECKING:
    from nexus_rt.bench.gpu.setting import Setting

LIMIT_S = 540.0  # default of --limit
HERE = "nexus_rt.bench.gpu."
PARTS = {
    "correctness": Part(f"{HERE}correctness:units", 90, lanes=6, needs=()),
    "roofs": Part(f"{HERE}kernels:roofs", 30, needs=()),
    "attention": Part(f"{HERE}attention:units", 90),
    "step large": Part(f"{HERE}steps:large", 180),
    "vae": Part(f"{HERE}clip:vae", 60),
    "clip": Part(f"{HERE}clip:units", 150),
    "step small": Part(f"{HERE}steps:small", 60),
    "kernels": Part(f"{HERE}kernels:kernels", 60, needs=()),
    "swap": Part(f"{HERE}engines:swap", 90),
    "correctness elsewhere": Part(f"{HERE}correctness:units_elsewhere", 120, lanes=4, needs=()),
    "quantized": Part(f"{HERE}quantized:units", 30),
    "pipeline": Part(f"{HERE}pipeline:units", 180),
    "compiled": Part(f"{HERE}steps:compiled", 180),
    "engines": Part(f"{HERE}engines:units", 300),
}
Results = dict[str, Any]


def run(
    setting: Setting,
    parts: Sequence[str],
    deadline: float,
    done: Callable[[Results], None] = lambda results: None,
    known: dict[str, Part] | None = None,
) -> Results:
    """Run the headline rows of parts in order, then their other rows; rows that `setting.results`
    has already are kept.

    Args:
        deadline: of the monotonic clock. done: called with all results after each row. known:
            other parts than the suite's.
    """
    from nexus_rt.bench.gpu.setting import Setting

    setting.results |= {name: {} for name in parts if name not in setting.results}
    for headline in (True, False):
        for name in parts:
            start, rows = time.monotonic(), setting.results[name]
            before = len(rows)

            def note(label: str, row: dict, rows: dict = rows, headline: bool = headline) -> None:
                if headline and NOT_REACHED in row:  # its turn comes again with the other rows
                    return
                rows[label] = row
                done(setting.results)

            make = partial(Setting, setting.dry, setting.results)
            part = (known or PARTS)[name]
            try:
                if lacking := [why for package in part.needs if (why := absent(package))]:
                    rows["all"] = {NOT_REACHED: "; ".join(lacking)}
                else:
                    run_part(part, setting, make, deadline, note, set(rows), headline)
            except Exception as error:  # of labels: no process was begun
                rows["all"] = {"failed": failure(error)}
            if len(rows) > before or not headline:
                done(setting.results)
                kind = ", headline" if headline else ""
                seconds = time.monotonic() - start
                print(f"{name}{kind}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return setting.results


def headline(setting: Setting) -> dict[str, dict[str, float]]:
    """Predicted seconds of the headline rows, by part; "all": of the part, its workers' start
    included."""
    out: dict[str, dict[str, float]] = {}
    for name, part in PARTS.items():
        units = part.units(setting)
        if rows := {label: unit.estimate for label, unit in units.items() if unit.headline}:
            out[name] = {**rows, "all": part.headline_seconds(setting)}
    return out


def estimate_table(estimates: dict[str, dict[str, float]]) -> str:
    """A line a headline row and its predicted seconds, and the sum."""
    lines = []
    for name, rows in estimates.items():
        lines.append(f"{name}: {rows['all']:.0f} s")
        lines += [f"  {label}: {s:.1f} s" for label, s in rows.items() if label != "all"]
    total = sum(rows["all"] for rows in estimates.values())
    return "\n".join([*lines, f"headline rows, predicted for an H200: {total:.0f} s"])


def failures(results: Results) -> list[str]:
    """Rows that failed or are wrong, as "part: label"."""
    return [
        f"{part}: {label}"
        for part, rows in results.items()
        if part != "run"
        for label, row in rows.items()
        if isinstance(row, dict) and ("failed" in row or row.get("right") is False)
    ]


def resumed(file: Path) -> Results:
    """The rows of an earlier run that stand; those that failed or were not reached are left out."""
    results = json.loads(file.read_text())
    stands = lambda row: not isinstance(row, dict) or not {"failed", NOT_REACHED} & row.keys()
    return {
        part: {label: row for label, row in rows.items() if stands(row)}
        for part, rows in results.items()
        if part in PARTS
    }


def keep(out: Path, results: Results) -> None:
    """Write <date>.json and <date>.md; again after every row, so that a run that is killed leaves
    what it had measured."""
    out.mkdir(parents=True, exist_ok=True)
    stem = results["run"]["date"][:16].replace(":", "")
    _write(out / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    _write(out / f"{stem}.md", page_of(results))


def page_of(results: Results) -> str:
    """The rows as markdown; rows are worth more than their page, so that no error leaves here."""
    try:
        from nexus_rt.bench.gpu.tables import markdown

        return markdown(results)
    except Exception as error:
        return f"no page could be made: {failure(error)}\n"


def _write(path: Path, text: str) -> None:
    """A whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def fingerprint(dry: bool) -> dict[str, Any]:
    """Date, commit and versions; the device is a row of the roofs."""
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
        "dry": dry,
    }
    try:
        import triton

        results["triton"] = triton.__version__
    except ImportError:
        results["triton"] = None
    return results


def arguments() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry", action="store_true", help="every part on a CPU at tiny sizes, kernels interpreted"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="a folder for <date>.json and <date>.md")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="keep the rows of an earlier run that stand"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="a folder of wheels to import from"
    )
    parser.add_argument(
        "--fetch-wheels",
        nargs="+",
        metavar=("DIR", "PACKAGE"),
        help="download the wheels that a GPU machine lacks, and those of more packages, into a"
        " folder, and end",
    )
    parser.add_argument(
        "--estimate", action="store_true", help="print the headline's predicted seconds, and end"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help="seconds after which no row runs any more"
    )
    return parser


def main() -> None:
    args = arguments().parse_args()
    deadline = time.monotonic() + args.limit
    if args.fetch_wheels:
        print(fetch(Path(args.fetch_wheels[0]), args.fetch_wheels[1:]))
        return
    if args.wheels:
        import_from(unpack(args.wheels))
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    _check_machine(args)
    from nexus_rt.bench.gpu.setting import Setting

    if args.estimate:
        print(estimate_table(headline(Setting(args.dry))))
        return
    kept = resumed(args.resume) if args.resume else {}
    setting = Setting(args.dry, kept)
    mark = fingerprint(args.dry)
    whole = lambda results: {"run": mark, **results}
    done = lambda results: keep(args.out, whole(results)) if args.out else None
    results = whole(run(setting, args.parts, deadline, done))
    print(page_of(results))
    failed = failures(results)
    if failed:
        raise SystemExit("failed or wrong:\n" + "\n".join(failed))


def _check_machine(args: argparse.Namespace) -> None:
    """Say what is lacking here before anything is measured.

    Raises:
        SystemExit: no row of use can be made: the sentence says what to do.
    """
    for package in ("torch", "numpy"):
        if why := absent(package):
            raise SystemExit(why)
    import torch

    if not (args.dry or args.estimate) and not torch.backends.cuda.is_built():
        raise SystemExit("this PyTorch is built without CUDA; --dry runs every part on a CPU")
    if not (args.dry or args.estimate) and not _has_gpu():
        raise SystemExit("no CUDA device here; --dry runs every part on a CPU at tiny sizes")
    lacking = shortages()
    # a GPU's time is not spent on the few rows that need no msgspec
    if not args.dry and (why := absent("msgspec")):
        raise SystemExit(f"nothing was measured: {why}")
    for line in lacking:
        print(line, file=sys.stderr, flush=True)


def _has_gpu() -> bool:
    """Whether there is a GPU, asked without one's context in this process."""
    import torch

    return torch.cuda.device_count() > 0


if __name__ == "__main__":
    main()
