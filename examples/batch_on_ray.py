"""Clips by the workers of a Ray cluster, from a program of your own.

    pip install "nexus-rt[ray]"
    python examples/batch_on_ray.py prompts.txt clips

Each worker loads one pipeline and takes its share of the list; a clip whose worker died is given to
another, and a second run makes only what is missing. With RAY_ADDRESS set the workers are that
cluster's, and the folder must be one that all of them can write to. `nexus-rt batch --ray` is the
same as a command.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nexus_rt import NexusPipeline
from nexus_rt.pipeline.batch_job import Job
from nexus_rt.pipeline.batch_ray import run_on_ray
from nexus_rt.pipeline.prompts import read_prompts
from nexus_rt.pipeline.settings import CallSettings

SETTINGS = CallSettings(num_inference_steps=10, plan="handoff=0.65")


def make_pipeline(pair: str | None) -> NexusPipeline:
    """A worker's pipeline: called once in each worker's process."""
    pipe = NexusPipeline.from_pretrained(pair)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(prompts: Path, folder: Path, pair: str | None = None, workers: int = 1) -> dict[str, int]:
    """How many clips were made, kept from an earlier run, and failed."""
    job = Job(folder, seed=0, settings=SETTINGS)
    return run_on_ray(make_pipeline, pair, read_prompts(prompts), job, workers, print)


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
