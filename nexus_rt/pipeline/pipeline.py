"""NexusPipeline: prompts in, frames out, through a small and a large generator of one latent
space."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.amounts import parse_bytes
from nexus_rt.core.checks import instance, number, switch, whole
from nexus_rt.core.errors import Cancelled, choose
from nexus_rt.core.limits import (
    MAX_SEQUENCE_LENGTH,
    MAX_TIMEOUT,
    MAX_VIDEOS,
    MIN_TIMEOUT,
    OUTPUT_TYPES,
    REWRITE_TIMEOUT,
    Scale,
)
from nexus_rt.core.paths import as_path
from nexus_rt.core.process import computes
from nexus_rt.core.progress import check_options
from nexus_rt.core.size import BuiltSizes, ClipSize
from nexus_rt.engines.experts import boundaries
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.generator import Prompt
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.latents import Generators, LatentGrid, check_generators, check_latents
from nexus_rt.method.plan import Plan
from nexus_rt.method.reuse import ReuseDeviation
from nexus_rt.parallel.layout import broadcast_failure
from nexus_rt.pipeline.attributes import named_arguments
from nexus_rt.pipeline.call import decode, decode_latents, denoise, draw_noise, no_vae
from nexus_rt.pipeline.callback import StepCallback, callback_tensors
from nexus_rt.pipeline.components import Components
from nexus_rt.pipeline.encode import (
    encode,
    encode_contexts,
    encode_texts,
    rewrite,
    rewriter_of,
    steers,
)
from nexus_rt.pipeline.inputs import EMBEDS, Prompts, check_rows, prompt_lists
from nexus_rt.pipeline.memory_use import MemoryUse
from nexus_rt.pipeline.models import PipelineModels
from nexus_rt.pipeline.request import (
    GenerationRequest,
    check_request,
    check_schedule,
    check_size,
    make_request,
)
from nexus_rt.pipeline.residency import ResidencyPlan
from nexus_rt.pipeline.rewriting import Rewriter, Rewriting, check_rewrite
from nexus_rt.pipeline.settings import CallSettings

WHEN = {  # a stage of `encode`, as `Cancelled` names it
    "encoded": "after the prompt was encoded",
    "rewritten": "after the prompt was rewritten",
    "understood": "after the prompt was understood",
}


@dataclass
class NexusOutput:
    """A call's result.

    frames: as `output_type` asks: np [B, F, H, W, 3] in [0, 1], pt [B, F, 3, H, W], pil lists, or
        latents.
    plan: the plan that ran. rewriting: what the large generator read instead of the prompt, None
        where it read the prompt. reuse_deviations: with `reuse_parity`, of every reused step.
    """

    frames: Any
    plan: Plan
    reuse_deviations: list[ReuseDeviation] | None = None
    rewriting: Rewriting | None = None


class NexusPipeline(PipelineModels):
    """Text to video through one or two generators. Build it with `from_pretrained`.

    Pipelines may be loaded and called from several threads; calls of one pipeline run one after the
    other. A process that was forked from one that had loaded or called is refused with an error
    (start workers with 'spawn').

    Attributes:
        engines: "small" and "large", those that were given, behind the engine protocol.
        text, vae: the text encoder and the video decoder, loaded on first use; `drop()` frees
            either.
        context: understanding model and connector, which make the small generator's context; None
            where a pair has none and both generators read the text. `drop()` frees it.
    """

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm, such as `disable=True`.

        Raises:
            InputError: tqdm has no such option, or does not take the value.
        """
        check_options(options)
        self.progress = options

    def cancel(self) -> None:
        """Stop the running call before its next step (from a callback or another thread); it raises
        `Cancelled`."""
        self._run.cancel.set()

    @property
    def components(self) -> Components:
        """What a call runs on, as it is now."""
        return Components(
            self.engines,
            self.text,
            self.context,
            self.vae,
            self.defaults,
            self.grid,
            self.channels,
            self.device,
            self.kernels,
            self.keep_encoders,
            self.vram,
            self.parallel,
            self._rewritten,
            self.progress,
        )

    def make_plan(
        self,
        plan: str | Plan | None = None,
        num_inference_steps: int | None = None,
        **settings: Any,
    ) -> Plan:
        """The plan a call with these settings would walk.

        Raises:
            InputError: as a call with them.
        """
        every = {**settings, "plan": plan, "num_inference_steps": num_inference_steps}
        settings_of_call = CallSettings.named("make_plan", every)
        made = make_request(settings_of_call, self.defaults, boundaries(self.engines))
        check_schedule(made)
        return made.plan

    def request(self, settings: CallSettings) -> GenerationRequest:
        """A call's settings against the pair's own, checked against its models.

        Raises:
            InputError: names the setting at fault.
            ModelError: frames are asked for, and there is no VAE.
        """
        instance("settings", settings, CallSettings, "CallSettings, such as CallSettings(shift=3)")
        made = make_request(settings, self.defaults, boundaries(self.engines))
        check_request(made, self.components.profile)
        if settings.output_type != "latent" and self.vae is None:
            raise no_vae()
        return made

    def plan_residency(
        self,
        plan: Plan,
        size: ClipSize,
        videos: int = 1,
        guided: bool = True,
        vram: int | None = None,
    ) -> ResidencyPlan:
        """What is in memory when, under the pipeline's budget (or this one).

        Raises:
            InputError: the budget holds no mode of the plan; names the smallest that would do.
        """
        instance("plan", plan, Plan, "a Plan, as `make_plan` makes one")
        self.grid.check(size)
        whole("videos", videos, 1, MAX_VIDEOS)
        switch("guided", guided)
        vram = None if vram is None else parse_bytes(vram)
        plan = plan.with_experts(boundaries(self.engines))
        return self.components.residency(plan, size, videos, guided, vram)

    def call_parts(self, size: ClipSize, batch: int = 2) -> dict[str, MemoryUse]:
        """What a call holds in memory; batch: samples of a step, unconditional twins counted.

        Raises:
            InputError: a size that the models do not make.
        """
        self.grid.check(size)
        whole("batch", batch, 1, 2 * MAX_VIDEOS)
        return self.components.memory(size, batch)

    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts and negative prompts, each [B * num_videos_per_prompt, L, D],
        zero-padded to L.

        Raises:
            InputError: no text, or numbers outside their range.
            ModelError: there is no text encoder.
        """
        computes()
        every = whole("num_videos_per_prompt", num_videos_per_prompt, 1, MAX_VIDEOS)
        whole("max_sequence_length", max_sequence_length, 1, MAX_SEQUENCE_LENGTH)
        texts, negatives = prompt_lists(prompt, negative_prompt)
        both = encode_texts(self.components, texts, negatives, max_sequence_length)
        return both[0].repeat_interleave(every, 0), both[1].repeat_interleave(every, 0)

    def rewrite(
        self,
        prompt: str | list[str],
        rewrite_by: str | list[str] | Rewriter | None = None,
        timeout: float = REWRITE_TIMEOUT,
    ) -> Rewriting | None:
        """What the large generator reads instead of prompts, as the call's `rewrite` asks; None
        where it reads them as they are. Answers are kept by prompt."""
        number("timeout", timeout, MIN_TIMEOUT, MAX_TIMEOUT)
        texts, _ = prompt_lists(prompt, None)
        check_rewrite(rewrite_by, len(texts))
        settings = CallSettings(plan="large", rewrite=rewrite_by, rewrite_timeout=timeout)
        request = make_request(settings, self.defaults)
        source = rewriter_of(self.components, request)
        if source is None:
            return None
        computes()
        return rewrite(self.components, request, texts, source)

    def encode_context(
        self,
        prompt: str | list[str],
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        single_frame: bool = False,
        num_videos_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The small generator's contexts and negative contexts, each [B, max_context_len, D], from
        prompts and what `encode_prompt` made of them.

        Raises:
            InputError: no text, or embeddings that are not those of the prompts.
            ModelError: there is no understanding model.
        """
        computes()
        texts, _ = prompt_lists(prompt, None)
        every = whole("num_videos_per_prompt", num_videos_per_prompt, 1, MAX_VIDEOS)
        switch("single_frame", single_frame)
        for name, embeds in (
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
        ):
            check_rows(name, embeds, len(texts) * every)
        positive, negative = encode_contexts(
            self.components,
            texts,
            prompt_embeds[::every],
            negative_prompt_embeds[::every],
            single_frame,
        )
        return positive.repeat_interleave(every, 0), negative.repeat_interleave(every, 0)

    def encode(self, prompt: str | list[str], single_frame: bool = False) -> dict[str, Prompt]:
        """What each generator reads, as `nexus_rt.method.loop.sample` takes it."""
        embeds = self.encode_prompt(prompt)
        prompts = dict.fromkeys(self.engines, Prompt(*embeds))
        if self.context is not None and "small" in prompts:
            contexts = self.encode_context(prompt, *embeds, single_frame=single_frame)
            prompts["small"] = Prompt(*contexts)
        return prompts

    def prepare_latents(self, batch: int, size: ClipSize, generator: Generators = None) -> Tensor:
        """Noise [B, C, T, H, W], float32; a list of generators gives each sample its own.

        Raises:
            InputError: a size that the models do not make, or other numbers of generators.
        """
        computes()
        whole("batch", batch, 1, MAX_VIDEOS)
        self.grid.check(size)
        check_generators(generator, batch)
        return draw_noise(self.components, size, batch, generator)

    @property
    def grid(self) -> LatentGrid:
        """From pixels and frames to latent cells."""
        space, time = (self.vae.spatial, self.vae.temporal) if self.vae else (8, 4)
        return LatentGrid(space, time, self.patch)

    @property
    def built_sizes(self) -> tuple[BuiltSizes, ...]:
        """The sizes that exported engines were built for; () where there are none."""
        return self.components.profile.built_sizes

    def check_size(self, size: ClipSize, output_type: str) -> None:
        """Raise unless the models make clips of a size, as `output_type` asks for them.

        Raises:
            InputError: the size is no multiple of the models', or engines were built for others.
            ModelError: frames are asked for, and there is no VAE.
        """
        choose("output_type", output_type, OUTPUT_TYPES)
        check_size(size, self.components.profile)
        if output_type != "latent" and self.vae is None:
            raise no_vae()

    @named_arguments
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: Scale | None = None,
        guidance_scale_2: Scale | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[NexusPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
        *,
        context_embeds: Tensor | None = None,
        negative_context_embeds: Tensor | None = None,
        plan: str | Plan | None = None,
        shift: float | None = None,
        blend: BlendConfig | None = None,
        energy: str | None = None,
        gamma_w: float | None = None,
        solver: str | None = None,
        as_published: bool = False,
        prompt_embeds_2: Tensor | None = None,
        rewrite: str | list[str] | Rewriter | None = None,
        rewrite_timeout: float = REWRITE_TIMEOUT,
        reuse_parity: bool = False,
        timesteps: Sequence[float] | None = None,
        small_steps: int | None = None,
        large_steps: int | None = None,
    ) -> NexusOutput:
        """Generate videos; arguments as in diffusers' `WanPipeline`, and these:

        Args:
            guidance_scale: of the small generator (and the large, unless `guidance_scale_2` is
                given), in diffusers' meaning `v_u + g (v_c - v_u)`; the default 6.0 is the paper's
                s = 5.0. 1 runs without guidance. Two numbers are those of a generator's two
                experts, for high noise and for low: `guidance_scale_2=(4.0, 3.0)`.
            callback_on_step_end: may return new values of the tensors it was given (latents and any
                embeddings), used from the next step on; setting `pipe._interrupt = True` in it ends
                the loop and decodes what there is. An object with `tensor_inputs`, such as
                diffusers' `PipelineCallback`, names its tensors itself.
            context_embeds, negative_context_embeds: the small generator's contexts [B, L, D], as
                `encode_context` makes them; made from the prompt where they are not given.
            plan: which generator runs when: a `Plan` or what `nexus_rt.method.plan_text.parse_plan`
            reads. shift: of the time grid. blend: the frequency split (default: the published one).
                energy: overrides the plan's rule. gamma_w: exponent of the gate, for the plans that
                    follow it (default: 0.3).
            solver: "unipc" (default, where the folder's scheduler is no other), "euler", or "lcm":
                Euler to clean latents and noise again at every step, as models distilled for
                consistency are walked.
            timesteps: the list to walk, before the shift, such as `[1000, 750, 500, 250]`.
                small_steps, large_steps: of the generators' whole schedules, of which the plan
                gives each a share.
            rewrite: what the large generator reads instead of the prompt: "auto" (what the pair's
                understanding model answers), a text, one for each prompt, or a function of a
                prompt, such as `nexus_rt.pipeline.rewriting.ChatRewriter`; "off" for the prompt
                itself, None for the pair's default. Where it fails or takes longer than
                `rewrite_timeout` seconds, the prompt is kept and `NexusOutput.rewriting` says why.
            prompt_embeds_2: the large generator's text embeddings, beside `prompt_embeds`.
            reuse_parity: compute the steps that a plan reuses as well, and return their errors.
            as_published: the defaults and numerics of the published scripts: plan `reference`, 50
                steps, shift 5, s = 5 and their gates; timesteps of float64 sigmas, residual stream
                and velocity in float32, pixels by truncation (of "pil" here;
                `save_video(truncate=True)`).

        Raises:
            InputError: an argument is out of range; raised before any work.
            NumericsError: a generator's velocity is not finite.
            Cancelled: `cancel()` was called.
            DecodeError: decoding failed; its `latents_path` names the saved latents.
        """
        arguments = locals()
        settings = CallSettings.of(arguments)
        embeds = {name: arguments[name] for name in EMBEDS}
        tensors = callback_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        request = self.request(settings)
        prompts = Prompts.of(prompt, negative_prompt, settings, embeds)
        components = self.components  # as they are at the call's beginning
        steers(components, request, prompts)
        videos = len(prompts) * settings.num_videos_per_prompt
        check_generators(generator, videos)
        if latents is not None:
            check_latents(latents, (videos, self.channels, *self.grid.latent(request.size)))
        computes()
        with self.exclusive(request.plan) as hooks:
            if self.parallel is not None and generator is None and latents is None:
                generator = self.parallel.generator()
            deviations: list[ReuseDeviation] | None = [] if reuse_parity else None
            conditioning = encode(components, request, prompts, self._check_cancelled)
            noise = latents
            if noise is None:
                noise = draw_noise(components, request.size, videos, generator)
            on_step = None
            if callback_on_step_end is not None:
                on_step = StepCallback(self, callback_on_step_end, tensors, conditioning)
            hooks = replace(
                hooks, on_step=on_step, noise_rng=generator, reuse_deviations=deviations
            )
            clean = denoise(components, request, conditioning, noise, hooks)
            frames = decode(components, request, clean)
        return NexusOutput(frames, request.plan, deviations, conditioning.rewriting)

    @contextlib.contextmanager
    def exclusive(self, plan: Plan) -> Iterator[Hooks]:
        """The pipeline for one call of a plan: a second thread waits. Gives the hooks by which
        `cancel()` and `_interrupt` end the loop; a failure is told to the other processes of a
        shared call."""
        instance("plan", plan, Plan, "a Plan, as `make_plan` makes one")
        with self._calling:  # a call keeps state on the pipeline
            run = self._run
            run.begin(plan)
            hooks = Hooks(should_stop=run.cancel.is_set, should_finish=lambda: run.interrupt)
            if self.parallel is None:
                yield hooks
                return
            with broadcast_failure(self.parallel.mesh):
                yield hooks

    def _check_cancelled(self, stage: str, rewriting: Rewriting | None) -> None:
        if stage in WHEN and self.cancelled:
            raise Cancelled(f"stopped {WHEN[stage]}, as asked.")

    @property
    def cancelled(self) -> bool:
        """Whether `cancel()` was called since the running call began."""
        return self._run.cancel.is_set()

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call's plan, or of the last one's, as diffusers' pipelines have
        it."""
        return self._run.steps

    @property
    def interrupt(self) -> bool:
        """Whether the running call ends after its step, as diffusers' pipelines have it."""
        return self._run.interrupt

    @property
    def _interrupt(self) -> bool:  # the name by which diffusers' callbacks set it
        return self._run.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._run.interrupt = switch("_interrupt", value)

    def decode(
        self,
        latents: Tensor,
        output_type: str = "np",
        rescue: str | Path | None = None,
        truncate: bool = False,
    ) -> Any:
        """Latents [B, C, T, H, W] to frames as `output_type` asks; see `VideoDecoder.decode`.
        truncate: see `save_video`.

        Raises:
            InputError: no finite latents of this pair's channels, or settings that cannot be.
            DecodeError: decoding failed.
        """
        computes()
        choose("output_type", output_type, OUTPUT_TYPES)
        switch("truncate", truncate)
        place = None if rescue is None else as_path("rescue", rescue)
        return decode_latents(self.components, latents, output_type, place, truncate)
