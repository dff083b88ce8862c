"""A list of prompts to a folder of clips: prompts encoded together, a clip decoded while the next
is denoised where there is room for both, and a line of `results.jsonl` for each as it ends, so that
the same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.amounts import frame_rate
from nexus_rt.core.checks import check_seed
from nexus_rt.core.errors import InputError, NexusError
from nexus_rt.core.part_files import remove_orphans
from nexus_rt.core.process import computes
from nexus_rt.media.reading import is_clip
from nexus_rt.method.plan import Plan
from nexus_rt.pipeline.batch_clips import (
    Clip,
    decodes_beside,
    denoise_clip,
    encode_together,
    failed_row,
    options,
    write_clip,
)
from nexus_rt.pipeline.batch_job import Job
from nexus_rt.pipeline.batch_log import Lines, finished, same_clip
from nexus_rt.pipeline.encode import rewriter_of
from nexus_rt.pipeline.inputs import Prompts
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.pipeline.prompts import Item
from nexus_rt.pipeline.request import GenerationRequest

TOGETHER = 8  # prompts encoded in one call
IN_ROW = ("width", "height", "num_frames", "plan")  # settings that a row has under other names


class Requests:
    """A job's requests: one for all items of the same settings, and one plan for all of the same
    text, so that a long list holds few."""

    def __init__(self, pipe: NexusPipeline, job: Job) -> None:
        self.pipe, self.job = pipe, job
        self.made: dict[str, GenerationRequest] = {}
        self.plans: dict[str, Plan] = {}

    def of(self, item: Item) -> GenerationRequest:
        """An item's.

        Raises:
            InputError, ModelError: as `NexusPipeline.request`.
        """
        own = {n: v for n, v in item.settings.items() if n != "rewrite"}  # a text an item
        key = repr(sorted(own.items()))
        wanted = self.job.settings_of(item)
        if key not in self.made or "rewrite" in item.settings:
            made = self.pipe.request(wanted)
            plan = self.plans.setdefault(made.plan.text, made.plan)
            if "rewrite" in item.settings:
                return replace(made, plan=plan)
            self.made[key] = replace(made, plan=plan)
        return self.made[key]


def own_settings(item: Item, job: Job) -> dict[str, Any]:
    """What of an item a row has, whether or not its clip can be made."""
    return {
        "prompt": item.prompt,
        "negative": item.negative or "",
        "seed": job.seed if item.seed is None else item.seed,
    }


def clip_settings(
    item: Item, job: Job, pipe: NexusPipeline, request: GenerationRequest
) -> dict[str, Any]:
    """Everything that decides what an item's clip is, as it is written down.

    plan: its exact text, for reading. identity: of its steps, which two texts may share; this is
    what a later run compares.
    """
    size, plan, fps = request.size, request.plan, frame_rate(job.fps)
    rewrite = rewriter_of(pipe.components, request)
    scales = request.guidance.small, request.guidance.large
    return {
        **own_settings(item, job),
        "size": f"{size.width}x{size.height}",
        "frames": size.frames,
        "steps": len(plan),
        "plan": plan.text,
        "identity": plan.identity,
        "solver": request.solver,
        "guidance": [list(s) if isinstance(s, tuple) else s for s in scales],
        **({"rewrite": str(rewrite)} if rewrite is not None else {}),
        "fps": fps.numerator if fps.denominator == 1 else str(fps),
        "options": {n: str(v) for n, v in options(request).items() if n not in IN_ROW},
        "weights": {**pipe.identity, "blend": pipe.kernels},
        "models": job.models,
    }


def run(
    pipe: NexusPipeline, items: list[Item], job: Job, say: Callable[[str], None] = lambda line: None
) -> dict[str, int]:
    """Make every clip of a shard that is not there yet.

    Returns:
        How many were "made", "kept" and "failed".

    Raises:
        InputError: the folder cannot be made, another process works on the shard, or the pair's
            models cannot make what the job asks for.
    """
    with open_folder(job):
        remove_orphans(job.folder)
        counts = {"made": 0, "kept": 0, "failed": 0}
        mine = job.mine(items)
        for kind, name, ending in work(pipe, mine, job, job.results):
            counts[kind] += 1
            if kind != "kept":
                say(f"[{sum(counts.values())}/{len(mine)}] {name}: {ending}")
    if counts["kept"]:
        say(f"{counts['kept']} clips were there")
    return counts


@contextlib.contextmanager
def open_folder(job: Job) -> Iterator[None]:
    """Make a job's folder, and refuse a second process on its shard."""
    import fcntl

    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = open(job.results.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"{job.folder} cannot be made ({error.strerror}); choose a place you may write to.",
            code="not_writable",
            param="output",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process works on {job.results.name} in {job.folder}; wait for it, or give"
                " each a --shard of its own.",
                code="in_use",
                param="shard",
            ) from None
        yield


