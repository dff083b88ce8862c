"""Checks of a call's arguments: each says what was wrong, what was expected, and what to do."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nexus_rt.errors import InputError, choose, cut
from nexus_rt.models.text import MAX_SEQUENCE_LENGTH

MAX_PROMPT = 100_000  # characters

CALLBACK_TENSORS = (
    "latents",
    "prompt_embeds",
    "prompt_embeds_2",
    "negative_prompt_embeds",
    "context_embeds",
    "negative_context_embeds",
)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int: a whole number of Python's or numpy's, no bool, no float.

    Raises:
        InputError: of another type, or outside low..high.
    """
    try:
        number = None if isinstance(value, (bool, float)) else value.__index__()
    except (AttributeError, TypeError):
        number = None
    if number is None:
        raise InputError(
            f"{name} is {cut(repr(value), 80)}; expected a whole number of at least {low}."
        )
    if not low <= number <= high:
        shown = f"at least {low}" if number < low else f"at most {high}"
        raise InputError(f"{name} is {cut(number, 80)}; expected a whole number of {shown}.")
    return number


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float within low..high.

    Raises:
        InputError: of another type, not finite, or outside.
    """
    if isinstance(value, bool) or (
        not isinstance(value, (int, float)) and not hasattr(value, "__float__")
    ):
        raise InputError(f"{name} is {cut(repr(value), 80)}; expected a number.")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        result = math.nan
    if not low <= result <= high:
        raise InputError(
            f"{name} is {cut(repr(value), 80)}; expected a number from {low:g} to {high:g}."
        )
    return result


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
            " one for all."
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
        raise InputError(f"{name} holds {cut(repr(odd), 80)}; expected text, or a list of texts.")
    if not texts:
        raise InputError(
            f"the {name.removeprefix('negative_')} list is empty; pass at least one prompt."
        )
    if long := [t for t in texts if len(t) > MAX_PROMPT]:
        raise InputError(
            f"the {name} has {len(long[0])} characters; expected at most {MAX_PROMPT}."
        )
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"the {name} {cut(ascii(text), 80)} holds half a surrogate pair, which is no text."
            ) from None
    return texts


def check_generators(generator: Any, videos: int) -> None:
    """Raise unless `generator` is None, a torch.Generator, or one for each video."""
    several = (
        generator
        if isinstance(generator, (list, tuple))
        else []
        if generator is None
        else [generator]
    )
    for one in several:
        if not isinstance(one, torch.Generator):
            raise InputError(
                f"generator is {cut(repr(one), 80)}; expected a torch.Generator, such as"
                " torch.Generator().manual_seed(7), or one for each video."
            )
    if isinstance(generator, (list, tuple)) and len(generator) != videos:
        raise InputError(
            f"{len(generator)} generators for {videos} videos; pass one for each, or a single one."
        )


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
            shown = (
                f"{list(value.shape)} of {value.dtype}"
                if isinstance(value, Tensor)
                else cut(repr(value), 80)
            )
            raise InputError(
                f"{name} is {shown}; expected a tensor of embeddings [batch, tokens, width]."
            )
    for name in ("prompt_embeds", "context_embeds"):
        positive, negative = given.get(name), given.get(f"negative_{name}")
        if negative is not None and positive is not None and negative.shape != positive.shape:
            raise InputError(
                f"negative_{name} has shape {list(negative.shape)} and {name}"
                f" {list(positive.shape)}; expected the same: one for each video, padded to one"
                " length."
            )
    second, first = given.get("prompt_embeds_2"), given.get("prompt_embeds")
    if second is not None and first is not None and second.shape != first.shape:
        raise InputError(
            f"prompt_embeds_2 has shape {list(second.shape)} and prompt_embeds {list(first.shape)};"
            " expected the same: the large generator's text for the same prompts."
        )
    text, context = given.get("prompt_embeds"), given.get("context_embeds")
    if text is not None and context is not None and len(text) != len(context):
        raise InputError(
            f"prompt_embeds are for {len(text)} prompts and context_embeds for {len(context)};"
            " expected as many."
        )


def check_prompts(
    prompt: Any, negative: Any, given: dict[str, Tensor | None], max_sequence_length: Any
) -> int:
    """How many prompts a call has, as text or as embeddings.

    Raises:
        InputError: neither or both, negatives that are not for them, or embeddings of other counts
            or lengths.
    """
    whole("max_sequence_length", max_sequence_length, 1, MAX_SEQUENCE_LENGTH)
    embeds, negative_embeds = given["prompt_embeds"], given["negative_prompt_embeds"]
    if (prompt is None) == (embeds is None):
        raise InputError("pass either prompt or prompt_embeds, and not both.")
    if negative and negative_embeds is not None:
        raise InputError("pass either negative_prompt or negative_prompt_embeds, and not both.")
    check_embeddings(given)
    if embeds is not None:
        if negative:
            raise InputError(
                "negative_prompt goes with prompt; pass negative_prompt_embeds beside"
                " prompt_embeds."
            )
        return len(embeds)
    count = len(prompt_lists(prompt, negative)[0])
    for name in ("negative_prompt_embeds", "context_embeds", "prompt_embeds_2"):
        if (value := given.get(name)) is not None and len(value) != count:
            raise InputError(
                f"{name} are for {len(value)} prompts of {count}; expected one for each."
            )
    if negative_embeds is not None and negative_embeds.shape[1] != max_sequence_length:
        raise InputError(
            f"negative_prompt_embeds have {negative_embeds.shape[1]} tokens; expected"
            f" {max_sequence_length}, as the prompt's."
        )
    return count


def check_seed(name: str, seed: Any) -> int:
    """A seed as torch takes it, 0 to 2^64 - 1; -1 asks for a fresh one, which is drawn here.

    Raises:
        InputError: no whole number, or outside.
    """
    seed = whole(name, seed, -1, 2**64 - 1)
    return int.from_bytes(os.urandom(7), "little") if seed == -1 else seed


def check_callback(callback: Any, tensors: Any) -> None:
    """Raise unless the callback can be called and is promised tensors that there are."""
    if callback is not None and not isinstance(callback, Callable):  # type: ignore[arg-type]
        raise InputError(f"callback_on_step_end is {cut(repr(callback), 80)}; expected a function.")
    if isinstance(tensors, str) or not isinstance(tensors, Sequence):
        raise InputError(
            f"callback_on_step_end_tensor_inputs is {cut(repr(tensors), 80)}; expected a list of"
            " names."
        )
    for name in tensors:
        choose("callback tensor", name, CALLBACK_TENSORS)


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Raise unless given latents are finite noise of the call's size."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        shown = str(latents.dtype) if isinstance(latents, Tensor) else cut(repr(latents), 80)
        raise InputError(f"latents are {shown}; expected a floating-point tensor [B, C, T, H, W].")
    if tuple(latents.shape) != shape:
        raise InputError(
            f"latents have shape {tuple(latents.shape)}; expected {list(shape)}, as the size and"
            " frames ask."
        )
    if not bool(latents.isfinite().all()):
        raise InputError("latents hold NaN or infinity; draw the noise again.")
