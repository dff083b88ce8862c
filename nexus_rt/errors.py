"""The exceptions this package raises on purpose: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

MOST = 1500  # characters of a message
SURROGATE = re.compile("[\ud800-\udfff]")


class NexusError(Exception):
    """Base of every error raised on purpose. Its message is cut where it quotes more of a hostile
    file than a person reads, and can be encoded: half a surrogate pair is spelt out."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(
            *(
                readable(a[:MOST] + " ..." if len(a) > MOST else a) if isinstance(a, str) else a
                for a in arguments
            )
        )


class InputError(NexusError, ValueError):
    """An argument is outside what the call accepts."""


class UnknownAttribute(InputError, AttributeError):
    """An attribute that an object of ours does not have, or that cannot be set."""


class UnknownArgument(InputError, TypeError):
    """An argument that a call does not have."""


class ModelError(NexusError):
    """A model folder, checkpoint or pair of models cannot be used."""


class NumericsError(NexusError, ArithmeticError):
    """A generator produced a value that is not finite."""


class RewriteError(NexusError):
    """A rewriter gave no answer."""


class Cancelled(NexusError):
    """The caller asked the denoising loop to stop."""


class DecodeError(NexusError):
    """Decoding failed after denoising; `latents_path` names the saved latents."""

    def __init__(self, message: str, latents_path: Path | None) -> None:
        super().__init__(message)
        self.latents_path = latents_path


def is_text(value: str) -> bool:
    """Whether a string is Unicode text: without halves of surrogate pairs, which JSON's escapes and
    arguments in another encoding bring, and which no file, log or reply can hold."""
    return value.isascii() or SURROGATE.search(value) is None


def readable(text: str) -> str:
    """Text that every stream can encode: half a surrogate pair becomes its escape."""
    return text if is_text(text) else text.encode("utf-8", "backslashreplace").decode()


def cut(text: object, limit: int = 300) -> str:
    """Somebody else's words on one line, at most `limit` characters: what an error quotes."""
    line = " ".join(_words(text, str).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def shown(value: object, limit: int = 80) -> str:
    """A value's `repr` as an error quotes it, whatever the value."""
    return cut(_words(value, repr), limit)


def _words(value: object, form: Callable[[object], str]) -> str:
    """`form(value)`; a whole number too long to be written, or an object that cannot write itself,
    is described."""
    try:
        return form(value)
    except Exception:  # whatever another's __repr__ raises, and Python's limit of digits
        if isinstance(value, int):
            return f"a whole number of {value.bit_length()} bits"
        return f"a {type(value).__name__} that cannot be shown"


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`, else raise an `InputError` that suggests the
    nearest."""
    known = list(known)
    if isinstance(name, str) and name in known:
        return name
    near = difflib.get_close_matches(cut(name, 80), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise InputError(f"unknown {kind} {shown(name, 120)}: expected one of {', '.join(known)}{hint}")
