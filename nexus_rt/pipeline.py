"""NexusPipeline: prompts in, frames out, through a small and a large generator of one latent
space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_rt.call import Call
from nexus_rt.checks import (
    check_embeddings,
    check_generators,
    check_latents,
    instance,
    number,
    prompt_lists,
    switch,
    whole,
)
from nexus_rt.engines.experts import boundaries, engines_by_name
from nexus_rt.engines.protocol import Sized, supports
from nexus_rt.errors import InputError, ModelError, choose
from nexus_rt.latents import Generators, LatentGrid, random_latents
from nexus_rt.memory.residency import (
    MemoryUse,
    ResidencyPlan,
    call_parts,
    parse_bytes,
    plan_residency,
)
from nexus_rt.models.text import MAX_SEQUENCE_LENGTH
from nexus_rt.parallel.layout import broadcast_failure
from nexus_rt.paths import as_path
from nexus_rt.pipeline_attributes import named_arguments
from nexus_rt.pipeline_models import PipelineModels
from nexus_rt.plan import Plan, Scale
from nexus_rt.process import computes
from nexus_rt.progress import check_options
from nexus_rt.request import (
    MAX_VIDEOS,
    OUTPUT_TYPES,
    CallInputs,
    Schedule,
    make_plan,
    make_request,
)
from nexus_rt.reuse import ReuseError
from nexus_rt.rewriting import (
    TIMEOUT,
    Rewriter,
    Rewriting,
    check_rewrite,
    is_off,
    rewrite_prompts,
)
from nexus_rt.size import BuiltSizes, ClipSize
from nexus_rt.step_runners import Prompt
from nexus_rt.upfb import BlendConfig
from nexus_rt.video import as_output


@dataclass
class NexusOutput:
    """A call's result.

    frames: as `output_type` asks: np [B, F, H, W, 3] in [0, 1], pt [B, F, 3, H, W], pil lists, or
        latents.
    plan: what was walked. rewriting: what the large generator read instead of the prompt, None
        where it read the prompt. reuse_errors: with `reuse_parity`, of every reused step.
    """

    frames: Any
    plan: Plan
    reuse_errors: list[ReuseError] | None = None
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
        self._cancel.set()

    def make_plan(
        self,
        plan: str | Plan | None = None,
        num_inference_steps: int | None = None,
        shift: float | None = None,
        energy: str | None = None,
        gamma_w: float | None = None,
        as_published: bool = False,
        timesteps: Sequence[float] | None = None,
        small_steps: int | None = None,
        large_steps: int | None = None,
    ) -> Plan:
        """The plan a call with these arguments would walk.

        Raises:
            InputError: as a call with them.
        """
        switch("as_published", as_published)
        schedule = Schedule(timesteps, small_steps, large_steps)
        made = make_plan(
            self.defaults,
            plan,
            num_inference_steps,
            shift,
            energy,
            gamma_w,
            as_published,
            schedule,
        )
        return made.with_experts(boundaries(self.engines))

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
        whole("videos", videos, 1, MAX_VIDEOS)
        switch("guided", guided)
        vram = None if vram is None else parse_bytes(vram)
        return plan_residency(
            plan.with_experts(boundaries(self.engines)),
            self.call_parts(size, videos * (1 + guided)),
            self.vram if vram is None else vram,
        )

    def call_parts(self, size: ClipSize, batch: int = 2) -> dict[str, MemoryUse]:
        """What a call holds in memory; batch: samples of a step, unconditional twins counted.

        Raises:
            InputError: a size that the models do not make.
        """
        self.grid.check(size)
        whole("batch", batch, 1, 2 * MAX_VIDEOS)
        others: dict[str, Any] = {"text encoder": self.text, "vae": self.vae}
        if self.context:
            others |= {"understanding": self.context.understanding, "connector": self.context}
        return call_parts(
            engines_by_name(self.engines),
            {name: other for name, other in others.items() if other is not None},
            size,
            batch,
        )

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
        if self.text is None:
            raise ModelError(
                "this pipeline has no text encoder; pass text_encoder= to from_pretrained, or"
                " prompt_embeds."
            )
        prompts, negatives = prompt_lists(prompt, negative_prompt)
        # Encoded one by one where they differ in length the results differ by rounding; together
        # they are reproducible.
        stored = self.context.unconditional_text() if self.context and negatives is None else None
        if stored is None:
            embeds = self.text.encode(
                [*prompts, *(negatives or [""] * len(prompts))], max_sequence_length
            )
            positive, negative = embeds.chunk(2)
        else:  # the checkpoint's own embedding of no prompt
            positive = self.text.encode(prompts, max_sequence_length)
            negative = torch.zeros_like(positive)
            rows = stored[:max_sequence_length]
            negative[:, : len(rows)] = rows.to(negative)
        return positive.repeat_interleave(every, 0), negative.repeat_interleave(every, 0)

    def rewrites_by(
        self,
        rewrite: str | list[str] | Rewriter | None,
        plan: Plan | None = None,
        as_published: bool = False,
    ) -> str | list[str] | Rewriter | None:
        """What a call with these arguments rewrites by: what was asked, else the pair's default;
        None where the large generator reads the prompt, or does not run in the plan.

        Raises:
            InputError: no Plan.
        """
        switch("as_published", as_published)
        if plan is not None:
            instance("plan", plan, Plan, "a Plan, as `make_plan` makes one")
        if rewrite is None and self.context is not None and not as_published:
            rewrite = self.defaults.rewrite
        runs = plan is None or "large" in plan.generators
        return rewrite if runs and not is_off(rewrite) else None

    def rewrite(
        self,
        prompt: str | list[str],
        rewrite: str | list[str] | Rewriter | None = None,
        timeout: float = TIMEOUT,
    ) -> Rewriting | None:
        """What the large generator reads instead of prompts, as the call's `rewrite` asks; None
        where it reads them as they are. Answers are kept by prompt."""
        rewrite = self.rewrites_by(rewrite)
        if rewrite is None:
            return None
        computes()
        prompts, _ = prompt_lists(prompt, None)
        check_rewrite(rewrite, len(prompts))
        number("timeout", timeout, 1e-3, 1e6)
        model = self.context.understanding if self.context else None
        return rewrite_prompts(prompts, rewrite, model, self._rewritten, timeout)

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
        if self.context is None:
            raise ModelError(
                "this pipeline has no understanding model; pass understanding= and connector= to"
                " from_pretrained."
            )
        prompts, _ = prompt_lists(prompt, None)
        every = whole("num_videos_per_prompt", num_videos_per_prompt, 1, MAX_VIDEOS)
        switch("single_frame", single_frame)
        for name, embeds in (
            ("prompt_embeds", prompt_embeds),
            ("negative_prompt_embeds", negative_prompt_embeds),
        ):
            instance(name, embeds, Tensor, "a tensor of embeddings [batch, tokens, width]")
            check_embeddings({name: embeds})
            if len(embeds) != len(prompts) * every:
                raise InputError(
                    f"{name} are for {len(embeds)} videos of {len(prompts) * every}; expected one"
                    " for each."
                )
        positive = self.context.encode(prompts, prompt_embeds[::every], single_frame)
        negative = self.context.encode_unconditional(negative_prompt_embeds[::every], single_frame)
        return positive.repeat_interleave(every, 0), negative.repeat_interleave(every, 0)

    def encode(self, prompt: str | list[str], single_frame: bool = False) -> dict[str, Prompt]:
        """What each generator reads, as `denoise` takes it."""
        embeds = self.encode_prompt(prompt)
        prompts = dict.fromkeys(self.engines, Prompt(*embeds))
        if self.context is not None and "small" in prompts:
            prompts["small"] = Prompt(
                *self.encode_context(prompt, *embeds, single_frame=single_frame)
            )
        return prompts

    def prepare_latents(
        self, batch: int, size: ClipSize, generator: Generators = None
    ) -> Tensor:
        """Noise [B, C, T, H, W], float32; a list of generators gives each sample its own.

        Raises:
            InputError: a size that the models do not make, or other numbers of generators.
        """
        computes()
        whole("batch", batch, 1, MAX_VIDEOS)
        self.grid.check(size)
        check_generators(generator, batch)
        shape = (batch, self.channels, *self.grid.latent(size))
        return random_latents(shape, generator, self.device)

    @property
    def grid(self) -> LatentGrid:
        """From pixels and frames to latent cells."""
        space, time = (self.vae.spatial, self.vae.temporal) if self.vae else (8, 4)
        return LatentGrid(space, time, self.patch)

    @property
    def built_sizes(self) -> tuple[BuiltSizes, ...]:
        """The sizes that exported engines were built for; () where there are none."""
        engines = (*self.engines.values(), self.vae)
        return tuple(sizes for e in engines if supports(e, Sized) for sizes in e.built_sizes)

    def check_size(self, size: ClipSize, output_type: str) -> None:
        """Raise unless the models make clips of a size, as `output_type` asks for them.

        Raises:
            InputError: the size is no multiple of the models', or engines were built for others.
            ModelError: frames are asked for, and there is no VAE.
        """
        choose("output_type", output_type, OUTPUT_TYPES)
        self.grid.check(size)
        for built in self.built_sizes:
            built.check(size)
        if output_type != "latent" and self.vae is None:
            raise ModelError(
                "this pipeline has no VAE; pass vae= to from_pretrained, or output_type='latent'."
            )

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
        rewrite_timeout: float = TIMEOUT,
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
            plan: which generator runs when: a `Plan` or what `nexus_rt.plan_text.parse_plan` reads.
            shift: of the time grid. blend: the frequency split (default: the published one).
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
                prompt, such as `nexus_rt.rewriting.ChatRewriter`; "off" for the prompt itself, None
                for the pair's default. Where it fails or takes longer than `rewrite_timeout`
                seconds, the prompt is kept and `NexusOutput.rewriting` says why.
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
        request = make_request(
            self.defaults,
            height=height,
            width=width,
            num_frames=num_frames,
            plan=plan,
            shift=shift,
            energy=energy,
            num_inference_steps=num_inference_steps,
            gamma_w=gamma_w,
            guidance_scale=guidance_scale,
            blend=blend,
            guidance_scale_2=guidance_scale_2,
            solver=solver,
            output_type=output_type,
            published=as_published,
            num_videos_per_prompt=num_videos_per_prompt,
            reuse_parity=reuse_parity,
            timesteps=timesteps,
            small_steps=small_steps,
            large_steps=large_steps,
        )
        plan = request.plan.with_experts(boundaries(self.engines))
        request = replace(request, plan=plan)
        given = {
            "prompt_embeds": prompt_embeds,
            "prompt_embeds_2": prompt_embeds_2,
            "negative_prompt_embeds": negative_prompt_embeds,
            "context_embeds": context_embeds,
            "negative_context_embeds": negative_context_embeds,
        }
        inputs = CallInputs(
            prompt,
            negative_prompt,
            given,
            latents,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
            rewrite,
            rewrite_timeout,
        )
        computes()
        with self._calling:  # a second thread waits: a call keeps state on the pipeline
            self._cancel.clear()
            self._interrupt = False
            self._steps = len(plan)
            if self.parallel is not None and generator is None and latents is None:
                inputs = replace(inputs, generator=self.parallel.generator())
            call = Call(self, request, inputs)
            with broadcast_failure(self.parallel.mesh if self.parallel else None):
                return NexusOutput(call.run(), request.plan, call.reuse_errors, call.rewriting)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel()` was called since the running call began."""
        return self._cancel.is_set()

    @property
    def num_timesteps(self) -> int:
        """Steps of the running call's plan, or of the last one's, as diffusers' pipelines have
        it."""
        return self._steps

    @property
    def interrupt(self) -> bool:
        """Whether the running call ends after its step, as diffusers' pipelines have it."""
        return self._interrupt

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
        if rescue is not None:
            rescue = as_path("rescue", rescue)
        check_latents(latents, (None, self.channels, None, None, None))
        if output_type == "latent":
            return latents
        if self.vae is None:
            raise ModelError(
                "this pipeline has no VAE; pass vae= to from_pretrained, or output_type='latent'."
            )
        return as_output(self.vae.decode(latents, rescue), output_type, truncate)
