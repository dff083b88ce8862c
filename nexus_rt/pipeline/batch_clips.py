"""The stages of a batch's clips: encoded together, denoised one by one, decoded and written beside
the next where there is room."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError, NexusError
from nexus_rt.core.size import ClipSize
from nexus_rt.media.latents import rescue_latents
from nexus_rt.media.video import made_with, save_video
from nexus_rt.pipeline import settings
from nexus_rt.pipeline.batch_job import Job
from nexus_rt.pipeline.call import decode, denoise, draw_noise
from nexus_rt.pipeline.encode import Conditioning, encode, rewriter_of
from nexus_rt.pipeline.inputs import Prompts
from nexus_rt.pipeline.pipeline import NexusPipeline
from nexus_rt.pipeline.prompts import Item
from nexus_rt.pipeline.request import GenerationRequest


@dataclass(frozen=True)
class Clip:
    """A clip to make. row: its line of `results.jsonl`, as far as it is known."""

    item: Item
    row: dict[str, Any]
    request: GenerationRequest
    prompts: Prompts


def options(request: GenerationRequest) -> dict[str, Any]:
    """The settings of a clip that are not a call's default."""
    lists = {n for n, f in settings.fields().items() if f.kind == "numbers"}
    return {n: list(v) if n in lists else v for n, v in request.settings.given.items()}


def encode_together(pipe: NexusPipeline, part: list[Clip]) -> list[Conditioning | Exception]:
    """What the generators read of each clip: encoded together where the settings of encoding are
    equal, and one by one where that fails, so that one prompt fails alone."""
    outcomes: dict[int, Conditioning | Exception] = {}
    groups: dict[tuple, list[int]] = {}
    for i, clip in enumerate(part):
        try:
            groups.setdefault(_encoding(pipe, clip.request), []).append(i)
        except InputError as error:  # the memory budget does not hold the clip
            outcomes[i] = error
    for places in groups.values():
        try:
            made = _encode(pipe, [part[i] for i in places])
            outcomes |= dict(zip(places, made, strict=True))
        except Exception:
            for i in places:
                try:
                    outcomes[i] = _encode(pipe, [part[i]])[0]
                except Exception as error:
                    outcomes[i] = error
    return [outcomes[i] for i in range(len(part))]


def _encoding(pipe: NexusPipeline, request: GenerationRequest) -> tuple:
    """What `encode` reads of a request besides its prompts: equal for those that are encoded
    together. A text instead of the prompt may be another for each."""
    source = rewriter_of(pipe.components, request)
    return (
        request.plan.generators,
        request.size.frames == 1,
        request.settings.max_sequence_length,
        pipe.components.tight(request, 1),
        "text" if _own_text(source) else id(source) if callable(source) else source,
    )


def _own_text(source: Any) -> bool:
    """Whether a call rewrites by a text of its own."""
    return source is not None and source != "auto" and not callable(source)


def _encode(pipe: NexusPipeline, clips: list[Clip]) -> list[Conditioning]:
    """What the generators read of clips of equal settings of encoding; rows get what was rewritten.

    The time for rewriting is a prompt's.
    """
    several, first = [clip.prompts for clip in clips], clips[0].request
    texts = [text for one in several for text in one.texts or ()]
    negatives = [one.negatives[0] if one.negatives else "" for one in several]
    prompts = replace(several[0], texts=texts, negatives=negatives if any(negatives) else None)
    call = first.settings.for_prompts(len(clips))
    sources = [rewriter_of(pipe.components, clip.request) for clip in clips]
    if _own_text(sources[0]):
        call = call.replace(rewrite=[s if isinstance(s, str) else s[0] for s in sources])
    with pipe.exclusive(first.plan):
        encoded = encode(pipe.components, replace(first, settings=call), prompts, together=1)
    if (made := encoded.rewriting) is not None:
        for i, clip in enumerate(clips):
            clip.row["settings"]["rewritten"] = made.texts[i]
            if i in made.failures:
                clip.row["settings"]["rewrite_failure"] = made.failures[i]
    return [encoded.rows(i, i + 1) for i in range(len(clips))]


def denoise_clip(pipe: NexusPipeline, clip: Clip, conditioning: Conditioning) -> Tensor:
    """A clip's clean latents."""
    seed = torch.Generator("cpu").manual_seed(clip.row["settings"]["seed"])
    components = pipe.components
    with pipe.exclusive(clip.request.plan) as hooks:
        noise = draw_noise(components, clip.request.size, 1, seed)
        hooks = replace(hooks, noise_rng=seed)
        return denoise(components, clip.request, conditioning, noise, hooks)


def decodes_beside(pipe: NexusPipeline, size: ClipSize) -> bool:
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
    return free >= pipe.vae.working_bytes(size)


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


def write_clip(
    pipe: NexusPipeline,
    job: Job,
    clip: Clip,
    latents: Tensor,
    ready: torch.cuda.Event | None,
    began: float,
) -> dict[str, Any]:
    """Decode a clip and write its file; the row that it ends with."""
    decoded, row, request = False, clip.row, clip.request
    try:
        with _after(ready, latents):
            frames = decode(pipe.components, request, latents, rescue=job.folder)
        decoded = True
        s = row["settings"]
        made = made_with(
            s["prompt"], s["negative"], s["seed"], s["plan"], options(request), job.models
        )
        path = job.folder / row["file"]
        save_video(frames[0], path, job.fps, made, truncate=request.published)
    except Exception as error:
        # what was denoised is not lost to a full disk
        if decoded and (kept := rescue_latents(latents, job.folder)) is not None:
            error = NexusError(f"{error} The latents are saved in {kept}.")
        return failed_row(row, error)
    return {
        **row,
        "status": "done",
        "seconds": round(time.perf_counter() - began, 3),
        "when": time.time(),
    }


def failed_row(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    """The row of a clip that was not made."""
    message = str(error) if isinstance(error, NexusError) else f"{type(error).__name__}: {error}"
    return {**row, "status": "failed", "error": message, "seconds": 0.0, "when": time.time()}
