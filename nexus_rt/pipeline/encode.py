"""What the generators of a call read: its prompts, encoded to their `Conditioning`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.core.limits import MAX_SEQUENCE_LENGTH
from nexus_rt.method.generator import Prompt
from nexus_rt.pipeline.components import Components
from nexus_rt.pipeline.inputs import Embeds, Prompts
from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.pipeline.rewriting import Rewriting, rewrite_prompts
from nexus_rt.pipeline.settings import is_off


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of the generators, a row a video.

    embeds: texts and contexts [B, L, D] under the call's names; None for those that no generator
        reads. rewriting: the text that the large generator reads instead of the prompt.
    """

    embeds: Embeds
    rewriting: Rewriting | None = None

    def prompts(self, generators: Mapping[str, Any]) -> dict[str, Prompt]:
        """The prompt of each generator."""
        text, no_text = self.embeds["prompt_embeds"], self.embeds["negative_prompt_embeds"]
        assert text is not None  # given or encoded
        prompts = dict.fromkeys(generators, Prompt(text, no_text))
        if (second := self.embeds["prompt_embeds_2"]) is not None and "large" in prompts:
            prompts["large"] = Prompt(second, no_text)
        if (context := self.embeds["context_embeds"]) is not None and "small" in prompts:
            prompts["small"] = Prompt(context, self.embeds["negative_context_embeds"])
        return prompts

    def rows(self, first: int, last: int) -> Conditioning:
        """That of some videos."""
        own = {n: None if v is None else v[first:last] for n, v in self.embeds.items()}
        return replace(self, embeds=own)

    def changed(self, embeds: Embeds) -> Conditioning:
        """The same with other embeddings."""
        return replace(self, embeds={**self.embeds, **embeds})


def encode(
    components: Components,
    request: GenerationRequest,
    prompts: Prompts,
    on_stage: Callable[[str, Rewriting | None], None] = lambda stage, rewriting: None,
    together: int | None = None,
) -> Conditioning:
    """Embeddings and contexts, one for each video: those given, the rest made of the prompts.

    All of it depends on the prompts alone: computed once a call, never at a step.

    Args:
        on_stage: called with "encoded", "rewriting", "rewritten" and "understood" as the stages
            end or (rewriting) begin; may raise `Cancelled`.
        together: videos that are denoised at a time; by default all.

    Raises:
        ModelError: an encoder that is needed is not loaded.
    """
    every = request.settings.num_videos_per_prompt
    if tight := components.tight(request, together or len(prompts) * every):
        components.unload_engines()
    embeds, rewriting = dict(prompts.embeds), None
    if prompts.texts is not None:
        text, no_text = encode_texts(
            components, prompts.texts, prompts.negatives, request.settings.max_sequence_length
        )
        embeds["prompt_embeds"] = text
        if embeds["negative_prompt_embeds"] is None:
            embeds["negative_prompt_embeds"] = no_text
        on_stage("encoded", None)
        source = rewriter_of(components, request)
        if embeds["prompt_embeds_2"] is None and source is not None:
            on_stage("rewriting", None)
            rewriting = rewrite(components, request, prompts.texts, source)
            on_stage("rewritten", rewriting)
            assert components.text is not None  # it has encoded the prompts
            embeds["prompt_embeds_2"] = components.text.encode(
                rewriting.texts, request.settings.max_sequence_length
            )
        if steers(components, request, prompts):
            positive, negative = encode_contexts(
                components,
                prompts.texts,
                text,
                embeds["negative_prompt_embeds"],
                request.size.frames == 1,
            )
            embeds["context_embeds"] = positive
            if embeds["negative_context_embeds"] is None:
                embeds["negative_context_embeds"] = negative
            on_stage("understood", None)
    for encoder in (components.text, components.context):
        if encoder is not None and (tight or not components.keep_encoders):
            (encoder.unload if components.keep_encoders else encoder.drop)()
    rows = {n: None if v is None else v.repeat_interleave(every, 0) for n, v in embeds.items()}
    return Conditioning(rows, rewriting)


def encode_texts(
    components: Components,
    texts: list[str],
    negatives: list[str] | None,
    max_sequence_length: int = MAX_SEQUENCE_LENGTH,
) -> tuple[Tensor, Tensor]:
    """Embeddings of prompts and of negative prompts, each [B, L, D], zero-padded to L."""
    if components.text is None:
        raise ModelError(
            "this pipeline has no text encoder; pass text_encoder= to from_pretrained, or"
            " prompt_embeds.",
            code="missing",
            param="text_encoder",
        )
    # Encoded one by one where they differ in length the results differ by rounding; together
    # they are reproducible.
    context = components.context
    stored = context.unconditional_text() if context and negatives is None else None
    if stored is None:
        both = [*texts, *(negatives or [""] * len(texts))]
        positive, negative = components.text.encode(both, max_sequence_length).chunk(2)
        return positive, negative
    positive = components.text.encode(texts, max_sequence_length)
    negative = torch.zeros_like(positive)  # the checkpoint's own embedding of no prompt
    rows = stored[:max_sequence_length]
    negative[:, : len(rows)] = rows.to(negative)
    return positive, negative


def steers(components: Components, request: GenerationRequest, prompts: Prompts) -> bool:
    """Whether the small generator's context is to be made of the prompts.

    Raises:
        InputError: it is, and there are only embeddings.
    """
    if components.context is None or prompts.embeds.get("context_embeds") is not None:
        return False
    if "small" in request.plan.generators and prompts.texts is None:
        raise InputError(
            "the small generator is steered by the understanding model, which reads the prompt;"
            " pass prompt, or context_embeds made by encode_context besides prompt_embeds.",
            code="missing",
            param="prompt",
        )
    return "small" in request.plan.generators


def encode_contexts(
    components: Components,
    texts: list[str],
    text_embeds: Tensor,
    negative_embeds: Tensor | None,
    single_frame: bool,
) -> tuple[Tensor, Tensor]:
    """The small generator's contexts and negative contexts, each [B, max_context_len, D]."""
    if components.context is None:
        raise ModelError(
            "this pipeline has no understanding model; pass understanding= and connector= to"
            " from_pretrained.",
            code="missing",
            param="understanding",
        )
    assert negative_embeds is not None  # given or encoded
    positive = components.context.encode(texts, text_embeds, single_frame)
    return positive, components.context.encode_unconditional(negative_embeds, single_frame)


def rewriter_of(components: Components, request: GenerationRequest) -> Any:
    """What a request rewrites by: what it asks for, else the pair's default; None where the large
    generator reads the prompt, or does not run."""
    source = request.settings.rewrite
    if source is None and components.context is not None and not request.published:
        source = components.defaults.rewrite
    return source if "large" in request.plan.generators and not is_off(source) else None


def rewrite(
    components: Components, request: GenerationRequest, texts: Sequence[str], source: Any
) -> Rewriting:
    """The text that the large generator reads instead of each prompt. Answers are kept by
    prompt."""
    model = components.context.understanding if components.context else None
    seconds = request.settings.rewrite_timeout
    ask = lambda: rewrite_prompts(texts, source, model, components.answers, seconds)
    return ask() if components.parallel is None else components.parallel.of_first(ask)
