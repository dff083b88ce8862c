"""The exceptions this package raises on purpose: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

MAX_MESSAGE_CHARS = 1500  # characters of a message
SURROGATE = re.compile("[\ud800-\udfff]")


# What programs branch on: stable, whatever the words of a message become.
CODES = {
    "cancelled": "the caller stopped the work",
    "conflict": "two arguments, options or fields exclude each other",
    "damaged": "a file is cut short or holds other bytes than it declares",
    "decode_failed": "decoding failed after denoising",
    "duplicate": "a name or value that must be unique comes twice",
    "failed": "an error without a code of its own",
    "in_use": "another process or thread holds what is needed",
    "invalid_model": "a model folder, checkpoint or pair cannot be used",
    "invalid_type": "a value of another type than expected",
    "invalid_value": "a value of the right type that is not accepted",
    "mismatch": "shapes, counts, widths or identities that must agree do not",
    "missing": "an argument, part or tensor that is needed is absent",
    "missing_package": "an optional package is not installed, or has another version",
    "not_finite": "a value is NaN or infinite",
    "not_found": "a file, folder or device does not exist",
    "not_writable": "a file or folder cannot be written",
    "out_of_memory": "a budget or a memory does not hold what is needed",
    "out_of_range": "a number outside its range",
    "parity": "an engine's outputs differ from the model's",
    "rewrite_failed": "a rewriter gave no answer",
    "timeout": "an answer did not come in time",
    "too_large": "a text, file, list or size above its limit",
    "unknown_argument": "an argument that a call does not have",
    "unknown_attribute": "an attribute that an object does not have, or that cannot be set",
    "unknown_name": "a name that is none of the accepted ones",
    "unreachable": "another machine or process does not answer, or refuses",
    "unreadable": "a file or text that cannot be read or parsed",
    "unsafe": "a file that asks for code to be run, or for a place outside its folder",
    "unsupported": "a valid request that this model, device, file format or build cannot serve",
}


class NexusError(Exception):
    """Base of every error raised on purpose.

    Its message is shortened where it quotes more of a hostile file than a person reads, and can be
    encoded: half a surrogate pair is spelt out.

    Attributes:
        code: one of `CODES`, for programs; the message is for people and may change.
        param: the argument, option or field at fault, where there is one.
    """

    code = "failed"
    param: str | None = None

    def __init__(
        self, *arguments: object, code: str | None = None, param: str | None = None
    ) -> None:
        limit = MAX_MESSAGE_CHARS
        super().__init__(
            *(
                readable(a[:limit] + " ..." if len(a) > limit else a) if isinstance(a, str) else a
                for a in arguments
            )
        )
        if code is not None:
            self.code = code
        if param is not None:
            self.param = param


class InputError(NexusError, ValueError):
    """An argument is outside what the call accepts."""

    code = "invalid_value"


class UnknownAttribute(InputError, AttributeError):
    """An attribute that an object of ours does not have, or that cannot be set."""

    code = "unknown_attribute"


class UnknownArgument(InputError, TypeError):
    """An argument that a call does not have."""

    code = "unknown_argument"


class ModelError(NexusError):
    """A model folder, checkpoint or pair of models cannot be used."""

    code = "invalid_model"


class NumericsError(NexusError, ArithmeticError):
    """A generator produced a value that is not finite."""

    code = "not_finite"


class RewriteError(NexusError):
    """A rewriter gave no answer."""

    code = "rewrite_failed"


class Cancelled(NexusError):
    """The caller asked the denoising loop to stop."""

    code = "cancelled"


class DecodeError(NexusError):
    """Decoding failed after denoising; `latents_path` names the saved latents."""

    code = "decode_failed"

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


def shorten(text: object, limit: int = 300) -> str:
    """Somebody else's words on one line, at most `limit` characters: what an error quotes."""
    line = " ".join(_words(text, str).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def shown(value: object, limit: int = 80) -> str:
    """A value's `repr` as an error quotes it, whatever the value."""
    return shorten(_words(value, repr), limit)


def _words(value: object, form: Callable[[object], str]) -> str:
    """`form(value)`; a whole number too long to be written, or an object that cannot write itself,
    is described."""
    try:
        return form(value)
    except Exception:  # whatever another's __repr__ raises, and Python's limit of digits
        if isinstance(value, int):
            return f"a whole number of {value.bit_length()} bits"
        return f"a {type(value).__name__} that cannot be shown"


def choose(kind: str, name: str, known: Iterable[str], param: str | None = None) -> str:
    """Return `name` if it is one of `known`, else raise an `InputError` that suggests the
    nearest. param: the argument at fault, where `kind` is not its name."""
    known = list(known)
    if isinstance(name, str) and name in known:
        return name
    near = difflib.get_close_matches(shorten(name, 80), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise InputError(
        f"unknown {kind} {shown(name, 120)}: expected one of {', '.join(known)}{hint}",
        code="unknown_name",
        param=param or kind,
    )
