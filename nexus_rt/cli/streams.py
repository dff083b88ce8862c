"""Standard streams of a command: they take every text, and replace those that are closed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def console(own: bool) -> Iterator[None]:
    """Standard output and error that never fail a command over what it prints.

    A stream that is not there (`>&-`, `pythonw`, services) is the null device. What a stream's
    encoding lacks, such as a path in another script, is printed as a backslash escape.

    own: the process is the command's own: its closed descriptors are occupied too, which files that
        it writes would get otherwise, with what libraries print to them.
    """
    if own:
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    with contextlib.ExitStack() as after:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                null = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
                setattr(sys, name, null)
                if not own:
                    after.callback(null.close)
                    after.callback(setattr, sys, name, stream)
            elif getattr(stream, "errors", "") in ("strict", "surrogateescape") and hasattr(
                stream, "reconfigure"
            ):
                before = stream.errors
                stream.reconfigure(errors="backslashreplace")
                if not own:
                    after.callback(stream.reconfigure, errors=before)
        yield
