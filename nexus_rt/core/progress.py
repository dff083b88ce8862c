"""Progress bars for programs that may have no console."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
from typing import Any, TextIO

from tqdm import tqdm

from nexus_rt.core.errors import InputError, shorten


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


class _Trial(tqdm):
    """A bar that nobody sees, with a lock of its own: a bar whose display raises keeps tqdm's, and
    every bar of another thread would wait for it."""

    monitor_interval = 0  # no thread


def check_options(options: dict[str, Any]) -> None:
    """Raise unless tqdm makes a bar of these options.

    Raises:
        InputError: tqdm has no such option, or does not take the value.
    """
    _Trial.set_lock(threading.RLock())
    try:
        _Trial(total=1, **{**options, "disable": False, "file": io.StringIO()}).close()
    except Exception as error:  # tqdm's own, and what it makes of values of other types
        raise InputError(
            f"the progress bar cannot be made ({shorten(error, 200)}); expected tqdm's options."
        ) from error
