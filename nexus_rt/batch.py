"""A list of prompts to a folder of clips: prompts encoded together, a clip decoded while the next is denoised, and a line of
`results.jsonl` for each as it ends, so that the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.errors import InputError, NexusError
from nexus_rt.pipeline import NexusPipeline
from nexus_rt.prompts import Item
from nexus_rt.video import SUFFIXES, save_video

TOGETHER = 8  # prompts encoded in one call


@dataclass(frozen=True)
class Job:
    """What a run makes of every item that does not say otherwise. options: of the pipeline's call, whatever the item.

    models: words for where the models are from; a clip made by others is made again.
    """

    folder: Path
    seed: int = 0
    fps: int = 16
    suffix: str = ".mp4"
    shard: tuple[int, int] = (1, 1)
    options: dict[str, Any] = field(default_factory=dict)
    models: str = ""

    def __post_init__(self) -> None:
        part, count = self.shard
        if not 1 <= part <= count:
            raise InputError(f"shard {part}/{count} does not exist; expected I/N with I from 1 to N, such as 1/4.")
        if self.suffix not in SUFFIXES:
            raise InputError(f"clips cannot be {self.suffix}; expected {', '.join(SUFFIXES)}.")

    @property
    def results(self) -> Path:
        """Where this shard writes its lines."""
        part, count = self.shard
        return self.folder / ("results.jsonl" if count == 1 else f"results.{part}-of-{count}.jsonl")

    def clip(self, item: Item) -> Path:
        return self.folder / f"{item.id}{self.suffix}"


def parse_shard(text: str) -> tuple[int, int]:
    """ "I/N"."""
    try:
        part, count = (int(p) for p in text.split("/"))
    except ValueError:
        raise InputError(f"shard {text!r} is not I/N; expected such as 1/4.") from None
    return part, count


def settings(item: Item, job: Job, pipe: NexusPipeline) -> dict[str, Any]:
    """Everything that decides what an item's clip is, as it is written down."""
    d, o = pipe.defaults, job.options
    width, height = item.size or (o.get("width") or d.width, o.get("height") or d.height)
    frames = item.frames or o.get("num_frames") or d.num_frames
    plan = pipe.make_plan(o.get("plan"), o.get("num_inference_steps"), o.get("shift"), o.get("energy"))
    rest = {k: str(v) for k, v in o.items() if v is not None and k not in ("width", "height", "num_frames", "plan")}
    return {
        "prompt": item.prompt, "negative": item.negative or "", "seed": job.seed if item.seed is None else item.seed,
        "size": f"{width}x{height}", "frames": frames, "steps": len(plan), "plan": plan.name, "fps": job.fps,
        "options": rest, "models": job.models,
    }  # fmt: skip


def finished(job: Job) -> dict[str, dict[str, Any]]:
    """The last line on every id, of all shards in the folder; a line cut short by a killed process counts for nothing."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(job.folder.glob("results*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                row = json.loads(line)
                if row["when"] >= found.get(row["id"], row)["when"]:
                    found[row["id"]] = row
    return found


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Refuse a second process on one shard of a folder."""
    import fcntl

    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process works on {path.name} in {path.parent}; wait for it, or give each a --shard of its own."
            ) from None
        yield


