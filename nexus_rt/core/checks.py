"""Checks of one value each, which a caller names: an error says what was wrong, what was expected,
and what to do. The bounds of a setting are in `nexus_rt.core.limits`."""

from __future__ import annotations

import math
import os
from typing import Any, TypeVar

from nexus_rt.core.errors import InputError, is_text, shorten, shown
from nexus_rt.core.limits import MAX_SEED

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
