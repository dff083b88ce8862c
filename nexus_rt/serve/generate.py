"""What a worker does with a job: denoise, decode, encode the files; told step by step, stopped
within one."""

from __future__ import annotations

import base64
import io
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nexus_rt.core.devices import Arrival, fetch
from nexus_rt.core.errors import Cancelled, DecodeError, NexusError, NumericsError, shorten
from nexus_rt.core.process import computes, resident_bytes
from nexus_rt.core.size import ClipSize
from nexus_rt.core.tracing import Trace, record
from nexus_rt.media.frames import contact_sheet, to_uint8
from nexus_rt.media.video import made_with, save_video
from nexus_rt.method.step import Step
from nexus_rt.models.coders import clean_prompt
from nexus_rt.pipeline.call import decode, denoise, draw_noise
from nexus_rt.pipeline.encode import encode
from nexus_rt.pipeline.inputs import Prompts
from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.pipeline.rewriting import Rewriting
from nexus_rt.pipeline.settings import CallSettings, Defaults
from nexus_rt.serve.exhaustion import HOST, exhausted
from nexus_rt.serve.preview import LatentRGB, clean, fit, picture, shipped
from nexus_rt.serve.problems import JobFailed
from nexus_rt.serve.profile import Profile
from nexus_rt.serve.requests import ClipRequest

if TYPE_CHECKING:
    import numpy as np

    from nexus_rt.models.coders import Tokenized
    from nexus_rt.pipeline.pipeline import NexusPipeline

log = logging.getLogger("nexus_rt.serve")
Event = dict[str, Any]
WarmUp = tuple[GenerationRequest, dict[str, Any]]  # what was generated, and what it took
Loaded = tuple[Profile, WarmUp | None]
WARMUP = "a red circle moves left on a black background"


@dataclass(frozen=True)
class Task:
    """A job as a worker gets it. planned: what its request generates. loras: the request's, with
    the paths of their files."""

    id: str
    request: ClipRequest
    planned: GenerationRequest
    loras: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Clip:
    """A job's result: files, and what its time went into, in the fields of `/v1/perf/{id}`."""

    id: str
    video: bytes
    thumbnail: bytes
    spritesheet: bytes
    perf: dict[str, Any]


def memory(device: torch.device) -> dict[str, float]:
    """Megabytes of this process: resident, and on its GPU."""
    now = {"rss_mb": resident_bytes()}
    if device.type == "cuda":
        now["allocated_mb"] = torch.cuda.memory_allocated(device)
        now["reserved_mb"] = torch.cuda.memory_reserved(device)
        now["peak_allocated_mb"] = torch.cuda.max_memory_allocated(device)
    return {name: round(count / 2**20, 1) for name, count in now.items() if count is not None}


def warmup_request(defaults: Defaults) -> ClipRequest:
    """A clip of a pair's own size and plan."""
    size = CallSettings.of(ClipSize.of_defaults(defaults).options)
    return ClipRequest(WARMUP, "warm-up", size, fps="16", seconds="1", seed=0)


