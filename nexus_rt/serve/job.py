"""A job: as it is put into the queue, and as a row of the job store."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

STATES = ("queued", "in_progress", "completed", "failed")
JOB_ID = r"video_[0-9a-f]{32}"


@dataclass(frozen=True)
class Job:
    """A row of the store; times are Unix seconds.

    attempts: how often it was begun. losses: how often its process was lost. request: what
        `nexus_rt.serve.requests.ClipRequest` is made of.
    """

    seq: int
    id: str
    owner: str
    status: str
    priority: int
    created_at: float
    deadline_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float | None
    attempts: int
    losses: int
    remixed_from: str | None
    request: dict[str, Any]
    error_code: str | None
    error_message: str | None
    bytes: int

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")


@dataclass(frozen=True)
class NewJob:
    """What is put into the queue.

    cost: predicted work, in any one unit. room: predicted bytes of the result. batch_key: jobs of
        the same may be denoised together.
    """

    owner: str
    request: dict[str, Any]
    created_at: float
    deadline_at: float
    batch_key: str = ""
    priority: int = 0
    cost: float = 1.0
    room: int = 0
    remixed_from: str | None = None
    id: str = field(default_factory=lambda: f"video_{uuid.uuid4().hex}")
