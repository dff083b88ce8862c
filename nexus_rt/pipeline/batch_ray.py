"""A batch on a Ray cluster: workers of one pipeline each, fed by Ray Data, that do what
`nexus-rt batch` does in one process.

The folder is one that every worker can write to. A worker keeps a `results.*.jsonl` of its own
there, so what a killed worker had finished is kept when its share is given to another, and a clip
that takes its worker down again and again is given up.
"""

from __future__ import annotations

import json
import logging
import math
import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from nexus_rt.core.errors import InputError
from nexus_rt.pipeline.batch import TOGETHER, open_folder, work
from nexus_rt.pipeline.batch_job import Job
from nexus_rt.pipeline.prompts import Item

ATTEMPTS = 3
SHARES = 4  # of the list, for each worker: the last ones to end are then nearly even


class Worker:
    """One pipeline in one process; called by Ray Data with a share of the list."""

    def __init__(
        self, make: Callable[[Any], Any], argument: Any, job: Job, attempts: int, place: str
    ) -> None:
        # relative names of models mean what they mean to whoever started the batch
        if os.path.isdir(place):
            os.chdir(place)
        self.pipe, self.job, self.attempts = make(argument), job, attempts
        self.log = job.folder / f"results.{uuid.uuid4().hex[:12]}.jsonl"

    def __call__(self, share: dict[str, Any]) -> dict[str, list[str]]:
        items = [Item(**json.loads(text)) for text in share["item"]]
        columns: dict[str, list[str]] = {"kind": [], "id": [], "line": []}
        for kind, name, line in work(self.pipe, items, self.job, self.log, self.attempts):
            for column, value in zip(columns.values(), (kind, name, line), strict=True):
                column.append(value)
        return columns


def run_on_ray(
    make: Callable[[Any], Any],
    argument: Any,
    items: list[Item],
    job: Job,
    workers: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    attempts: int = ATTEMPTS,
) -> dict[str, int]:
    """Make every clip of a job that is not there yet, on the cluster that `RAY_ADDRESS` names, or
    on this machine.

    Args:
        make: called with `argument` in every worker; returns its pipeline. Importable there, as the
            job's folder is writable.
        workers: how many; by default one a GPU of the cluster, or one.
        attempts: how often a clip may take its process down before it is given up.

    Returns:
        How many were "made", "kept" and "failed".

    Raises:
        InputError: Ray is not installed, or no room for a worker; the folder cannot be made, or
            another process works on it.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError(
            f"--ray needs Ray Data ({error}); pip install 'nexus-rt[ray]'.",
            code="missing_package",
            param="ray",
        ) from error
    if workers is not None and workers < 1:
        raise InputError(
            f"--workers is {workers}; expected at least 1.", code="out_of_range", param="workers"
        )
    job = replace(job, folder=job.folder.resolve())
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        count = workers or max(1, gpus)
        each = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        if count > int(resources.get("GPU" if gpus else "CPU", 0)):
            unit = f"{gpus} GPUs" if gpus else f"{int(resources.get('CPU', 0))} CPUs"
            raise InputError(
                f"--workers is {count}, and the cluster has {unit}; ask for fewer, or add"
                " machines.",
                code="out_of_range",
                param="workers",
            )
        with open_folder(job):
            return _share_out(
                ray.data,
                (make, argument, job, attempts, os.getcwd()),
                job.mine(items),
                count,
                each,
                say,
            )
    finally:
        if started:
            ray.shutdown()


def _share_out(
    data: Any,
    made_of: tuple,
    items: list[Item],
    count: int,
    each: dict[str, int],
    say: Callable[[str], None],
) -> dict[str, int]:
    size = max(1, min(TOGETHER, math.ceil(len(items) / (SHARES * count))))
    rows = [{"item": json.dumps(msgspec.to_builtins(item))} for item in items]
    data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    shares = data.from_items(rows, override_num_blocks=math.ceil(len(rows) / size)).map_batches(
        Worker,
        fn_constructor_args=made_of,
        batch_size=size,
        compute=data.ActorPoolStrategy(size=count),
        **each,
    )
    counts = {"made": 0, "kept": 0, "failed": 0}
    for row in shares.iter_rows():
        counts[row["kind"]] += 1
        say(f"[{sum(counts.values())}/{len(items)}] {row['id']}: {row['line']}")
    return counts