class ServedPipeline:
    """A pipeline at work for a server, one task or one batch of compatible tasks at a time.

    preview_every: steps between previews; 0 makes none.
    """

    def __init__(self, pipe: NexusPipeline, preview_every: int = 1) -> None:
        self.pipe, self.preview_every = pipe, preview_every
        pipe.set_progress_bar_config(disable=True)
        self.profile = Profile.of(pipe)
        self.rgb: LatentRGB | None = shipped(pipe.vae.space) if pipe.vae is not None else None
        self._came_with = dict(pipe.loras)
        self._loras: dict[str, tuple[str, ...]] = {}
        self._running: set[str] = set()
        self._cancelled: set[str] = set()
        self._kinds: set[tuple[int, ClipSize]] = set()  # batches and sizes that it has made

    def loaded(self, warmup: bool) -> Loaded:
        """What the pipeline can make, and what a warm-up takes."""
        return self.profile, self.warm_up() if warmup else None

    def warm_up(self) -> WarmUp:
        """One clip of the pair's own size and plan."""
        request = warmup_request(self.profile.defaults)
        planned = self.profile.check(request)
        clip = self.run([Task("warm-up", request, planned)], lambda event: None)[0]
        return planned, clip.perf

    def wanted(self, task: Task) -> bool:
        """Whether a task was not cancelled."""
        return task.id not in self._cancelled

    def cancel(self, task_id: str) -> None:
        """From any thread: leave out a task that runs, or is the next to; the call ends before its
        next step where none of its tasks is left."""
        self._cancelled.add(task_id)
        if task_id in self._running and self._running <= self._cancelled:
            self.pipe.cancel()

    def run(self, tasks: Sequence[Task], emit: Callable[[Event], None]) -> list[Clip]:
        """The clips of tasks that one call can make; of those that were not cancelled.

        Args:
            emit: is called with what happens: {"id", "kind", ...}.

        Raises:
            JobFailed: with the code that clients are told.
        """
        self._running = {task.id for task in tasks}
        self._cancelled &= self._running
        try:
            return _Call(self, tasks, emit).run()
        except Cancelled as error:
            raise JobFailed("cancelled", str(error)) from error
        except Exception as error:
            raise self._failure(error, tasks[0]) from error
        finally:
            self._cancelled -= self._running
            self._running = set()

    def _failure(self, error: Exception, task: Task) -> JobFailed:
        """An error of a call as its clients read it."""
        memory = exhausted(error)
        if memory is not None:
            log.error("out of memory of the %s: %s", memory, shorten(error), extra={"job": task.id})
        if memory == "device":
            if self.pipe.device.type == "cuda":
                torch.cuda.empty_cache()
            return JobFailed(
                "out_of_memory",
                f"the device's memory does not hold a clip of {task.planned.size}; ask for a"
                " smaller one.",
            )
        if memory == "host":
            return JobFailed("out_of_memory", HOST)
        if isinstance(error, NexusError):
            codes = {NumericsError: "not_finite", DecodeError: "decode_failed"}
            code = next((c for kind, c in codes.items() if isinstance(error, kind)), None)
            return JobFailed(code or "generation_failed", str(error))
        # whatever a backend raises: its words are not the client's
        log.error("a job failed", extra={"job": task.id}, exc_info=error)
        kind = type(error).__name__
        return JobFailed("generation_failed", f"{kind}; the server's log says more.")

    def set_loras(self, loras: dict[str, tuple[str, ...]]) -> None:
        """Have exactly these LoRAs merged, beside none that the pipeline was loaded with."""
        files_of = {g: loras.get(g, ()) for g in self.pipe.engines}
        changed = {g: files for g, files in files_of.items() if files != self._loras.get(g, ())}
        if not changed:
            return
        sources: dict[str, Any] = {g: (*self._came_with[g], *f) for g, f in changed.items()}
        self.pipe.set_loras(**sources)
        self._loras |= changed


