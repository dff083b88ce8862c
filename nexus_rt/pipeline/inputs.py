"""A call's prompts and embeddings, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nexus_rt.core.checks import check_unicode, instance
from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.limits import MAX_PROMPT
from nexus_rt.pipeline.rewriting import check_rewrite
from nexus_rt.pipeline.settings import CallSettings

EMBEDS = (
    "prompt_embeds",
    "prompt_embeds_2",
    "negative_prompt_embeds",
    "context_embeds",
    "negative_context_embeds",
)
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


def prompt_lists(prompt: Any, negative: Any) -> tuple[list[str], list[str] | None]:
    """Prompts as a list, and as many negative prompts (None: none was given).

    Raises:
        InputError: anything but text or a list of texts, an empty list, or other counts.
    """
    prompts = _texts("prompt", prompt)
    if negative is None or (isinstance(negative, (str, list, tuple)) and not negative):
        return prompts, None
    negatives = _texts("negative_prompt", negative)
    negatives = negatives * len(prompts) if isinstance(negative, str) else negatives
    if len(negatives) != len(prompts):
        raise InputError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts; pass one for each, or"
            " one for all.",
            code="mismatch",
            param="negative_prompt",
        )
    return prompts, negatives if any(negatives) else None


def _texts(name: str, value: Any) -> list[str]:
    texts = (
        [value]
        if isinstance(value, str)
        else list(value)
        if isinstance(value, (list, tuple))
        else None
    )
    if texts is None or not all(isinstance(t, str) for t in texts):
        odd = value if texts is None else next(t for t in texts if not isinstance(t, str))
        raise InputError(
            f"{name} holds {shown(odd)}; expected text, or a list of texts.",
            code="invalid_type",
            param=name,
        )
    each = [name] if isinstance(value, str) else [f"{name}[{i}]" for i in range(len(texts))]
    if not texts:
        raise InputError(
            f"the {name.removeprefix('negative_')} list is empty; pass at least one prompt.",
            code="missing",
            param=name,
        )
    for place, text in zip(each, texts, strict=True):
        if len(text) > MAX_PROMPT:
            raise InputError(
                f"the {place} has {len(text)} characters; expected at most {MAX_PROMPT}.",
                code="too_large",
                param=name,
            )
        check_unicode(f"the {place}", text, name)
    return texts


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


def check_rows(name: str, embeds: Any, videos: int) -> None:
    """Raise unless embeddings are [B, L, D] of as many videos."""
    instance(name, embeds, Tensor, "a tensor of embeddings [batch, tokens, width]")
    check_embeddings({name: embeds})
    if len(embeds) != videos:
        raise InputError(
            f"{name} are for {len(embeds)} videos of {videos}; expected one for each.",
            code="mismatch",
            param=name,
        )


def _either(text: str, embeds: str, code: str) -> InputError:
    """The error for neither or both of a text and its embeddings."""
    return InputError(f"pass either {text} or {embeds}, and not both.", code=code, param=text)
