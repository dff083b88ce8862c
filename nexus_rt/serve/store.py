"""The store of jobs and their order: SQLite in WAL mode, one file beside the clips, so that a
killed server loses nothing that it had accepted.

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

import json
import sqlite3
from dataclasses import fields
from pathlib import Path
from typing import Any

from nexus_rt.serve.database import Database
from nexus_rt.serve.job import STATES, Job, NewJob

COLUMNS = tuple(field.name for field in fields(Job))
CURRENT = "id = ? AND status = 'in_progress' AND attempts = ?"  # an attempt that may end its job
WAITS_AGAIN = "status = 'queued', started_at = NULL, losses = losses + ?"


class QueueFull(Exception):
    """As many jobs of a key wait as may."""


class NoRoom(Exception):
    """The results would take more than the quota."""


class Store(Database):
    """The jobs of one server.

    Raises:
        InputError, NexusError: the store cannot be opened (`Database`).
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._virtual = 0.0

    def _jobs(self, where: str, *values: Any) -> list[Job]:
        jobs = []
        for row in self.rows(f"SELECT {', '.join(COLUMNS)} FROM jobs {where}", *values):
            known = dict(zip(COLUMNS, row, strict=True))
            jobs.append(Job(**{**known, "request": json.loads(known["request"])}))
        return jobs

    def add(self, new: NewJob, max_queue: int, quota: int, share: int | None = None) -> Job:
        """Put a job at the end of its key's queue.

        Args:
            max_queue: of the key's jobs that wait. quota: bytes of all results, and of what waits.
            share: bytes of the key's; None is the quota.

        Raises:
            QueueFull, NoRoom: it is not taken.
        """
        with self.write() as db:
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
            request = json.dumps(new.request, ensure_ascii=False)
            row = {**vars(new), "cost": max(new.cost, 1e-6), "request": request}
            db.execute(
                f"INSERT INTO jobs (status, {', '.join(row)})"
                f" VALUES ('queued', {_marks(len(row))})",
                tuple(row.values()),
            )
        return self._jobs("WHERE id = ?", new.id)[0]

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """A job; of `owner` alone, unless that is None."""
        own, values = _own(owner)
        jobs = self._jobs(f"WHERE id = ?{own}", job_id, *values)
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
        with self.write() as db:
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
        where = f"WHERE seq IN ({_marks(len(taken))}) ORDER BY seq"
        return self._jobs(where, *(row[0] for row in taken))

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
        return self._changed(
            "UPDATE jobs SET status = 'completed', completed_at = ?, expires_at = ?, bytes = ?,"
            f" perf = ? WHERE {CURRENT}",
            *(now, expires_at, size, json.dumps(perf)),
            *(job.id, job.attempts),
        )

    def fail(
        self, job_id: str, now: float, expires_at: float, code: str, message: str, attempt: int = 0
    ) -> bool:
        """End a job that has not ended, or only its attempt, without a result; False where it had
        ended, or is gone."""
        only = " AND attempts = ?" if attempt else ""
        return self._changed(
            "UPDATE jobs SET status = 'failed', completed_at = ?, expires_at = ?, error_code = ?,"
            f" error_message = ? WHERE id = ? AND status IN ('queued', 'in_progress'){only}",
            *(now, expires_at, code, message, job_id),
            *((attempt,) if attempt else ()),
        )

    def _changed(self, sql: str, *values: Any) -> bool:
        """Whether a statement changed a row."""
        with self.write() as db:
            return db.execute(sql, values).rowcount > 0

    def requeue(self, job: Job, lost: bool) -> bool:
        """Put a running attempt back where it was in the queue; lost: its process went down."""
        return self._changed(
            f"UPDATE jobs SET {WAITS_AGAIN} WHERE {CURRENT}",
            *(int(lost), job.id, job.attempts),
        )

    def recover(self) -> list[Job]:
        """After a restart: what a killed server had in progress waits again."""
        with self.write() as db:
            held = db.execute("SELECT id FROM jobs WHERE status = 'in_progress'").fetchall()
            db.execute(f"UPDATE jobs SET {WAITS_AGAIN} WHERE status = 'in_progress'", (1,))
        return [job for (job_id,) in held if (job := self.get(job_id)) is not None]

    def delete(self, job_id: str) -> bool:
        """Forget a job in any state."""
        return self._changed("DELETE FROM jobs WHERE id = ?", job_id)

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
        return {row[0] for row in self.rows("SELECT id FROM jobs")}

    def perf(self, job_id: str) -> dict[str, Any] | None:
        """What a completed job's time went into."""
        rows = self.rows("SELECT perf FROM jobs WHERE id = ?", job_id)
        return json.loads(rows[0][0]) if rows and rows[0][0] else None

    def used(self, owner: str | None = None) -> int:
        """Bytes of all results, or of a key's."""
        own, values = _own(owner)
        sql = "SELECT COALESCE(SUM(bytes), 0) FROM jobs WHERE bytes > 0"
        return self.rows(sql + own, *values)[0][0]

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        rows = dict(self.rows("SELECT status, COUNT(*) FROM jobs GROUP BY status"))
        return {state: rows.get(state, 0) for state in STATES}

    def ahead(self, job: Job) -> int:
        """Waiting jobs of at least its priority that came before a waiting job."""
        return self.rows(
            "SELECT COUNT(*) FROM jobs WHERE status = 'queued' AND (priority > ? OR"
            " (priority = ? AND seq < ?))",
            *(job.priority, job.priority, job.seq),
        )[0][0]

    def waiting_cost(self, owner: str) -> float:
        """The predicted work of what a key has waiting."""
        sql = "SELECT COALESCE(SUM(cost), 0) FROM jobs WHERE status = 'queued' AND owner = ?"
        return self.rows(sql, owner)[0][0]

    def next_expiry(self, owner: str | None = None) -> float | None:
        """When the next result, or a key's, makes room."""
        own, values = _own(owner)
        sql = "SELECT MIN(expires_at) FROM jobs WHERE status = 'completed'"
        return self.rows(sql + own, *values)[0][0]

    def note(self, name: str, value: Any) -> None:
        """Keep a value over restarts."""
        with self.write() as db:
            db.execute(
                "INSERT INTO prices VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = ?",
                (name, json.dumps(value), json.dumps(value)),
            )

    def noted(self, name: str) -> Any:
        """A value that `note` kept, or None."""
        rows = self.rows("SELECT value FROM prices WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else None


def _own(owner: str | None) -> tuple[str, tuple[str, ...]]:
    """The condition, and its value, of a key's jobs alone; no condition for None."""
    return ("", ()) if owner is None else (" AND owner = ?", (owner,))


def _marks(count: int) -> str:
    """Places of so many values in a statement."""
    return ", ".join("?" * count)