class _Call:
    """One call of a served pipeline."""

    def __init__(
        self, of: ServedPipeline, tasks: Sequence[Task], emit: Callable[[Event], None]
    ) -> None:
        self.of, self.pipe, self.tasks, self.emit = of, of.pipe, list(tasks), emit
        self.planned = self.tasks[0].planned
        self.memory: dict[str, dict[str, float]] = {}
        self.warnings: dict[str, str] = {}  # by task
        self.before: Tensor | None = None
        self.previews: list[tuple[int, Arrival]] = []  # on their way, by step
        self.last = 0.0

    def tell(self, kind: str, task: Task | None = None, **details: Any) -> None:
        """An event of one task, or of each."""
        for one in self.tasks if task is None else [task]:
            self.emit({"id": one.id, "kind": kind, **details})

    def check(self) -> None:
        if not any(self.of.wanted(task) for task in self.tasks):
            raise Cancelled("stopped, as asked.")

    @torch.no_grad()
    def run(self) -> list[Clip]:
        """See `ServedPipeline.run`."""
        pipe, planned, count = self.pipe, self.planned, len(self.tasks)
        computes()
        if pipe.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pipe.device)
        began = time.perf_counter()
        with pipe.exclusive(planned.plan) as hooks, record(pipe.device) as trace:
            kind = (count, planned.size)
            self.tell("stage", stage="encode", fresh=kind not in self.of._kinds)
            self.of.set_loras(self.tasks[0].loras)
            self.check()
            components = pipe.components
            self.warn_of_cut(components.text)
            conditioning = encode(components, planned, self.prompts(), self.encoded)
            seeds = self.seeds()
            self.before = draw_noise(components, planned.size, count, seeds)
            self.last = time.perf_counter()
            hooks = replace(hooks, on_step=self.step, noise_rng=seeds)
            latents = denoise(components, planned, conditioning, self.before, hooks)
            self.tell_previews(wait=True)
            self.memory["denoise"] = memory(pipe.device)
            self.check()
            self.tell("stage", stage="decode")
            kept = [i for i, task in enumerate(self.tasks) if self.of.wanted(task)]
            frames = decode(components, planned, latents[kept])
            self.memory["decode"] = memory(pipe.device)
        self.learn_colours(latents[kept], frames)
        self.tell("stage", stage="write")
        writing = time.perf_counter()
        files = [self.files(i, frames[j], conditioning.rewriting) for j, i in enumerate(kept)]
        wrote = 1000 * (time.perf_counter() - writing)
        total = 1000 * (time.perf_counter() - began)
        perf = self.perf(trace, total, wrote)
        self.of._kinds.add(kind)
        return [
            Clip(self.tasks[i].id, *files[j], self.with_meta(perf, self.tasks[i]))
            for j, i in enumerate(kept)
        ]

    def prompts(self) -> Prompts:
        """The prompts of the tasks."""
        requests = [task.request for task in self.tasks]
        negatives = [r.negative_prompt or "" for r in requests]
        return Prompts.of([r.prompt for r in requests], negatives, self.planned.settings)

    def seeds(self) -> list[torch.Generator]:
        return [torch.Generator("cpu").manual_seed(t.request.seed) for t in self.tasks]

    def warn_of_cut(self, encoder: Tokenized | None) -> None:
        """Tell the watchers of a prompt that is longer than what is read of it."""
        if encoder is None:  # `encode` says so
            return
        for task in self.tasks:
            if (lost := encoder.lost(clean_prompt(task.request.prompt))) is not None:
                self.warnings[task.id] = f"the prompt {lost}"
                self.tell("warning", task, message=self.warnings[task.id])

    def encoded(self, stage: str, rewriting: Rewriting | None) -> None:
        """A stage of `encode`: what the large generator reads is told as soon as it is there."""
        if stage == "rewriting":
            self.tell("phase", phase="rewrite")  # which may ask another machine
        elif rewriting is not None:
            self.tell("phase", phase="encode")
            for i, task in enumerate(self.tasks):
                failure = rewriting.failures.get(i)
                self.tell("rewriting", task, text=rewriting.texts[i], failure=failure)
        self.check()

    def step(self, step: Step, latents: Tensor) -> None:
        """After every step: what was done, a preview where one is due, and whether to go on."""
        now = time.perf_counter()
        self.tell("step", step=step.index + 1, duration_ms=1000 * (now - self.last))
        if self.of.rgb is not None and self.of.preview_every:
            self.preview(step.index, latents)
            self.tell_previews(wait=False)
        if not any(self.of.wanted(task) for task in self.tasks):
            self.pipe.cancel()
        self.before, self.last = latents, time.perf_counter()

    def preview(self, index: int, latents: Tensor) -> None:
        """Begin a preview, where one is due; a GPU is not waited for."""
        plan = self.planned.plan.steps
        due = (index + 1) % self.of.preview_every == 0 or index + 1 == len(plan)
        if not due or self.before is None or self.of.rgb is None:
            return
        following = plan[index + 1].sigma if index + 1 < len(plan) else 0.0
        pointed = clean(self.before, latents, plan[index].sigma, following)
        self.previews.append((index + 1, fetch(self.of.rgb.frames(pointed))))

    def tell_previews(self, wait: bool) -> None:
        """Tell of the previews that are there, or of all."""
        while self.previews and (wait or self.previews[0][1].ready):
            step, frames = self.previews.pop(0)
            for task, frame in zip(self.tasks, frames.tensor().numpy(), strict=True):
                image = base64.b64encode(picture(frame)).decode()
                self.tell("preview", task, step=step, image=f"data:image/jpeg;base64,{image}")

    def learn_colours(self, latents: Tensor, frames: np.ndarray) -> None:
        """The preview's map of a latent space for which none is shipped: of the first clip."""
        if self.of.rgb is None and self.pipe.vae is not None and self.of.preview_every:
            self.of.rgb = fit(latents, frames, self.pipe.vae.temporal)

    def files(
        self, index: int, frames: np.ndarray, rewriting: Rewriting | None
    ) -> tuple[bytes, bytes, bytes]:
        """mp4, thumbnail (WebP) and spritesheet (JPEG) of a task's clip."""
        from PIL import Image

        r, plan = self.tasks[index].request, self.planned.plan
        options = {k: v for k, v in r.call.items() if k not in ("plan", "rewrite")}
        options |= {"loras": ", ".join(r.loras)} if r.loras else {}
        known = made_with(r.prompt, r.negative_prompt, r.seed, plan.name, options, r.model)
        if rewriting is not None:
            known["rewritten"] = rewriting.texts[index]
        pixels = to_uint8(frames, truncate=self.planned.published)
        with tempfile.TemporaryDirectory(prefix="nexus-rt-") as folder:
            path = save_video(pixels, Path(folder) / "clip.mp4", r.fps, known)
            video = path.read_bytes()
        still, sheet = io.BytesIO(), io.BytesIO()
        Image.fromarray(pixels[len(pixels) // 2]).save(still, format="WEBP", quality=85)
        Image.fromarray(contact_sheet(pixels)).save(sheet, format="JPEG", quality=85)
        return video, still.getvalue(), sheet.getvalue()

    def perf(self, trace: Trace, total: float, wrote: float) -> dict[str, Any]:
        """Where the time went, in the fields of `/v1/perf/{id}`."""
        plan = self.planned.plan
        steps = trace.steps()
        first, last = min(a for a, _ in steps.values()), max(b for _, b in steps.values())
        decode = trace.totals().get("vae", 0.0)
        stages = {"encode": first, "denoise": last - first, "decode": decode}
        return {
            "total_duration_ms": round(total, 3),
            "steps": [
                {"name": n, "duration_ms": round(ms, 3)}
                for n, ms in {**stages, "write": wrote}.items()
            ],
            "denoise_steps_ms": [
                {"step": i, "duration_ms": round(stop - start, 3)}
                for i, (start, stop) in steps.items()
            ],
            "memory_checkpoints": self.memory,
            "meta": {
                "plan": plan.name,
                "steps": len(plan),
                "batch": len(self.tasks),
                "device": str(self.pipe.device),
                "residency_moves": sum(name == "residency" for name, *_ in trace.spans),
                "pid": os.getpid(),
            },
        }

    def with_meta(self, perf: dict[str, Any], task: Task) -> dict[str, Any]:
        row, elsewhere = task.request.as_row(), ("prompt", "plan")  # prompts stay in the job
        settings = {k: v for k, v in row.items() if v not in (None, "", ()) and k not in elsewhere}
        known = {"warnings": [self.warnings[task.id]]} if task.id in self.warnings else {}
        return {**perf, "meta": {**settings, **perf["meta"], **known}}
