"""Checks of a call's arguments: each says what was wrong, what was expected, and what to do."""

from __future__ import annotations

import math
import os
from typing import Any, TypeVar

from nexus_rt.core.errors import InputError, is_text, shorten, shown
from nexus_rt.core.limits import MAX_PROMPT, MAX_SEED

T = TypeVar("T")


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
        raise InputError(
            f"{name} is {shown(value)}; expected a whole number{such}.",
            code="invalid_type",
            param=name,
        )
    if not low <= number <= high:
        bound = f"at least {low}" if number < low else f"at most {high}"
        raise InputError(
            f"{name} is {shorten(number, 80)}; expected a whole number of {bound}.",
            code="out_of_range",
            param=name,
        )
    return int(number)


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float within low..high.

    Raises:
        InputError: of another type, not finite, or outside.
    """
    if isinstance(value, bool) or (
        not isinstance(value, (int, float)) and not hasattr(value, "__float__")
    ):
        raise InputError(
            f"{name} is {shown(value)}; expected a number.", code="invalid_type", param=name
        )
    try:
        result = float(value)
    except Exception:  # whatever an object's __float__ raises
        result = math.nan
    if not low <= result <= high:
        raise InputError(
            f"{name} is {shown(value)}; expected a number from {low:g} to {high:g}.",
            code="out_of_range",
            param=name,
        )
    return result


def switch(name: str, value: Any) -> bool:
    """`value`, which is True or False.

    Raises:
        InputError: of another type.
    """
    if not isinstance(value, bool):
        raise InputError(
            f"{name} is {shown(value)}; expected True or False.", code="invalid_type", param=name
        )
    return value


def optional_text(name: str, value: Any) -> str | None:
    """`value`, which is text or None.

    Raises:
        InputError: of another type.
    """
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"{name} is {shown(value)}; expected text.", code="invalid_type", param=name
        )
    return value


def instance(name: str, value: Any, kind: type[T], expected: str) -> T:
    """`value`, which is of a class.

    Raises:
        InputError: of another; `expected` is what it should be, in words.
    """
    if not isinstance(value, kind):
        raise InputError(
            f"{name} is {shown(value)}; expected {expected}.", code="invalid_type", param=name
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


def check_unicode(name: str, text: str, param: str | None = None) -> None:
    """Raise an `InputError` unless no model, file or reply can choke on a text's code points."""
    if not is_text(text):
        raise InputError(
            f"{name} is {shown(text)}, which holds half a surrogate pair and is no text; expected"
            " Unicode: decode it as what it was encoded in.",
            param=param or name,
        )


def check_seed(name: str, seed: Any) -> int:
    """A seed as torch takes it, 0 to 2^64 - 1; -1 asks for a fresh one, which is drawn here.

    Raises:
        InputError: no whole number, or outside.
    """
    seed = whole(name, seed, -1, MAX_SEED)
    return int.from_bytes(os.urandom(7), "little") if seed == -1 else seed
