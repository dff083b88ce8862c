"""A list of prompts to a folder of clips: prompts encoded together, a clip decoded while the next
is denoised where there is room for both, and a line of `results.jsonl` for each as it ends, so that
the same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from nexus_rt import documents
from nexus_rt.checks import check_seed, prompt_lists
from nexus_rt.engines.experts import boundaries
from nexus_rt.errors import InputError, NexusError, readable, shown
from nexus_rt.models.vae import rescue_latents
from nexus_rt.part_files import remove_orphans
from nexus_rt.pipeline import NexusPipeline
from nexus_rt.prompts import Item, check_name
from nexus_rt.request import TIMEOUT, make_request
from nexus_rt.rewriting import check_rewrite
from nexus_rt.size import ClipSize, parse_sides
from nexus_rt.video import SUFFIXES, frame_rate, is_clip, made_with, save_video

# of a call, as `make_request` takes them
REQUEST_OPTIONS = (
    "height",
    "width",
    "num_frames",
    "plan",
    "num_inference_steps",
    "shift",
    "energy",
    "gamma_w",
    "guidance_scale",
    "guidance_scale_2",
    "blend",
    "solver",
    "timesteps",
    "small_steps",
    "large_steps",
)
TOGETHER = 8  # prompts encoded in one call


@dataclass(frozen=True)
class Job:
    """What a run makes of every item that does not say otherwise. options: of the pipeline's call,
    whatever the item.

    models: words for where the models are from; a clip made by others is made again.
    """

    folder: Path
    seed: int = 0
    fps: str | int | float = 16
    suffix: str = ".mp4"
    shard: tuple[int, int] = (1, 1)
    options: dict[str, Any] = field(default_factory=dict)
    models: str = ""

    def __post_init__(self) -> None:
        part, count = self.shard
        if not 1 <= part <= count:
            raise InputError(
                f"shard {part}/{count} does not exist; expected I/N with I from 1 to N, such as"
                " 1/4."
            )
        if self.suffix not in SUFFIXES:
            raise InputError(f"clips cannot be {self.suffix}; expected {', '.join(SUFFIXES)}.")

    @property
    def results(self) -> Path:
        """Where this shard writes its lines."""
        part, count = self.shard
        return self.folder / ("results.jsonl" if count == 1 else f"results.{part}-of-{count}.jsonl")

    def mine(self, items: list[Item]) -> list[Item]:
        """This shard's items."""
        part, count = self.shard
        return items[part - 1 :: count]

    def clip(self, item: Item) -> Path:
        """Where an item's clip is.

        Raises:
            InputError: an id that can be no file's name.
        """
        check_name(item.id, "item")
        return self.folder / f"{item.id}{self.suffix}"


def parse_shard(text: str) -> tuple[int, int]:
    """ "I/N"."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    if not match:
        raise InputError(f"shard {shown(text)} is not I/N; expected such as 1/4.")
    return int(match[1]), int(match[2])


def common_settings(job: Job, pipe: NexusPipeline) -> dict[str, Any]:
    """What is the same for every clip of a job, as it is written down.

    plan: its exact text, for reading. identity: of its steps, which two texts may share; this is
    what a later run compares.
    """
    o = job.options
    call: dict[str, Any] = {n: o.get(n) for n in REQUEST_OPTIONS}
    request = make_request(
        pipe.defaults,
        **call,
        output_type="latent",
        num_videos_per_prompt=1,
        published=o.get("as_published", False),
    )
    plan = request.plan.with_experts(boundaries(pipe.engines))
    guidance = [list(s) if isinstance(s, tuple) else s for s in vars(request.guidance).values()]
    left_out = ("width", "height", "num_frames", "plan")
    rest = {k: str(v) for k, v in o.items() if v not in (None, False) and k not in left_out}
    fps = frame_rate(job.fps)
    rate = fps.numerator if fps.denominator == 1 else str(fps)
    made_of = {**pipe.identity, "blend": pipe.kernels}
    rewrite = pipe.rewrites_by(o.get("rewrite"), plan, o.get("as_published", False))
    return {
        "steps": len(plan),
        "plan": plan.text,
        "identity": plan.identity,
        "solver": request.solver,
        "guidance": guidance,
        **({"rewrite": str(rewrite)} if rewrite is not None else {}),
        "fps": rate,
        "options": rest,
        "weights": made_of,
        "models": job.models,
    }


def _same(kept: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether two clips' settings make one clip: where the models were read from is no matter, what
    they are is; nor is the plan's text, of which `identity` is what it does."""
    results = ("models", "rewritten", "rewrite_failure", "plan")
    without = lambda s: {k: v for k, v in s.items() if k not in results}
    return without(kept) == without(wanted)


