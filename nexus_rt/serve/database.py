"""The job store's file: its tables, its lock, its transactions, and whether it can be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nexus_rt.core.errors import InputError, NexusError, shorten

MIN_FREE = 2**20  # bytes; a disk with less counts as full
PROBE = ".probe"
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


class Database:
    """An open job store, which one server works on; its methods may be called from any thread.

    Raises:
        InputError: the folder cannot be made or written, or another server works on it.
        NexusError: the file is no job store, is damaged, or is of a later version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "jobs.sqlite"
        self.videos = folder / "videos"
        self._order = threading.RLock()
        with contextlib.ExitStack() as undo:
            self._held = undo.enter_context(_lock(folder, self.videos))
            try:
                self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
                undo.callback(self._db.close)
                open_tables(self._db, self.path)
            except sqlite3.OperationalError as error:
                raise _not_writable(folder, error) from error
            except sqlite3.DatabaseError as error:
                raise NexusError(
                    f"{self.path} cannot be read as a job store ({error}); move it away, and the"
                    " server begins with an empty one.",
                    code="unreadable",
                    param="store",
                ) from error
            undo.pop_all()
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
            with self.write():
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
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or, after an error, none."""
        with self._order:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *values: Any) -> list[tuple]:
        """What a query reads."""
        with self._order:
            return self._db.execute(sql, values).fetchall()


def _lock(folder: Path, videos: Path) -> IO[str]:
    """Make the folders, and hold them until the file is closed.

    Raises:
        InputError: they cannot be made or written, or another server holds them.
    """
    import fcntl

    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        videos.mkdir(exist_ok=True)
        held = open(folder / "server.lock", "w")  # noqa: SIM115 (held while we live)
    except OSError as error:
        raise _not_writable(folder, error) from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise _not_writable(folder, error) from error
        raise InputError(
            f"another server works on {folder}; stop it, or give this one a --store of its own.",
            code="in_use",
            param="store",
        ) from None
    return held


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
