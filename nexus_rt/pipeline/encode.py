"""What the generators of a call read: its prompts, checked once, and their `Conditioning`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.checks import prompt_lists
from nexus_rt.core.errors import InputError, ModelError, choose, shorten, shown
from nexus_rt.core.limits import MAX_SEQUENCE_LENGTH
from nexus_rt.method.generator import Prompt
from nexus_rt.pipeline.call import Components
from nexus_rt.pipeline.request import GenerationRequest
from nexus_rt.pipeline.rewriting import Rewriting, check_rewrite, rewrite_prompts
from nexus_rt.pipeline.settings import CallSettings, is_off

EMBEDS = (
    "prompt_embeds",
    "prompt_embeds_2",
    "negative_prompt_embeds",
    "context_embeds",
    "negative_context_embeds",
)
CALLBACK_TENSORS = ("latents", *EMBEDS)
Embeds = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Prompts:
    """A call's prompts, all checked.

    texts: None where embeddings are given instead. negatives: None where none was given. embeds:
    those that were given, a row a prompt, under the call's names.
    """

    texts: list[str] | None
    negatives: list[str] | None = None
    embeds: Embeds = field(default_factory=dict)

    @classmethod
    def of(
        cls, prompt: Any, negative: Any, settings: CallSettings, embeds: Embeds | None = None
    ) -> Prompts:
        """A call's prompts and what it says of rewriting them.

        Raises:
            InputError: neither text nor embeddings or both, negatives that are not for them,
                embeddings of other counts or lengths, or a rewrite that does not fit them.
        """
        given = {name: (embeds or {}).get(name) for name in EMBEDS}
        text, no_text = given["prompt_embeds"], given["negative_prompt_embeds"]
        if negative is not None and not isinstance(negative, (str, list, tuple)):
            raise InputError(
                f"negative_prompt holds {shown(negative)}; expected text, or a list of texts.",
                code="invalid_type",
                param="negative_prompt",
            )
        if (prompt is None) == (text is None):
            raise _either("prompt", "prompt_embeds", "missing" if text is None else "conflict")
        if negative and no_text is not None:
            raise _either("negative_prompt", "negative_prompt_embeds", "conflict")
        check_embeddings(given)
        if prompt is None:
            if negative:
                raise InputError(
                    "negative_prompt goes with prompt; pass negative_prompt_embeds beside"
                    " prompt_embeds.",
                    code="conflict",
                    param="negative_prompt",
                )
            check_rewrite(settings.rewrite, None)
            return cls(None, None, given)
        texts, negatives = prompt_lists(prompt, negative)
        for name in ("negative_prompt_embeds", "context_embeds", "prompt_embeds_2"):
            if (value := given[name]) is not None and len(value) != len(texts):
                raise InputError(
                    f"{name} are for {len(value)} prompts of {len(texts)}; expected one for each.",
                    code="mismatch",
                    param=name,
                )
        if no_text is not None and no_text.shape[1] != settings.max_sequence_length:
            raise InputError(
                f"negative_prompt_embeds have {no_text.shape[1]} tokens; expected"
                f" {settings.max_sequence_length}, as the prompt's.",
                code="mismatch",
                param="negative_prompt_embeds",
            )
        check_rewrite(settings.rewrite, len(texts))
        return cls(texts, negatives, given)

    def __len__(self) -> int:
        """The number of prompts."""
        if self.texts is not None:
            return len(self.texts)
        text = self.embeds["prompt_embeds"]
        assert text is not None  # checked by `of`
        return len(text)


def check_embeddings(given: dict[str, Tensor | None]) -> None:
    """Raise unless embeddings are [B, L, D] and a negative one is like its positive (NaN is the
    first step's to name).

    given: under the call's own names, the texts and the two contexts.
    """
    for name, value in given.items():
        if value is None:
            continue
        if (
            not isinstance(value, Tensor)
            or value.ndim != 3
            or not value.is_floating_point()
            or 0 in value.shape
        ):
            words = (
                f"{list(value.shape)} of {value.dtype}"
                if isinstance(value, Tensor)
                else shown(value)
            )
            raise InputError(
                f"{name} is {words}; expected a tensor of embeddings [batch, tokens, width].",
                code="invalid_type",
                param=name,
            )
    for name in ("prompt_embeds", "context_embeds"):
        positive, negative = given.get(name), given.get(f"negative_{name}")
        if negative is not None and positive is not None and negative.shape != positive.shape:
            raise InputError(
                f"negative_{name} has shape {list(negative.shape)} and {name}"
                f" {list(positive.shape)}; expected the same: one for each video, padded to one"
                " length.",
                code="mismatch",
                param=f"negative_{name}",
            )
    second, first = given.get("prompt_embeds_2"), given.get("prompt_embeds")
    if second is not None and first is not None and second.shape != first.shape:
        raise InputError(
            f"prompt_embeds_2 has shape {list(second.shape)} and prompt_embeds {list(first.shape)};"
            " expected the same: the large generator's text for the same prompts.",
            code="mismatch",
            param="prompt_embeds_2",
        )
    text, context = given.get("prompt_embeds"), given.get("context_embeds")
    if text is not None and context is not None and len(text) != len(context):
        raise InputError(
            f"prompt_embeds are for {len(text)} prompts and context_embeds for {len(context)};"
            " expected as many.",
            code="mismatch",
            param="context_embeds",
        )


def _either(text: str, embeds: str, code: str) -> InputError:
    """The error for neither or both of a text and its embeddings."""
    return InputError(f"pass either {text} or {embeds}, and not both.", code=code, param=text)


@dataclass(frozen=True)
class Conditioning:
    """What the generators are told, a row a video.

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


def callback_tensors(callback: Any, names: Any) -> tuple[str, ...]:
    """Names of the tensors that a callback is called with.

    An object with `tensor_inputs`, as diffusers' `PipelineCallback` and `MultiPipelineCallbacks`
    have them, names its own; `names` other than the default are added to them.

    Raises:
        InputError: it cannot be called, or there are no tensors of such names.
    """
    if callback is None and isinstance(names, tuple) and names == ("latents",):
        return names
    if callback is not None and not callable(callback):
        raise InputError(
            f"callback_on_step_end is {shown(callback)}; expected a function.",
            code="invalid_type",
            param="callback_on_step_end",
        )
    wanted = _names("callback_on_step_end_tensor_inputs", names)
    if inspect.getattr_static(callback, "tensor_inputs", None) is None:
        return wanted
    kind = type(callback).__name__
    try:
        own = callback.tensor_inputs
    except Exception as error:  # diffusers' base class has a property that raises
        raise InputError(
            f"the {kind} has no tensor_inputs that can be read ({shorten(error, 120)}); set them to"
            " a list of names, such as ['latents'].",
            param="callback_on_step_end",
        ) from error
    mine = _names(f"{kind}.tensor_inputs", own)
    return mine if wanted == ("latents",) else tuple(dict.fromkeys((*mine, *wanted)))


def _names(argument: str, value: Any) -> tuple[str, ...]:
    """Names of callback tensors, once each."""
    if not isinstance(value, (list, tuple)):
        raise InputError(
            f"{argument} is {shown(value)}; expected a list of names.",
            code="invalid_type",
            param=argument,
        )
    return tuple(
        dict.fromkeys(choose("callback tensor", n, CALLBACK_TENSORS, argument) for n in value)
    )
