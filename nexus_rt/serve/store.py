"""The job store: SQLite in WAL mode, one file beside the clips, so that a killed server loses
nothing that it had accepted.

A job is `queued`, `in_progress`, `completed` or `failed`, as OpenAI's `Video` has it. Whoever runs
a job holds an attempt's number: only the attempt that is current may end it, so that a job ends
once.

Which waiting job is next: the highest priority; among these, API keys in turn by start-time fair
queueing (Goyal, Vin, Cheng, SIGCOMM 1996): each key's jobs have a virtual start and finish `F = S +
cost`, `S = max(V, F of the key's last)`, V being the start of the one that runs, and the least
start goes first; within a key, in order of arrival. While two keys wait, the work done for them
then differs by at most a job of each.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nexus_rt.core.errors import InputError, NexusError, shorten
from nexus_rt.serve.schema import open_tables

STATES = ("queued", "in_progress", "completed", "failed")
JOB_ID = r"video_[0-9a-f]{32}"
MIN_FREE = 2**20  # bytes; a disk with less counts as full
PROBE = ".probe"
COLUMNS = (
    "seq, id, owner, status, priority, created_at, deadline_at, started_at, completed_at,"
    " expires_at, attempts, losses, remixed_from, request, error_code, error_message, bytes"
)


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


class QueueFull(Exception):
    """As many jobs of a key wait as may."""


class NoRoom(Exception):
    """The results would take more than the quota."""


class Store:
    """The jobs of one server; its methods may be called from any thread.

    Raises:
        InputError: the folder cannot be made or written, or another server works on it.
        NexusError: the file is no job store, is damaged, or is of a later version.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        self.folder, self.path = folder, folder / "jobs.sqlite"
        self.videos = folder / "videos"
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            self.videos.mkdir(exist_ok=True)
            self._held = open(folder / "server.lock", "w")  # noqa: SIM115 (held while we live)
        except OSError as error:
            raise _not_writable(folder, error) from error
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._held.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise _not_writable(folder, error) from error
            raise InputError(
                f"another server works on {folder}; stop it, or give this one a --store of its"
                " own.",
                code="in_use",
                param="store",
            ) from None
        self._order = threading.RLock()
        self._virtual = 0.0
        try:
            self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            try:
                open_tables(self._db, self.path)
            except BaseException:
                self._db.close()
                raise
        except sqlite3.OperationalError as error:
            self._held.close()
            raise _not_writable(folder, error) from error
        except sqlite3.DatabaseError as error:
            self._held.close()
            raise NexusError(
                f"{self.path} cannot be read as a job store ({error}); move it away, and the"
                " server begins with an empty one.",
                code="unreadable",
                param="store",
            ) from error
        except BaseException:
            self._held.close()
            raise
        at = os.stat(self.path)
        self._file = at.st_dev, at.st_ino

    def trouble(self) -> str | None:
        """Why jobs cannot be kept on the disk as it is now; None where they can."""
        probe = self.videos / PROBE
        try:
            at = os.stat(self.path)
            if (at.st_dev, at.st_ino) != self._file:
                return "the job store was moved away or replaced"
            with self._order, open(probe, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, MIN_FREE)
            with self._write():
                pass
        except FileNotFoundError:
            return "the job store is gone"
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return "the job store's disk is full"
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                return "the job store is read-only"
            return f"the job store cannot be written ({error.strerror})"
        except sqlite3.Error as error:
            return f"the job store cannot be written ({shorten(error)})"
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
        return None

    def close(self) -> None:
        with self._order:
            self._db.close()
            self._held.close()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._order:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, *values: Any) -> list[tuple]:
        with self._order:
            return self._db.execute(sql, values).fetchall()

    def _jobs(self, where: str, *values: Any) -> list[Job]:
        return [_job(row) for row in self._rows(f"SELECT {COLUMNS} FROM jobs {where}", *values)]

    def add(self, new: NewJob, max_queue: int, quota: int, share: int | None = None) -> Job:
        """Put a job at the end of its key's queue.

        Args:
            max_queue: of the key's jobs that wait. quota: bytes of all results, and of what waits.
            share: bytes of the key's; None is the quota.

        Raises:
            QueueFull, NoRoom: it is not taken.
        """
        with self._write() as db:
            waiting, room, own = db.execute(
                "SELECT COALESCE(SUM(owner = ?), 0), COALESCE(SUM(room), 0),"
                " COALESCE(SUM(room * (owner = ?)), 0) FROM jobs WHERE status = 'queued'",
                (new.owner, new.owner),
            ).fetchone()
            if waiting >= max_queue:
                raise QueueFull
            if self.used() + room + new.room > quota:
                raise NoRoom
            if share is not None and self.used(new.owner) + own + new.room > share:
                raise NoRoom
            db.execute(
                "INSERT INTO jobs (id, owner, status, priority, cost, room, created_at,"
                " deadline_at, batch_key, remixed_from, request)"
                " VALUES (?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    new.id,
                    new.owner,
                    new.priority,
                    max(new.cost, 1e-6),
                    new.room,
                    new.created_at,
                    new.deadline_at,
                    new.batch_key,
                    new.remixed_from,
                    json.dumps(new.request, ensure_ascii=False),
                ),
            )
        return self._jobs("WHERE id = ?", new.id)[0]

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """A job; of `owner` alone, unless that is None."""
        own = "" if owner is None else " AND owner = ?"
        jobs = self._jobs(f"WHERE id = ?{own}", job_id, *(() if owner is None else (owner,)))
        return jobs[0] if jobs else None

    def page(self, owner: str, after: Job | None, limit: int, newest_first: bool) -> list[Job]:
        """At most `limit` jobs of a key that come after one, in order of creation."""
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        where = "WHERE owner = ?" + (f" AND seq {sign} ?" if after else "")
        values = (owner, after.seq) if after else (owner,)
        return self._jobs(f"{where} ORDER BY seq {order} LIMIT ?", *values, limit)

    def claim(self, now: float, batch: int = 1) -> list[Job]:
        """Take the next waiting job, and up to `batch - 1` more that can be denoised with it: they
        are in progress, each with a new attempt. [] where none waits."""
        with self._write() as db:
            top = db.execute(
                "SELECT MAX(priority) FROM jobs WHERE status = 'queued' AND deadline_at > ?", (now,)
            ).fetchone()[0]
            if top is None:
                return []
            heads = db.execute(
                "SELECT MIN(j.seq), j.owner, COALESCE(o.finish, 0) FROM jobs j LEFT JOIN owners o"
                " ON o.owner = j.owner WHERE j.status = 'queued' AND j.priority = ?"
                " AND j.deadline_at > ? GROUP BY j.owner",
                (top, now),
            ).fetchall()
            starts = [(max(self._virtual, f), seq, owner) for seq, owner, f in heads]
            self._virtual, seq, owner = min(starts)
            cost, key = db.execute(
                "SELECT cost, batch_key FROM jobs WHERE seq = ?", (seq,)
            ).fetchone()
            taken = [(seq, owner, cost)]
            if batch > 1 and key:
                taken += db.execute(
                    "SELECT seq, owner, cost FROM jobs WHERE status = 'queued' AND batch_key = ?"
                    " AND seq != ? AND deadline_at > ? ORDER BY priority DESC, seq LIMIT ?",
                    (key, seq, now, batch - 1),
                ).fetchall()
            for one, whose, price in taken:
                self._charge(db, whose, price)
                db.execute(
                    "UPDATE jobs SET status = 'in_progress', started_at = ?,"
                    " attempts = attempts + 1 WHERE seq = ?",
                    (now, one),
                )
        marks = ",".join("?" * len(taken))
        return self._jobs(f"WHERE seq IN ({marks}) ORDER BY seq", *(row[0] for row in taken))

    def _charge(self, db: sqlite3.Connection, owner: str, cost: float) -> None:
        row = db.execute("SELECT finish FROM owners WHERE owner = ?", (owner,)).fetchone()
        finish = max(self._virtual, row[0] if row else 0.0) + cost
        db.execute(
            "INSERT INTO owners VALUES (?, ?) ON CONFLICT (owner) DO UPDATE SET finish = ?",
            (owner, finish, finish),
        )

    def complete(
        self, job: Job, now: float, expires_at: float, size: int, perf: dict[str, Any]
    ) -> bool:
        """End a job's current attempt with a result; False where it is not current any more."""
        return self._change(
            "status = 'completed', completed_at = ?, expires_at = ?, bytes = ?, perf = ?",
            "id = ? AND status = 'in_progress' AND attempts = ?",
            *(now, expires_at, size, json.dumps(perf)),
            *(job.id, job.attempts),
        )

    def fail(
        self, job_id: str, now: float, expires_at: float, code: str, message: str, attempt: int = 0
    ) -> bool:
        """End a job that has not ended, or only its attempt, without a result; False where it had
        ended, or is gone."""
        only = " AND attempts = ?" if attempt else ""
        return self._change(
            "status = 'failed', completed_at = ?, expires_at = ?, error_code = ?,"
            " error_message = ?",
            "id = ? AND status IN ('queued', 'in_progress')" + only,
            *(now, expires_at, code, message, job_id),
            *((attempt,) if attempt else ()),
        )

    def _change(self, change: str, where: str, *values: Any) -> bool:
        with self._write() as db:
            return db.execute(f"UPDATE jobs SET {change} WHERE {where}", values).rowcount > 0

    def requeue(self, job: Job, lost: bool) -> bool:
        """Put a running attempt back where it was in the queue; lost: its process went down."""
        return self._change(
            "status = 'queued', started_at = NULL, losses = losses + ?",
            "id = ? AND status = 'in_progress' AND attempts = ?",
            *(int(lost), job.id, job.attempts),
        )

    def recover(self) -> list[Job]:
        """After a restart: what a killed server had in progress waits again."""
        with self._write() as db:
            held = db.execute("SELECT id FROM jobs WHERE status = 'in_progress'").fetchall()
            db.execute(
                "UPDATE jobs SET status = 'queued', started_at = NULL, losses = losses + 1"
                " WHERE status = 'in_progress'"
            )
        return [job for (job_id,) in held if (job := self.get(job_id)) is not None]

    def delete(self, job_id: str) -> bool:
        """Forget a job in any state."""
        with self._write() as db:
            return db.execute("DELETE FROM jobs WHERE id = ?", (job_id,)).rowcount > 0

    def overdue(self, now: float) -> list[Job]:
        """Jobs that have not ended by their deadline."""
        return self._jobs("WHERE status IN ('queued', 'in_progress') AND deadline_at <= ?", now)

    def expired(self, now: float) -> list[Job]:
        """Ended jobs whose time is over."""
        return self._jobs(
            "WHERE status IN ('completed', 'failed') AND expires_at <= ? LIMIT 1000", now
        )

    def ids(self) -> set[str]:
        """All jobs' ids."""
        return {row[0] for row in self._rows("SELECT id FROM jobs")}

    def perf(self, job_id: str) -> dict[str, Any] | None:
        """What a completed job's time went into."""
        rows = self._rows("SELECT perf FROM jobs WHERE id = ?", job_id)
        return json.loads(rows[0][0]) if rows and rows[0][0] else None

    def used(self, owner: str | None = None) -> int:
        """Bytes of all results, or of a key's."""
        own = "" if owner is None else " AND owner = ?"
        values = () if owner is None else (owner,)
        sql = "SELECT COALESCE(SUM(bytes), 0) FROM jobs WHERE bytes > 0"
        return self._rows(sql + own, *values)[0][0]

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        rows = dict(self._rows("SELECT status, COUNT(*) FROM jobs GROUP BY status"))
        return {state: rows.get(state, 0) for state in STATES}

    def ahead(self, job: Job) -> int:
        """Waiting jobs of at least its priority that came before a waiting job."""
        return self._rows(
            "SELECT COUNT(*) FROM jobs WHERE status = 'queued' AND (priority > ? OR"
            " (priority = ? AND seq < ?))",
            *(job.priority, job.priority, job.seq),
        )[0][0]

    def waiting_cost(self, owner: str) -> float:
        """The predicted work of what a key has waiting."""
        sql = "SELECT COALESCE(SUM(cost), 0) FROM jobs WHERE status = 'queued' AND owner = ?"
        return self._rows(sql, owner)[0][0]

    def next_expiry(self, owner: str | None = None) -> float | None:
        """When the next result, or a key's, makes room."""
        own = "" if owner is None else " AND owner = ?"
        values = () if owner is None else (owner,)
        sql = "SELECT MIN(expires_at) FROM jobs WHERE status = 'completed'"
        return self._rows(sql + own, *values)[0][0]

    def note(self, name: str, value: Any) -> None:
        """Keep a value over restarts."""
        with self._write() as db:
            db.execute(
                "INSERT INTO prices VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = ?",
                (name, json.dumps(value), json.dumps(value)),
            )

    def noted(self, name: str) -> Any:
        """A value that `note` kept, or None."""
        rows = self._rows("SELECT value FROM prices WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None


def _not_writable(folder: Path, error: Exception) -> InputError:
    """A store that is whole as far as is known, and cannot be written where it is."""
    why = getattr(error, "strerror", None) or shorten(error)
    with contextlib.suppress(OSError):
        if "full" not in why and shutil.disk_usage(folder).free < MIN_FREE:
            why = f"{why}; its disk is full"
    return InputError(
        f"the job store {folder} cannot be made or written ({why}); free space there, make it"
        " writable, or choose another --store. What is in it is left as it is.",
        code="not_writable",
        param="store",
    )


def _job(row: tuple) -> Job:
    values = list(row)
    values[13] = json.loads(values[13])
    return Job(*values)
