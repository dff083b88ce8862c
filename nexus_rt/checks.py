"""Checks of a call's arguments: each says what was wrong, what was expected, and what to do."""

from __future__ import annotations

import inspect
import math
import os
from typing import Any, TypeVar

import torch
from torch import Tensor

from nexus_rt.errors import InputError, choose, is_text, shorten, shown
from nexus_rt.models.text import MAX_SEQUENCE_LENGTH

MAX_PROMPT = 100_000  # characters
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
T = TypeVar("T")

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
    except Exception:  # whatever an object's __index__ raises
        number = None
    if number is None:
        same = isinstance(value, float) and value.is_integer() and low <= value <= high
        such = f", such as {int(value)}" if same else f" of at least {low}" if low >= 0 else ""
        raise InputError(f"{name} is {shown(value)}; expected a whole number{such}.")
    if not low <= number <= high:
        bound = f"at least {low}" if number < low else f"at most {high}"
        raise InputError(f"{name} is {shorten(number, 80)}; expected a whole number of {bound}.")
    return int(number)


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float within low..high.

    Raises:
        InputError: of another type, not finite, or outside.
    """
    if isinstance(value, bool) or (
        not isinstance(value, (int, float)) and not hasattr(value, "__float__")
    ):
        raise InputError(f"{name} is {shown(value)}; expected a number.")
    try:
        result = float(value)
    except Exception:  # whatever an object's __float__ raises
        result = math.nan
    if not low <= result <= high:
        raise InputError(f"{name} is {shown(value)}; expected a number from {low:g} to {high:g}.")
    return result


def switch(name: str, value: Any) -> bool:
    """`value`, which is True or False.

    Raises:
        InputError: of another type.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}; expected True or False.")
    return value


def optional_text(name: str, value: Any) -> str | None:
    """`value`, which is text or None.

    Raises:
        InputError: of another type.
    """
    if value is not None and not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}; expected text.")
    return value


def instance(name: str, value: Any, kind: type[T], expected: str) -> T:
    """`value`, which is of a class.

    Raises:
        InputError: of another; `expected` is what it should be, in words.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} is {shown(value)}; expected {expected}.")
    return value


def as_device(name: str, value: Any) -> torch.device:
    """A device that tensors can be on here. No memory of a GPU is touched.

    Raises:
        InputError: no device's name, or one that this machine or PyTorch does not have.
    """
    why = "expected a name such as 'cpu', 'cuda' or 'cuda:1'"
    if isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
        try:
            device = torch.device(value)
            why = _no_device(device)
        except Exception as error:  # torch's backends raise nearly everything
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not why:
            return torch.device("cpu") if device.type == "cpu" else device
    raise InputError(
        f"{name} {shown(value, 60)} cannot be used here ({shorten(why, 200)}); `nexus-rt doctor`"
        f" lists"
        " what can."
    )


def _no_device(device: torch.device) -> str:
    """Why tensors cannot be on a device; "" where they can."""
    if device.type == "meta":
        return "its tensors have no values"
    if device.type in ("cpu", "cuda"):
        there = torch.cuda.device_count() if device.type == "cuda" else 1
        if not there:
            return "no CUDA device" if torch.version.cuda else "this PyTorch build has no CUDA"
        return "" if (device.index or 0) < there else f"there are {there} of this kind"
    torch.zeros(1, device=device).cpu()
    return ""


def as_dtype(name: str, value: Any) -> torch.dtype:
    """A dtype that models compute in.

    Raises:
        InputError: no dtype of torch, or none of those.
    """
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        spelt = str(value).removeprefix("torch.") if isinstance(value, str) else ""
        close = spelt if spelt in [str(d).removeprefix("torch.") for d in DTYPES] else "bfloat16"
        raise InputError(
            f"{name} is {shown(value)}; expected a dtype of torch's, such as torch.{close}"
            f" ({', '.join(map(str, DTYPES))})."
        )
    return value


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
        raise InputError(f"{name} holds {shown(odd)}; expected text, or a list of texts.")
    each = [name] if isinstance(value, str) else [f"{name}[{i}]" for i in range(len(texts))]
    if not texts:
        raise InputError(
            f"the {name.removeprefix('negative_')} list is empty; pass at least one prompt."
        )
    for place, text in zip(each, texts, strict=True):
        if len(text) > MAX_PROMPT:
            raise InputError(
                f"the {place} has {len(text)} characters; expected at most {MAX_PROMPT}."
            )
        check_unicode(f"the {place}", text)
    return texts


def check_unicode(name: str, text: str) -> None:
    """Raise an `InputError` unless no model, file or reply can choke on a text's code points."""
    if not is_text(text):
        raise InputError(
            f"{name} is {shown(text)}, which holds half a surrogate pair and is no text; expected"
            " Unicode: decode it as what it was encoded in."
        )


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
                f"generator is {shown(one)}; expected a torch.Generator, such as"
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
            words = (
                f"{list(value.shape)} of {value.dtype}"
                if isinstance(value, Tensor)
                else shown(value)
            )
            raise InputError(
                f"{name} is {words}; expected a tensor of embeddings [batch, tokens, width]."
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
    if negative is not None and not isinstance(negative, (str, list, tuple)):
        raise InputError(
            f"negative_prompt holds {shown(negative)}; expected text, or a list of texts."
        )
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


def callback_tensors(callback: Any, names: Any) -> tuple[str, ...]:
    """Names of the tensors that a callback is called with.

    An object with `tensor_inputs`, as diffusers' `PipelineCallback` and `MultiPipelineCallbacks`
    have them, names its own; `names` other than the default are added to them.

    Raises:
        InputError: it cannot be called, or there are no tensors of such names.
    """
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end is {shown(callback)}; expected a function.")
    wanted = _names("callback_on_step_end_tensor_inputs", names)
    if inspect.getattr_static(callback, "tensor_inputs", None) is None:
        return wanted
    kind = type(callback).__name__
    try:
        own = callback.tensor_inputs
    except Exception as error:  # diffusers' base class has a property that raises
        raise InputError(
            f"the {kind} has no tensor_inputs that can be read ({shorten(error, 120)}); set them"
            f" to a"
            " list of names, such as ['latents']."
        ) from error
    mine = _names(f"{kind}.tensor_inputs", own)
    return mine if wanted == ("latents",) else tuple(dict.fromkeys((*mine, *wanted)))


def _names(argument: str, value: Any) -> tuple[str, ...]:
    """Names of callback tensors, once each."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{argument} is {shown(value)}; expected a list of names.")
    return tuple(dict.fromkeys(choose("callback tensor", n, CALLBACK_TENSORS) for n in value))


def check_latents(latents: Any, shape: tuple[int | None, ...]) -> None:
    """Raise unless latents are finite and of a shape, of which None is any number from 1 up."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        words = str(latents.dtype) if isinstance(latents, Tensor) else shown(latents)
        raise InputError(f"latents are {words}; expected a floating-point tensor [B, C, T, H, W].")
    have = tuple(latents.shape)
    if len(have) != len(shape) or not all(
        n == wanted or (wanted is None and n) for n, wanted in zip(have, shape, strict=True)
    ):
        sides = [c if n is None else n for c, n in zip("BCTHW", shape, strict=True)]
        raise InputError(
            f"latents have shape {have}; expected [{', '.join(map(str, sides))}], as the models,"
            " the size and the frames ask."
        )
    if latents.device.type == "meta" or not bool(latents.isfinite().all()):
        raise InputError("latents hold NaN or infinity, or no values; pass finite ones.")