class Lines:
    """A file that gets a whole line at a time, on disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_bytes() if path.exists() else b""
        if text and not text.endswith(b"\n"):  # a process was killed in the middle of one
            with open(path, "ab") as file:
                file.write(b"\n")

    def add(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run(
    pipe: NexusPipeline, items: list[Item], job: Job, say: Callable[[str], None] = lambda line: None
) -> dict[str, int]:  # fmt: skip
    """Make every clip of a shard that is not there yet.

    Returns:
        How many were "made", "kept" and "failed".

    Raises:
        InputError: the folder cannot be made, or another process works on the shard.
    """
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{job.folder} cannot be made ({error.strerror}); choose a place you may write to.") from error
    part, count = job.shard
    mine, counts = items[part - 1 :: count], {"made": 0, "kept": 0, "failed": 0}
    with _alone(job.results):
        known, todo = finished(job), []
        for item in mine:
            row, said = known.get(item.id), settings(item, job, pipe)
            if row and row["status"] == "done" and row["settings"] == said and job.clip(item).is_file():
                counts["kept"] += 1
            else:
                todo.append((item, said))
        say(f"{len(todo)} clips to make, {counts['kept']} are there")
        lines, order = Lines(job.results), threading.Lock()

        def ended(row: dict[str, Any]) -> None:
            with order:
                lines.add(row)
                counts["made" if row["status"] == "done" else "failed"] += 1
                number = counts["made"] + counts["failed"]
                ending = f"{row['seconds']:.1f} s" if row["status"] == "done" else f"FAILED: {row['error']}"
                say(f"[{number}/{len(todo)}] {row['id']}: {ending}")

        _make(pipe, todo, job, ended)
    return counts


def _make(
    pipe: NexusPipeline, todo: list[tuple[Item, dict[str, Any]]], job: Job, ended: Callable[[dict[str, Any]], None]
) -> None:  # fmt: skip
    """Every item; `ended` is called with its row when its clip is written, or has failed. One is decoded and written while the
    next is denoised, where nothing has to make room for the decoder."""
    with ThreadPoolExecutor(1) as decoder:
        pending: Future | None = None
        for start in range(0, len(todo), TOGETHER):
            part = todo[start : start + TOGETHER]
            for (item, said), told in zip(part, _told(pipe, part), strict=True):
                began = time.perf_counter()
                row = {"id": item.id, "file": job.clip(item).name, "settings": said}
                try:
                    if isinstance(told, Exception):
                        raise told
                    latents = _denoise(pipe, said, told, job)
                except Exception as error:  # an item's failure is the item's
                    ended(_failed(row, error))
                    continue
                if pending is not None:
                    pending.result()
                pending = decoder.submit(lambda *a: ended(_write(*a)), pipe, latents, row, job, began)
                if pipe.vram is not None:
                    pending.result()
        if pending is not None:
            pending.result()


def _told(pipe: NexusPipeline, part: list[tuple[Item, dict[str, Any]]]) -> list[dict[str, Tensor] | Exception]:
    """Embeddings of items, encoded together; one by one where that fails, so that one prompt fails alone."""
    try:
        return _encode(pipe, part)
    except Exception:
        found: list[dict[str, Tensor] | Exception] = []
        for one in part:
            try:
                found += _encode(pipe, [one])
            except Exception as error:
                found.append(error)
        return found


def _encode(pipe: NexusPipeline, part: list[tuple[Item, dict[str, Any]]]) -> list[dict[str, Tensor]]:
    prompts = [item.prompt for item, _ in part]
    negatives = [item.negative or "" for item, _ in part] if any(item.negative for item, _ in part) else None
    text = pipe.encode_prompt(prompts, negatives)
    names = ["prompt_embeds", "negative_prompt_embeds"]
    tensors = list(text)
    if pipe.context is not None and "small" in pipe.engines:
        single = [said["frames"] == 1 for _, said in part]
        contexts = [
            pipe.encode_context(p, text[0][i : i + 1], text[1][i : i + 1], s)
            for i, (p, s) in enumerate(zip(prompts, single, strict=True))
        ]
        names += ["context_embeds", "negative_context_embeds"]
        tensors += [torch.cat(c) for c in zip(*contexts, strict=True)]
    return [{n: t[i : i + 1] for n, t in zip(names, tensors, strict=True)} for i in range(len(part))]


def _denoise(pipe: NexusPipeline, said: dict[str, Any], told: dict[str, Tensor], job: Job) -> Tensor:
    width, height = (int(n) for n in said["size"].split("x"))
    options = {**job.options, "width": width, "height": height, "num_frames": said["frames"], **told}
    seed = torch.Generator("cpu").manual_seed(said["seed"])
    return pipe(generator=seed, output_type="latent", **options).frames


def _write(pipe: NexusPipeline, latents: Tensor, row: dict[str, Any], job: Job, began: float) -> dict[str, Any]:
    try:
        frames = pipe.decode(latents, "np", rescue=job.folder)
        save_video(frames[0], job.folder / row["file"], job.fps)
    except Exception as error:
        return _failed(row, error)
    return {**row, "status": "done", "seconds": round(time.perf_counter() - began, 3), "when": time.time()}


def _failed(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    said = str(error) if isinstance(error, NexusError) else f"{type(error).__name__}: {error}"
    return {**row, "status": "failed", "error": said, "seconds": 0.0, "when": time.time()}
