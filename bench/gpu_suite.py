"""Everything there is to measure on a GPU, in one run of at most eight minutes, whatever fails.

    python -m nexus_rt.bench.gpu_suite --out bench/results/h200       # on the GPU
    python -m nexus_rt.bench.gpu_suite --out bench/results/h200 --resume FILE  # what FILE lacks
    python -m nexus_rt.bench.gpu_suite --dry                          # on a CPU, at tiny sizes

Needs torch, triton, numpy, safetensors and msgspec; `--wheels DIR` unpacks a folder of wheels
(diffusers, say) and imports from it. Parts run in order of what users choose by; every row is made
in a process that a hang, a kill or an illegal access of the row before cannot have harmed, and is
written as it comes. A row has a time limit, a part too, and what the time does not reach is written
down as not reached: `--resume` makes those rows, and those that failed, and keeps the others.
Correctness comes first: a kernel that is wrong gets no speed. Every figure stands beside the roof
measured in the same run: the bandwidth of a large copy, the rate of a large matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# what else is imported may come with `--wheels`, and is imported when those are there
from nexus_rt.bench.gpu_units import NOT_REACHED, Part, run_part
from nexus_rt.bench.measure import failure

if TYPE_CHECKING:
    from nexus_rt.bench.gpu_setting import Setting

LIMIT_S = 480.0
HERE = "nexus_rt.bench.gpu_"
PARTS = {
    "correctness": Part(f"{HERE}correctness:units", 120, lanes=6),
    "roofs": Part(f"{HERE}kernels:roofs", 30),
    "attention": Part(f"{HERE}attention:units", 90),
    "step large": Part(f"{HERE}steps:large", 150),
    "step small": Part(f"{HERE}steps:small", 60),
    "quantized": Part(f"{HERE}quantized:units", 30),
    "kernels": Part(f"{HERE}kernels:kernels", 60),
    "swap": Part(f"{HERE}engines:swap", 60),
    "pipeline": Part(f"{HERE}pipeline:units", 180),
    "compiled": Part(f"{HERE}steps:compiled", 180),
    "correctness elsewhere": Part(f"{HERE}correctness:units_elsewhere", 120, lanes=4),
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
    """Run parts in order; rows that `setting.results` has already are kept.

    Args:
        deadline: of the monotonic clock. done: called with all results after each row. known:
            other parts than the suite's.
    """
    from nexus_rt.bench.gpu_setting import Setting

    for name in parts:
        start = time.monotonic()
        rows = setting.results.setdefault(name, {})

        def note(label: str, row: dict, rows: dict = rows) -> None:
            rows[label] = row
            done(setting.results)

        make = partial(Setting, setting.dry, setting.results)
        try:
            run_part((known or PARTS)[name], setting, make, deadline, note, set(rows))
        except Exception as error:  # of labels: no process was begun
            rows["all"] = {"failed": failure(error)}
        done(setting.results)
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return setting.results


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
    from nexus_rt.bench.gpu_tables import markdown
    from nexus_rt.bench.results import write_text

    out.mkdir(parents=True, exist_ok=True)
    stem = results["run"]["date"][:16].replace(":", "")
    write_text(out / f"{stem}.json", json.dumps(results, indent=1) + "\n")
    try:
        page = markdown(results)
    except Exception as error:  # rows are worth more than their page
        page = f"no page could be made: {failure(error)}\n"
    write_text(out / f"{stem}.md", page)


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


def unpack(wheels: Path) -> Path:
    """Wheels as a folder to import from; compiled ones cannot be imported as they are."""
    folder = wheels / "unpacked"
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


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
        "--resume", type=Path, metavar="FILE", help="keep the rows of an earlier run that stand"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        help="a folder of wheels to import from (diffusers and what it needs)",
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help="seconds after which nothing runs any more"
    )
    args = parser.parse_args()
    deadline = time.monotonic() + args.limit
    if args.wheels:
        folder = str(unpack(args.wheels))
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [folder, os.environ.get("PYTHONPATH")])
        )
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not args.dry and not torch.backends.cuda.is_built():
        raise SystemExit("this PyTorch is built without CUDA; --dry runs every part on a CPU")
    if not args.dry and not _has_gpu():
        raise SystemExit("no CUDA device here; --dry runs every part on a CPU at tiny sizes")
    from nexus_rt.bench.gpu_setting import Setting
    from nexus_rt.bench.gpu_tables import markdown

    setting = Setting(args.dry, resumed(args.resume) if args.resume else {})
    mark = fingerprint(args.dry)
    whole = lambda results: {"run": mark, **results}
    done = lambda results: keep(args.out, whole(results)) if args.out else None
    results = whole(run(setting, args.parts, deadline, done))
    print(markdown(results))
    failed = failures(results)
    if failed:
        raise SystemExit("failed or wrong:\n" + "\n".join(failed))


def _has_gpu() -> bool:
    """Whether there is a GPU, asked without one's context in this process."""
    import torch

    return torch.cuda.device_count() > 0


if __name__ == "__main__":
    main()
