"""Where a call's time goes: named spans that cost nothing unless somebody records them.

    with record() as trace:
        pipe("a panda")
    trace.totals()               # {"text": 12.1, "small": 80.4, ...} milliseconds
    trace.save("trace.json")     # Chrome's trace format, which Perfetto reads

On a GPU a span is a pair of CUDA events on the current stream, so that recording makes nothing
wait.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nexus_rt.core.errors import InputError
from nexus_rt.core.paths import as_path, failed_file

_recording: Trace | None = None


class Trace:
    """Spans as they end: (name, start ms, stop ms, details), from the moment of `record`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = self._now()
        self._raw: list[tuple[str, Any, Any, dict[str, Any]]] = []

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _since(self, moment: Any) -> float:
        return (
            self.began.elapsed_time(moment)
            if self.device.type == "cuda"
            else 1000 * (moment - self.began)
        )

    @property
    def spans(self) -> list[tuple[str, float, float, dict[str, Any]]]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [
            (name, self._since(a), self._since(b), attributes)
            for name, a, b, attributes in self._raw
        ]

    def totals(self) -> dict[str, float]:
        """Milliseconds by name, in the order they first ended. A span inside another counts for
        both."""
        milliseconds: dict[str, float] = {}
        for name, start, stop, _ in self.spans:
            milliseconds[name] = milliseconds.get(name, 0.0) + stop - start
        return milliseconds

    def steps(self) -> dict[int, tuple[float, float]]:
        """Each denoising step's start and stop, ms, in order: of its first and its last span."""
        ends: dict[int, tuple[float, float]] = {}
        for _, start, stop, attributes in self.spans:
            if "step" in attributes:
                first, last = ends.get(attributes["step"], (start, stop))
                ends[attributes["step"]] = (min(first, start), max(last, stop))
        return dict(sorted(ends.items()))

    def save(self, path: str | Path) -> Path:
        """Write Chrome's trace format: complete events, microseconds; one row for the device.

        Raises:
            InputError: it cannot be written.
        """
        events = [
            {
                "name": name,
                "ph": "X",
                "ts": 1000 * start,
                "dur": 1000 * (stop - start),
                "pid": os.getpid(),
                "tid": 0,
                "args": attributes,
            }
            for name, start, stop, attributes in sorted(self.spans, key=lambda s: s[1])
        ]
        path = as_path("path", path)
        try:
            path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        except OSError as error:
            raise InputError(
                failed_file(str(path), error), code="not_writable", param="path"
            ) from error
        return path


@contextlib.contextmanager
def record(device: str | torch.device = "cpu") -> Iterator[Trace]:
    """Record the spans of this process until the block ends; recordings do not nest."""
    global _recording
    before, _recording = _recording, Trace(torch.device(device))
    try:
        yield _recording
    finally:
        _recording = before


class _Span:
    __slots__ = ("attributes", "name", "start", "trace")

    def __init__(self, name: str, attributes: dict[str, Any], trace: Trace) -> None:
        self.name, self.attributes, self.trace = name, attributes, trace

    def __enter__(self) -> None:
        self.start = self.trace._now()

    def __exit__(self, *failure: object) -> None:
        self.trace._raw.append((self.name, self.start, self.trace._now(), self.attributes))


_NOTHING = contextlib.nullcontext()


def span(name: str, **attributes: Any) -> contextlib.AbstractContextManager[None]:
    """A stretch of a call; recorded where somebody records."""
    return _NOTHING if _recording is None else _Span(name, attributes, _recording)
