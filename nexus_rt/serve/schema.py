"""The tables of the job store."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from nexus_rt.core.errors import NexusError

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    priority INTEGER NOT NULL,
    cost REAL NOT NULL,
    room INTEGER NOT NULL,
    created_at REAL NOT NULL,
    deadline_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    expires_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0,
    batch_key TEXT NOT NULL,
    remixed_from TEXT,
    request TEXT NOT NULL,
    error_code TEXT,
    error_message TEXT,
    bytes INTEGER NOT NULL DEFAULT 0,
    perf TEXT
);
CREATE INDEX IF NOT EXISTS waiting ON jobs (status, priority, owner, seq, cost, room);
CREATE INDEX IF NOT EXISTS stored ON jobs (bytes) WHERE bytes > 0;
CREATE INDEX IF NOT EXISTS due ON jobs (deadline_at) WHERE status IN ('queued', 'in_progress');
CREATE INDEX IF NOT EXISTS over ON jobs (expires_at) WHERE status IN ('completed', 'failed');
CREATE INDEX IF NOT EXISTS owned ON jobs (owner, seq);
CREATE TABLE IF NOT EXISTS owners (owner TEXT PRIMARY KEY, finish REAL NOT NULL);
CREATE TABLE IF NOT EXISTS prices (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
FORM = 1  # `PRAGMA user_version` of SCHEMA; a new file has 0


def open_tables(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file, all at once or not at all; a store of this form has them.

    Raises:
        NexusError: another version wrote it.
        sqlite3.OperationalError: it cannot be written. sqlite3.DatabaseError: it is damaged, or
            holds other jobs than ours.
    """
    form = db.execute("PRAGMA user_version").fetchone()[0]
    if form not in (0, FORM):
        raise NexusError(
            f"{path} is a job store of form {form}, and this version reads form {FORM}; start the"
            " version that wrote it, or choose another --store.",
            code="unsupported",
            param="store",
        )
    if form == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise sqlite3.DatabaseError("its tables are another program's")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")  # what was answered with 200 is on disk
    db.execute("BEGIN IMMEDIATE")
    try:
        for statement in SCHEMA.split(";"):
            db.execute(statement)
        db.execute("DELETE FROM owners")  # virtual time begins anew
        db.execute(f"PRAGMA user_version = {FORM}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
