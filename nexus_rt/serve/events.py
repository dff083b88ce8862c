"""What watchers of a job are sent: its state as it is now, then what changes.

Only the newest of each kind waits for a slow reader, so that a watcher costs the same however long
it does not read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

HEARTBEAT = 15.0  # seconds after which a silent stream says that it is there
ENDS = ("completed", "failed", "deleted", "closed")
CLOSED = {"reason": "the server stops"}


class Watcher:
    """One stream: the newest event of each kind that was not sent yet, in order of arrival."""

    def __init__(self) -> None:
        self.waiting: dict[str, dict[str, Any]] = {}
        self.there = asyncio.Event()

    def put(self, kind: str, event: dict[str, Any]) -> None:
        self.waiting.pop(kind, None)
        self.waiting[kind] = event
        self.there.set()

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        events, self.waiting = list(self.waiting.items()), {}
        self.there.clear()
        return events


class EventBroker:
    """The watchers of all jobs, and what a late one is told first."""

    def __init__(self) -> None:
        self.watchers: dict[str, set[Watcher]] = {}
        self.latest: dict[str, dict[str, dict[str, Any]]] = {}
        self.closed = False

    @property
    def count(self) -> int:
        """Open streams."""
        return sum(map(len, self.watchers.values()))

    def publish(self, job_id: str, kind: str, event: dict[str, Any]) -> None:
        """Tell a job's watchers; an ending is the last that they hear."""
        if kind in ENDS:
            self.latest.pop(job_id, None)
        else:
            self.latest.setdefault(job_id, {})[kind] = event
        for watcher in self.watchers.get(job_id, ()):
            watcher.put(kind, event)

    def forget(self, job_id: str) -> None:
        """Nothing is known of a job's steps any more: it begins again."""
        self.latest.pop(job_id, None)

    def close(self) -> None:
        """End every stream; the jobs go on."""
        self.closed = True
        for watchers in self.watchers.values():
            for watcher in watchers:
                watcher.put("closed", CLOSED)

    async def watch(
        self, job_id: str, first: tuple[str, dict[str, Any]]
    ) -> AsyncIterator[tuple[str, dict[str, Any]] | None]:
        """`first`, what is known of the running job, then events until one ends the stream; None
        now and then while nothing happens."""
        watcher = Watcher()
        self.watchers.setdefault(job_id, set()).add(watcher)
        try:
            watcher.put(*first)
            for kind, event in self.latest.get(job_id, {}).items():
                watcher.put(kind, event)
            while True:
                try:
                    await asyncio.wait_for(watcher.there.wait(), HEARTBEAT)
                except asyncio.TimeoutError:
                    yield None
                    continue
                for kind, event in watcher.take():
                    yield kind, event
                    if kind in ENDS:
                        return
                if self.closed:
                    yield "closed", CLOSED
                    return
        finally:
            watchers = self.watchers.get(job_id, set())
            watchers.discard(watcher)
            if not watchers:
                self.watchers.pop(job_id, None)


def sse(message: tuple[str, dict[str, Any]] | None) -> bytes:
    """A message of an event stream (WHATWG HTML, server-sent events); None is a comment."""
    if message is None:
        return b": still here\n\n"
    kind, event = message
    return f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
