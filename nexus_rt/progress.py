"""Progress bars for programs that may have no console."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO

from tqdm import tqdm


class Lenient:
    """A stream whose reader may go away while a bar is drawn: what cannot be written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """As a text stream's."""
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # a broken pipe, a full disk, a closed stream, an encoding
            return len(text)

    def flush(self) -> None:
        """As a text stream's."""
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def progress_bar(**options: Any) -> tqdm:
    """tqdm on standard error; none where there is no standard error (`pythonw`, services)."""
    stream = options.pop("file", None) or sys.stderr
    if stream is None or getattr(stream, "closed", False):
        return tqdm(**{**options, "disable": True})
    return tqdm(file=Lenient(stream), **options)