def work(
    pipe: NexusPipeline, items: list[Item], job: Job, log: Path, attempts: int | None = None
) -> Iterator[tuple[str, str, str]]:
    """Make the clips of items that are not there yet, and write a line of `log` as each ends.

    Args:
        attempts: also write a line as each begins, and give up one that was begun so often and
            never ended: it takes the process down with it.

    Yields:
        ("made" | "kept" | "failed", id, in words), as each ends.

    Raises:
        InputError, ModelError: the models cannot make what the job asks for. What is wrong with an
            item's own texts and settings is its failure.
    """
    computes()
    known, begun = finished(job.folder)
    todo, lines, requests = [], Lines(log), Requests(pipe, job)
    for item in items:
        own, file = own_settings(item, job), job.clip(item).name
        kept = known.get(item.id, {})
        if own["seed"] == -1:  # a fresh one, once: the clip that is there keeps its own
            before = kept["settings"].get("seed") if kept else None
            own["seed"] = before if _is_seed(before) else check_seed("seed", -1)
        row = {"id": item.id, "file": file, "settings": own}
        try:
            prompts = Prompts.of(item.prompt, item.negative, job.settings_of(item))
            request = requests.of(item) if item.settings else None
        except Exception as error:  # whatever a caller's item holds
            yield _words(lines.add(failed_row(row, error)))
            continue
        request = request or requests.of(item)
        row["settings"] = own = {**clip_settings(item, job, pipe, request), "seed": own["seed"]}
        there = kept and kept["status"] == "done" and same_clip(kept["settings"], own)
        if there and is_clip(job.clip(item)):
            yield "kept", item.id, "was there"
        elif attempts is not None and begun.get(item.id, 0) >= attempts:
            gave_up = NexusError(f"its process died {begun[item.id]} times")
            yield _words(lines.add(failed_row(row, gave_up)))
        else:
            todo.append(Clip(item, row, request, prompts))

    def begins(item: Item) -> None:
        if attempts is not None:
            lines.add({"id": item.id, "status": "begun", "when": time.time()})

    yield from map(_words, _make(pipe, todo, job, begins, lines.add))


def _is_seed(value: Any) -> bool:
    """Whether a row holds a seed that a generator takes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _words(row: dict[str, Any]) -> tuple[str, str, str]:
    """A row as `work` yields it."""
    if row["status"] == "done":
        return "made", row["id"], f"{row['seconds']:.1f} s"
    return "failed", row["id"], f"FAILED: {row['error']}"


def _make(
    pipe: NexusPipeline,
    todo: list[Clip],
    job: Job,
    begins: Callable[[Item], None],
    ended: Callable[[dict[str, Any]], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The row of every clip, after `ended` has had it: as soon as its file is written, or it has
    failed."""

    def finish(*of: Any) -> dict[str, Any]:
        return ended(write_clip(pipe, job, *of))

    with ThreadPoolExecutor(1) as decoder:
        pending: Future | None = None
        for start in range(0, len(todo), TOGETHER):
            part = todo[start : start + TOGETHER]
            for clip, conditioning in zip(part, encode_together(pipe, part), strict=True):
                began = time.perf_counter()
                begins(clip.item)
                try:
                    if isinstance(conditioning, Exception):
                        raise conditioning
                    latents = denoise_clip(pipe, clip, conditioning)
                except Exception as error:  # an item's failure is the item's
                    yield ended(failed_row(clip.row, error))
                    continue
                if pending is not None:
                    yield pending.result()
                    pending = None
                ready = (
                    torch.cuda.current_stream(latents.device).record_event()
                    if latents.is_cuda
                    else None
                )
                if decodes_beside(pipe, clip.request.size):
                    pending = decoder.submit(finish, clip, latents, ready, began)
                # in this thread: another would bring a team of OpenMP's of its own, that waits for
                # cores
                else:
                    with pipe.exclusive(clip.request.plan):
                        row = finish(clip, latents, ready, began)
                    yield row
        if pending is not None:
            yield pending.result()
