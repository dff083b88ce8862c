"""The exceptions this package raises on purpose: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

MOST = 1500  # characters of a message


class NexusError(Exception):
    """Base of every error raised on purpose. Its message is cut where it quotes more of a hostile
    file than a person reads."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(
            *(a[:MOST] + " ..." if isinstance(a, str) and len(a) > MOST else a for a in arguments)
        )


class InputError(NexusError, ValueError):
    """An argument is outside what the call accepts."""


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


def cut(text: object, limit: int = 300) -> str:
    """Somebody else's words on one line, at most `limit` characters: what an error quotes."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`, else raise an `InputError` that suggests the
    nearest."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(str(name)[:80], known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise InputError(
        f"unknown {kind} {cut(repr(name), 120)}: expected one of {', '.join(known)}{hint}"
    )