def settings(item: Item, job: Job, pipe: NexusPipeline, common: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides what an item's clip is: `common_settings`, and what is the item's
    own."""
    d, o = pipe.defaults, job.options
    sides = o.get("width") or d.width, o.get("height") or d.height
    size = item.clip_size(ClipSize.of_defaults(d, sides, o.get("num_frames")))
    return {
        "prompt": item.prompt,
        "negative": item.negative or "",
        "seed": job.seed if item.seed is None else item.seed,
        "size": f"{size.width}x{size.height}",
        "frames": size.frames,
        **common,
        **({"rewrite": item.rewrite} if item.rewrite else {}),
    }


def clip_size(own: dict[str, Any]) -> ClipSize:
    """The size in a clip's settings."""
    return ClipSize(*parse_sides(own["size"]), own["frames"])


class Row(msgspec.Struct):
    """A line of `results.jsonl`, as far as a later run reads it."""

    id: str
    status: Literal["begun", "done", "failed"]
    when: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    file: str = ""
    settings: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.status != "begun" and not self.settings:
            raise ValueError("a row that ended has no settings")


def finished(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """The last line on every id that ended, of all shards and workers of a folder, and how often
    each was begun since.

    A line cut short by a killed process counts for nothing.
    """
    ended: dict[str, dict[str, Any]] = {}
    starts: dict[str, list[float]] = {}
    for path in sorted(folder.glob("results*.jsonl")):
        for line in _lines(path):
            try:
                record = documents.parse(line, str(path))
                row = documents.check(record, Row, str(path))
            except NexusError:  # cut short by a killed process, or no line of ours
                continue
            if row.status == "begun":
                starts.setdefault(row.id, []).append(row.when)
            elif row.when >= ended.get(row.id, {"when": row.when})["when"]:
                ended[row.id] = record
    return ended, {
        i: sum(t > ended.get(i, {"when": 0.0})["when"] for t in times)
        for i, times in starts.items()
    }


def _lines(path: Path) -> Iterator[str]:
    """A file's lines, whatever bytes stand in them."""
    try:
        with open(path, "rb") as file:
            while line := file.readline(documents.MAX_BYTES):
                yield line.decode("utf-8", errors="replace")
    except OSError as error:  # without it every clip would be made again
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}), and it says which clips are there;"
            " mend its permissions, or move it away to make every clip again."
        ) from error


