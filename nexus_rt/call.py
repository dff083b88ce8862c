"""One call of a pipeline: check, place, encode, sample, decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nexus_rt.checks import CALLBACK_TENSORS, check_generators, check_latents, check_prompts
from nexus_rt.engines.experts import boundaries, engines_by_name
from nexus_rt.engines.protocol import PublishedNumerics, supports
from nexus_rt.errors import Cancelled, InputError, choose, shown
from nexus_rt.memory.residency import Residency
from nexus_rt.plan import Step
from nexus_rt.progress import progress_bar
from nexus_rt.request import CallInputs, GenerationRequest
from nexus_rt.reuse import ReuseError
from nexus_rt.rewriting import Rewriting, check_rewrite, is_off
from nexus_rt.sampling import denoise
from nexus_rt.step_runners import CallbackResult, Prompt

if TYPE_CHECKING:
    from nexus_rt.pipeline import NexusPipeline

Embeds = dict[str, Tensor | None]  # texts and contexts under the call's argument names


@dataclass(frozen=True)
class Placement:
    """Where a call's weights are.

    residency: moves the engines between memories; None where nothing moves.
    """

    residency: Residency | None

    @property
    def tight(self) -> bool:
        """Whether memory is budgeted so that parts come and go."""
        return self.residency is not None and self.residency.plan.mode != "resident"


class Call:
    """A pipeline's parts at work for one request."""

    def __init__(self, pipe: NexusPipeline, request: GenerationRequest, inputs: CallInputs) -> None:
        self.pipe, self.request, self.inputs = pipe, request, inputs
        self.reuse_errors: list[ReuseError] | None = [] if request.reuse_parity else None
        self.rewriting: Rewriting | None = None

    def run(self) -> Any:
        """Frames as the request's `output_type` asks."""
        videos = self.check()
        place = self.place(videos)
        embeds = self.encode()
        self.leave_encoders(place)
        latents = self.sample(self.noise(videos), embeds, place)
        return self.decode(latents, place)

    def check(self) -> int:
        """The number of videos, everything about the call checked.

        Raises:
            InputError: before any work.
        """
        pipe, request, inputs = self.pipe, self.request, self.inputs
        size, plan = request.size, request.plan
        pipe.check_size(size, request.output_type)
        if absent := [g for g in plan.generators if g not in pipe.engines]:
            raise InputError(
                f"plan {plan.name!r} runs the {absent[0]} generator, which was not loaded; pass"
                f" {absent[0]}=."
            )
        self._check_experts()
        count = check_prompts(
            inputs.prompt, inputs.negative_prompt, inputs.embeds, inputs.max_sequence_length
        )
        check_rewrite(inputs.rewrite, None if inputs.prompt is None else count)
        rewrites = inputs.rewrite is not None and not is_off(inputs.rewrite)
        if rewrites and "large" not in plan.generators:
            raise InputError(
                f"rewrite is what the large generator reads, and plan {plan.name!r} does not run"
                " it; leave rewrite out, or pass another plan."
            )
        if self.steered and inputs.prompt is None:
            raise InputError(
                "the small generator is steered by the understanding model, which reads the prompt;"
                " pass prompt, or context_embeds made by encode_context besides prompt_embeds."
            )
        videos = count * request.videos_per_prompt
        check_generators(inputs.generator, videos)
        if inputs.latents is not None:
            latent = pipe.grid.latent(size)
            check_latents(inputs.latents, (videos, pipe.channels, *latent))
        return videos

    def _check_experts(self) -> None:
        """Raise where a generator of one transformer is given two guidance scales."""
        plan, guidance = self.request.plan, self.request.guidance
        have = boundaries(self.pipe.engines)
        for name in plan.generators:
            if isinstance(scale := getattr(guidance, name), tuple) and name not in have:
                argument = "guidance_scale" if name == "small" else "guidance_scale_2"
                raise InputError(
                    f"the {name} generator has one transformer and {argument} is {scale}, a scale"
                    " for each of two experts; pass one number for it."
                )

    @property
    def steered(self) -> bool:
        """Whether the small generator's context is to be made of the prompt."""
        if self.pipe.context is None or self.inputs.embeds["context_embeds"] is not None:
            return False
        return "small" in self.request.plan.generators

    def place(self, videos: int) -> Placement:
        """Decide where the weights are; under a memory budget, clear the device first."""
        pipe, request = self.pipe, self.request
        if pipe.vram is None:
            return Placement(None)
        plan = pipe.plan_residency(request.plan, request.size, videos)
        residency = Residency(plan, engines_by_name(pipe.engines))
        if plan.mode != "resident":
            for engine in pipe.engines.values():
                engine.unload()
        return Placement(residency)

    def encode(self) -> Embeds:
        """Embeddings and contexts, one for each video: those given, the rest made of the prompt.

        Raises:
            Cancelled: `cancel()` was called meanwhile.
        """
        pipe, request, inputs = self.pipe, self.request, self.inputs
        every, prompt, given = request.videos_per_prompt, inputs.prompt, inputs.embeds
        embeds = {k: None if v is None else v.repeat_interleave(every, 0) for k, v in given.items()}
        if prompt is not None:
            positive, negative = pipe.encode_prompt(
                prompt, inputs.negative_prompt, every, inputs.max_sequence_length
            )
            embeds["prompt_embeds"] = positive
            if given["negative_prompt_embeds"] is None:
                embeds["negative_prompt_embeds"] = negative
            self._check_cancelled("after the prompt was encoded")
        embeds["prompt_embeds_2"] = self.rewritten(embeds.get("prompt_embeds_2"))
        if self.steered:
            text, no_text = embeds["prompt_embeds"], embeds["negative_prompt_embeds"]
            assert prompt is not None and text is not None and no_text is not None  # `check`
            context, negative = pipe.encode_context(
                prompt, text, no_text, request.size.frames == 1, every
            )
            embeds["context_embeds"] = context
            if given["negative_context_embeds"] is None:
                embeds["negative_context_embeds"] = negative
            self._check_cancelled("after the prompt was understood")
        return embeds

    def rewritten(self, given: Tensor | None) -> Tensor | None:
        """The large generator's embeddings, where they are not the prompt's.

        Raises:
            Cancelled: `cancel()` was called meanwhile.
        """
        pipe, request, inputs = self.pipe, self.request, self.inputs
        rewrite = pipe.rewrites_by(inputs.rewrite, request.plan, request.published)
        if given is not None or inputs.prompt is None or rewrite is None:
            return given
        prompt = inputs.prompt
        ask = lambda: pipe.rewrite(prompt, rewrite, inputs.rewrite_timeout)
        self.rewriting = ask() if pipe.parallel is None else pipe.parallel.of_first(ask)
        assert self.rewriting is not None  # it is asked for
        self._check_cancelled("after the prompt was rewritten")
        assert pipe.text is not None  # `encode_prompt` has used it
        texts = pipe.text.encode(self.rewriting.texts, inputs.max_sequence_length)
        return texts.repeat_interleave(request.videos_per_prompt, 0)

    def _check_cancelled(self, when: str) -> None:
        if self.pipe.cancelled:
            raise Cancelled(f"stopped {when}, as asked.")

    def leave_encoders(self, place: Placement) -> None:
        """Free the encoders, where memory is budgeted or they are not kept."""
        pipe = self.pipe
        for encoder in (pipe.text, pipe.context) if place.tight or not pipe.keep_encoders else ():
            if encoder is not None:
                (encoder.unload if pipe.keep_encoders else encoder.drop)()

    def noise(self, videos: int) -> Tensor:
        """The latents that the call was given, or drawn ones."""
        if self.inputs.latents is not None:
            return self.inputs.latents
        return self.pipe.prepare_latents(videos, self.request.size, self.inputs.generator)

    def prompts(self, embeds: Embeds) -> dict[str, Prompt]:
        """The prompt of each generator."""
        text, context = embeds["prompt_embeds"], embeds["context_embeds"]
        assert text is not None  # given or encoded
        prompts = dict.fromkeys(self.pipe.engines, Prompt(text, embeds["negative_prompt_embeds"]))
        if (second := embeds.get("prompt_embeds_2")) is not None:
            prompts["large"] = Prompt(second, embeds["negative_prompt_embeds"])
        if context is not None:
            prompts["small"] = Prompt(context, embeds["negative_context_embeds"])
        return prompts

    def sample(self, noise: Tensor, embeds: Embeds, place: Placement) -> Tensor:
        """Noise to clean latents, with the progress bar and the caller's callback."""
        pipe, request, plan = self.pipe, self.request, self.request.plan
        running = [pipe.engines[name] for name in plan.generators] if request.published else []
        exact = [engine for engine in running if supports(engine, PublishedNumerics)]
        options = {"total": len(plan), "desc": plan.name, "unit": "step", **pipe.progress}
        with progress_bar(**options) as bar:

            def on_step(step: Step, latents: Tensor) -> CallbackResult | None:
                bar.set_postfix_str(step.runs, refresh=False)
                bar.update()
                return self.callback(step, latents, embeds)

            try:
                for engine in exact:
                    engine.published_numerics(True)
                return denoise(
                    noise.to(pipe.device),
                    plan,
                    pipe.engines,
                    self.prompts(embeds),
                    guidance_scale=request.guidance.small,
                    guidance_scale_2=request.guidance.large,
                    blend_config=request.blend,
                    solver=request.solver,
                    kernels=pipe.kernels,
                    residency=place.residency,
                    generator=self.inputs.generator,
                    reuse_errors=self.reuse_errors,
                    on_step=on_step,
                    should_stop=lambda: pipe.cancelled,
                    should_finish=lambda: pipe.interrupt,
                )
            finally:
                for engine in exact:
                    engine.published_numerics(False)
                if place.residency is not None:
                    place.residency.close()

    def callback(self, step: Step, latents: Tensor, embeds: Embeds) -> CallbackResult | None:
        """Ask the caller's callback; new embeddings are put into `embeds`.

        Raises:
            InputError: it returned anything but a dictionary of tensors like those there are.
        """
        if self.inputs.callback is None:
            return None
        known: Embeds = {"latents": latents, **embeds}
        tensors = {name: known[name] for name in self.inputs.tensors}
        answer = self.inputs.callback(self.pipe, step.index, step.timestep, tensors)
        if answer is None:
            return None
        if not isinstance(answer, dict):
            raise InputError(
                f"the callback returned {shown(answer)}; expected a dictionary of tensors, or None."
            )
        for name, value in answer.items():
            choose("callback tensor", name, CALLBACK_TENSORS)
            there = known[name]
            if not isinstance(value, Tensor) or there is None or value.shape != there.shape:
                shape = None if there is None else list(there.shape)
                returned = list(value.shape) if isinstance(value, Tensor) else shown(value)
                raise InputError(
                    f"the callback returned {name} as {returned}; expected a tensor of shape"
                    f" {shape}."
                )
        new = {n: v for n, v in answer.items() if n != "latents" and v is not known[n]}
        embeds.update(new)
        return CallbackResult(answer.get("latents"), self.prompts(embeds) if new else None)

    def decode(self, latents: Tensor, place: Placement) -> Any:
        """Frames; under a tight budget the engines leave the memory to the decoder, which leaves it
        in its turn."""
        pipe, request = self.pipe, self.request
        for engine in pipe.engines.values() if place.tight else ():
            engine.unload()
        frames = pipe.decode(latents, request.output_type, truncate=request.published)
        if place.tight and pipe.vae is not None:
            pipe.vae.unload()
        return frames
