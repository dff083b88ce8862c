"""The tables of the job store, and how a store of an older form becomes one of this."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from nexus_rt.errors import NexusError

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
FORM = 1  # `PRAGMA user_version` of SCHEMA; 0 is a new file, or one from before it was numbered
FIRST = {"seq", "id", "status", "created_at", "request"}  # columns that every form has
ADDED = {  # what a column that an older form has not is filled with
    "owner": "TEXT NOT NULL DEFAULT ''",
    "priority": "INTEGER NOT NULL DEFAULT 0",
    "cost": "REAL NOT NULL DEFAULT 1",
    "room": "INTEGER NOT NULL DEFAULT 0",
    "deadline_at": "REAL NOT NULL DEFAULT 0",
    "started_at": "REAL",
    "completed_at": "REAL",
    "expires_at": "REAL",
    "attempts": "INTEGER NOT NULL DEFAULT 0",
    "losses": "INTEGER NOT NULL DEFAULT 0",
    "batch_key": "TEXT NOT NULL DEFAULT ''",
    "remixed_from": "TEXT",
    "error_code": "TEXT",
    "error_message": "TEXT",
    "bytes": "INTEGER NOT NULL DEFAULT 0",
    "perf": "TEXT",
}
DEADLINE = 3600.0  # seconds from creation, of a job of a form without deadlines
KEEP = 24 * 3600.0  # seconds from creation, of a result of a form without expiries
INDICES = ("waiting", "stored", "due", "over", "owned")


def open_tables(db: sqlite3.Connection, path: Path) -> None:
    """Have a database's tables in the form of this version, all at once or not at all.

    Raises:
        NexusError: a later version wrote it.
        sqlite3.OperationalError: it cannot be written. sqlite3.DatabaseError: it is damaged, or
            holds other jobs than ours.
    """
    form = db.execute("PRAGMA user_version").fetchone()[0]
    if form > FORM:
        raise NexusError(
            f"{path} is a job store of form {form}, and this version reads forms up to {FORM};"
            " start the version that wrote it, or choose another --store."
        )
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")  # what was answered with 200 is on disk
    db.execute("BEGIN IMMEDIATE")
    try:
        _write_tables(db, form)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _write_tables(db: sqlite3.Connection, form: int) -> None:
    columns = {row[1] for row in db.execute("PRAGMA table_info(jobs)")}
    if columns:
        if not columns >= FIRST:
            raise sqlite3.DatabaseError(f"its jobs have no {min(FIRST - columns)}")
        for name, declaration in ADDED.items():
            if name not in columns:
                db.execute(f"ALTER TABLE jobs ADD COLUMN {name} {declaration}")
        if "deadline_at" not in columns:
            db.execute("UPDATE jobs SET deadline_at = created_at + ?", (DEADLINE,))
        if "expires_at" not in columns:
            db.execute(
                "UPDATE jobs SET expires_at = created_at + ? WHERE status IN ('completed',"
                " 'failed')",
                (KEEP,),
            )
        if form < FORM:  # an index may be of other columns
            for index in INDICES:
                db.execute(f"DROP INDEX IF EXISTS {index}")
    for statement in SCHEMA.split(";"):
        db.execute(statement)
    db.execute("DELETE FROM owners")  # virtual time begins anew
    if form != FORM:
        db.execute(f"PRAGMA user_version = {FORM}")
