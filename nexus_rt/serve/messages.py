"""What a runner and its worker send each other, as (kind, value): a call's events, then its clips
or its failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from nexus_rt.serve.generate import Clip, Event, ServedPipeline, Task
from nexus_rt.serve.problems import JobFailed

Message = tuple[str, Any]


def answer(served: ServedPipeline, tasks: Sequence[Task], emit: Callable[[Event], None]) -> Message:
    """The last message of a call, which is run here."""
    try:
        return "clips", served.run(tasks, emit)
    except JobFailed as error:
        return "failed", (error.code, error.message)


def result(message: Message, emit: Callable[[Event], None]) -> list[Clip] | None:
    """The clips of a call's last message; None, after an event is emitted, where more follow.

    Raises:
        JobFailed: the call's.
    """
    kind, value = message
    if kind == "event":
        emit(value)
    elif kind == "failed":
        raise JobFailed(*value)
    return value if kind == "clips" else None


def call_soon(
    loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any
) -> None:
    """Have a loop call a function, from any thread; nothing where the loop has ended."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)
