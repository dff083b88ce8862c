"""Errors as rows say them. Imports nothing but the standard library."""

from __future__ import annotations


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0][:most]


def failure(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {first_line(error)}"