class Lines:
    """A file that gets a whole line at a time, on disk when `add` returns.

    Raises:
        NexusError: the disk is full, or the folder went away.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._order = path, threading.Lock()
        if not path.exists() or not path.stat().st_size:
            return
        with self._written(), open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a process was killed in the middle of a line
                file.write(b"\n")

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        row = _readable(row)
        with self._written(), self._order, open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return row

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NexusError(
                f"{self.path} cannot be written ({error}); free some space and run the same"
                " command: what was finished is kept."
            ) from error


def _readable(value: Any) -> Any:
    """A row whose texts a file can hold: half a surrogate pair is spelt out."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, dict):
        return {_readable(k): _readable(v) for k, v in value.items()}
    return [_readable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _unusable(item: Item) -> InputError | None:
    """Why no model can read an item's texts; it fails alone, before the others are encoded."""
    try:
        prompt_lists(item.prompt, item.negative)
        if item.rewrite is not None:
            check_rewrite(item.rewrite, 1)
    except InputError as error:
        return error
    return None


def run(
    pipe: NexusPipeline, items: list[Item], job: Job, say: Callable[[str], None] = lambda line: None
) -> dict[str, int]:
    """Make every clip of a shard that is not there yet.

    Returns:
        How many were "made", "kept" and "failed".

    Raises:
        InputError: the folder cannot be made, or another process works on the shard.
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
            f"{job.folder} cannot be made ({error.strerror}); choose a place you may write to."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process works on {job.results.name} in {job.folder}; wait for it, or give"
                " each a --shard of its own."
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
    """
    known, begun = finished(job.folder)
    todo, lines, common = [], Lines(log), common_settings(job, pipe)
    for item in items:
        row, own = known.get(item.id), settings(item, job, pipe, common)
        if own["seed"] == -1:  # a fresh one, once: the clip that is there keeps its own
            kept = (
                row["settings"].get("seed")
                if row and isinstance(row.get("settings"), dict)
                else None
            )
            own["seed"] = kept if _is_seed(kept) else check_seed("seed", -1)
        failed = lambda why, item=item, own=own: _words(
            lines.add(_failed({"id": item.id, "file": job.clip(item).name, "settings": own}, why))
        )
        if (odd := _unusable(item)) is not None:
            yield failed(odd)
        elif (
            row
            and row["status"] == "done"
            and _same(row["settings"], own)
            and is_clip(job.clip(item))
        ):
            yield "kept", item.id, "was there"
        elif attempts is not None and begun.get(item.id, 0) >= attempts:
            yield failed(NexusError(f"its process died {begun[item.id]} times"))
        else:
            todo.append((item, own))

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
    todo: list[tuple[Item, dict[str, Any]]],
    job: Job,
    begins: Callable[[Item], None],
    ended: Callable[[dict[str, Any]], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The row of every item, after `ended` has had it: as soon as its clip is written, or has
    failed."""

    def finish(*of: Any) -> dict[str, Any]:
        return ended(_write(pipe, job, *of))

    with ThreadPoolExecutor(1) as decoder:
        pending: Future | None = None
        for start in range(0, len(todo), TOGETHER):
            part = todo[start : start + TOGETHER]
            for (item, own), embeds in zip(part, _encoded(pipe, part, job), strict=True):
                began = time.perf_counter()
                begins(item)
                row = {"id": item.id, "file": job.clip(item).name, "settings": own}
                try:
                    if isinstance(embeds, Exception):
                        raise embeds
                    latents = _denoise(pipe, own, embeds, job)
                except Exception as error:  # an item's failure is the item's
                    yield ended(_failed(row, error))
                    continue
                if pending is not None:
                    yield pending.result()
                    pending = None
                ready = (
                    torch.cuda.current_stream(latents.device).record_event()
                    if latents.is_cuda
                    else None
                )
                if decodes_beside(pipe, own):
                    pending = decoder.submit(finish, latents, ready, row, began)
                # in this thread: another would bring a team of OpenMP's of its own, that waits for
                # cores
                else:
                    yield finish(latents, ready, row, began)
        if pending is not None:
            yield pending.result()


def _encoded(
    pipe: NexusPipeline, part: list[tuple[Item, dict[str, Any]]], job: Job
) -> list[dict[str, Tensor] | Exception]:
    """Embeddings of items, encoded together; one by one where that fails, so that one prompt fails
    alone."""
    try:
        return [*_encode(pipe, part, job)]
    except Exception:
        outcomes: list[dict[str, Tensor] | Exception] = []
        for one in part:
            try:
                outcomes += _encode(pipe, [one], job)
            except Exception as error:
                outcomes.append(error)
        return outcomes


def _encode(
    pipe: NexusPipeline, part: list[tuple[Item, dict[str, Any]]], job: Job
) -> list[dict[str, Tensor]]:
    prompts = [item.prompt for item, _ in part]
    negatives = (
        [item.negative or "" for item, _ in part]
        if any(item.negative for item, _ in part)
        else None
    )
    texts, negative_texts = pipe.encode_prompt(prompts, negatives)
    second = _rewrite(pipe, part, job)
    encoded = []
    for i, (_, own) in enumerate(part):
        text, none = texts[i : i + 1], negative_texts[i : i + 1]
        embeds = {"prompt_embeds": text, "negative_prompt_embeds": none}
        if (rewritten := second[i]) is not None:
            own["rewritten"] = rewritten
            assert pipe.text is not None  # `encode_prompt` has used it
            embeds["prompt_embeds_2"] = pipe.text.encode([rewritten], text.shape[1])
        if pipe.context is not None and "small" in pipe.engines:
            contexts = pipe.encode_context(prompts[i], text, none, single_frame=own["frames"] == 1)
            embeds |= dict(
                zip(("context_embeds", "negative_context_embeds"), contexts, strict=True)
            )
        encoded.append(embeds)
    return encoded


def _rewrite(
    pipe: NexusPipeline, part: list[tuple[Item, dict[str, Any]]], job: Job
) -> list[str | None]:
    """What the large generator reads of each item, None for its prompt."""
    options = job.options
    rewrite, timeout = options.get("rewrite"), options.get("rewrite_timeout") or TIMEOUT
    texts = [item.rewrite for item, _ in part]
    todo = [i for i, (_, own) in enumerate(part) if texts[i] is None and "rewrite" in own]
    if todo:
        made = pipe.rewrite([part[i][0].prompt for i in todo], rewrite, timeout * len(todo))
        for place, i in enumerate(todo if made else ()):
            assert made is not None
            texts[i] = made.texts[place]
            if place in made.failures:
                part[i][1]["rewrite_failure"] = made.failures[place]
    return texts


def _denoise(
    pipe: NexusPipeline, own: dict[str, Any], embeds: dict[str, Tensor], job: Job
) -> Tensor:
    options = {**job.options, **clip_size(own).options, **embeds, "rewrite": None}
    seed = torch.Generator("cpu").manual_seed(own["seed"])
    return pipe(generator=seed, output_type="latent", **options).frames


def decodes_beside(pipe: NexusPipeline, own: dict[str, Any]) -> bool:
    """Whether a clip is decoded and written while the next is denoised.

    On a GPU, where the decoder's working memory is free; on a CPU, where each of the two has cores
    of its own: two that share two cores take 1.5 times as long as one after the other, on one core
    each 0.85 times (mini pair, 12 clips).
    """
    if pipe.vram is not None or pipe.vae is None:
        return False
    if pipe.device.type != "cuda":
        return 2 * torch.get_num_threads() <= (os.cpu_count() or 1)
    unused = torch.cuda.memory_reserved(pipe.device) - torch.cuda.memory_allocated(pipe.device)
    free = torch.cuda.mem_get_info(pipe.device)[0] + unused
    return free >= pipe.vae.working_bytes(clip_size(own))


@contextlib.contextmanager
def _after(ready: torch.cuda.Event | None, latents: Tensor) -> Iterator[None]:
    """On a GPU, a stream of its own that begins when the latents are there."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(latents.device)
    stream.wait_event(ready)
    latents.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def _write(
    pipe: NexusPipeline,
    job: Job,
    latents: Tensor,
    ready: torch.cuda.Event | None,
    row: dict[str, Any],
    began: float,
) -> dict[str, Any]:
    decoded = False
    try:
        with _after(ready, latents):
            frames = pipe.decode(latents, "np", rescue=job.folder)
        decoded = True
        s = row["settings"]
        made = made_with(s["prompt"], s["negative"], s["seed"], s["plan"], job.options, job.models)
        save_video(
            frames[0],
            job.folder / row["file"],
            job.fps,
            made,
            truncate=job.options.get("as_published", False),
        )
    except Exception as error:
        # what was denoised is not lost to a full disk
        if decoded and (kept := rescue_latents(latents, job.folder)) is not None:
            error = NexusError(f"{error} The latents are saved in {kept}.")
        return _failed(row, error)
    return {
        **row,
        "status": "done",
        "seconds": round(time.perf_counter() - began, 3),
        "when": time.time(),
    }


def _failed(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    message = str(error) if isinstance(error, NexusError) else f"{type(error).__name__}: {error}"
    return {**row, "status": "failed", "error": message, "seconds": 0.0, "when": time.time()}
