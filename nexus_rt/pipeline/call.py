"""A call's stages: `encode` (in `nexus_rt.pipeline.encode`), `denoise` and `decode`, functions over
a pair's components."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nexus_rt.core.errors import ModelError
from nexus_rt.core.progress import progress_bar
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.experts import engines_by_name
from nexus_rt.media.frames import as_output
from nexus_rt.method.engine import PublishedNumerics, supports
from nexus_rt.method.hooks import CallbackResult, Hooks
from nexus_rt.method.latents import Generators, check_latents, random_latents
from nexus_rt.method.loop import sample
from nexus_rt.method.plan import Plan
from nexus_rt.method.step import Step
from nexus_rt.pipeline.components import Components
from nexus_rt.pipeline.encode import Conditioning
from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.pipeline.residency import Residency


@dataclass
class Run:
    """The running call of a pipeline, or its last one.

    cancel: it was asked to stop. interrupt: it ends after its step. steps: of its plan.
    """

    cancel: threading.Event = field(default_factory=threading.Event)
    interrupt: bool = False
    steps: int = 0

    def begin(self, plan: Plan) -> None:
        """A call of a plan begins."""
        self.cancel.clear()
        self.interrupt, self.steps = False, len(plan)


def draw_noise(components: Components, size: ClipSize, videos: int, rng: Generators) -> Tensor:
    """Noise [videos, C, T, H, W], float32; a list of generators gives each sample its own."""
    shape = (videos, components.channels, *components.grid.latent(size))
    return random_latents(shape, rng, components.device)


def denoise(
    components: Components,
    request: GenerationRequest,
    conditioning: Conditioning,
    noise: Tensor,
    hooks: Hooks | None = None,
) -> Tensor:
    """Noise [B, C, T, H, W] to clean latents, float32, with the progress bar.

    Raises:
        NumericsError, Cancelled: as `nexus_rt.method.loop.sample`.
    """
    hooks, plan = hooks or Hooks(), request.plan
    with (
        _published_numerics(components, request),
        _moving(components, request, len(noise)) as residency,
        _shown_steps(components, plan, hooks) as shown,
    ):
        return sample(
            noise.to(components.device),
            plan,
            components.engines,
            conditioning.prompts(components.engines),
            request.guidance,
            blend=request.blend,
            solver=request.solver,
            kernels=components.kernels,
            hooks=replace(shown, residency=residency),
        )


@contextlib.contextmanager
def _published_numerics(components: Components, request: GenerationRequest) -> Iterator[None]:
    """The engines of a request, computing as the published code does where that is asked for."""
    running = [components.engines[g] for g in request.plan.generators] if request.published else []
    exact = [engine for engine in running if supports(engine, PublishedNumerics)]
    try:
        for engine in exact:
            engine.published_numerics(True)
        yield
    finally:
        for engine in exact:
            engine.published_numerics(False)


@contextlib.contextmanager
def _moving(
    components: Components, request: GenerationRequest, videos: int
) -> Iterator[Residency | None]:
    """What moves the engines between memories; None where nothing moves."""
    if components.vram is None:
        yield None
        return
    plan = components.residency(request.plan, request.size, videos)
    residency = Residency(plan, engines_by_name(components.engines))
    try:
        yield residency
    finally:
        residency.close()


@contextlib.contextmanager
def _shown_steps(components: Components, plan: Plan, hooks: Hooks) -> Iterator[Hooks]:
    """The hooks, and a progress bar that moves at every step."""
    options = {"total": len(plan), "desc": plan.name, "unit": "step", **components.progress}
    with progress_bar(**options) as bar:

        def on_step(step: Step, latents: Tensor) -> Tensor | CallbackResult | None:
            bar.set_postfix_str(step.runs, refresh=False)
            bar.update()
            return None if hooks.on_step is None else hooks.on_step(step, latents)

        yield replace(hooks, on_step=on_step)


def decode(
    components: Components,
    request: GenerationRequest,
    latents: Tensor,
    rescue: str | Path | None = None,
) -> Any:
    """Clean latents to frames as the request's `output_type` asks.

    Under a tight budget the engines leave the memory to the decoder, which leaves it in its turn.

    Raises:
        DecodeError: decoding failed; the latents are saved under `rescue`.
    """
    tight = components.tight(request, len(latents))
    if tight:
        components.unload_engines()
    frames = decode_latents(
        components, latents, request.settings.output_type, rescue, truncate=request.published
    )
    if tight and components.vae is not None:
        components.vae.unload()
    return frames


def decode_latents(
    components: Components,
    latents: Tensor,
    output_type: str = "np",
    rescue: str | Path | None = None,
    truncate: bool = False,
) -> Any:
    """Latents [B, C, T, H, W] to frames; see `NexusPipeline.decode`."""
    check_latents(latents, (None, components.channels, None, None, None))
    if output_type == "latent":
        return latents
    if components.vae is None:
        raise no_vae()
    return as_output(components.vae.decode(latents, rescue), output_type, truncate)


def no_vae() -> ModelError:
    """The error for frames where no VAE is loaded."""
    return ModelError(
        "this pipeline has no VAE; pass vae= to from_pretrained, or output_type='latent'.",
        code="missing",
        param="vae",
    )
