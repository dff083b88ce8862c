"""Files and folders while they are written: under a name of their own beside the final one, locked
by their writer, and removed by the next run where that one was killed.

The writer holds a lock (flock) on its part, and the part's name holds the kernel that runs. A lock
that can be taken is of a writer that has ended: the kernel gives it up with the process. No
process id is asked: another container counts anew, and a number is used again. Containers that
share a volume share their kernel, and so its locks.

On a file system of several machines the lock alone does not decide: NFS may be mounted without its
lock manager, and FUSE file systems often lock on one machine alone. A part of another kernel there
is removed only when nothing in it has changed for `ABANDONED_S`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path

ABANDONED_S = 3600.0  # without a change, of a part whose writer cannot be asked
MAX_STEM = 180  # bytes of the final name in a part's: file systems take 255
NAME = re.compile(r"\..+\.(?:([0-9a-f]{8})-)?[0-9a-f]{1,16}\.part(?:\.[^.]{1,16})?")
LOCK = ".writing"  # in a part folder: NFS locks no folders


@lru_cache
def kernel() -> str:
    """Digits that name the running kernel, the same in all its containers and another after a
    reboot; the host's name where the system does not say."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        text = platform.node()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextlib.contextmanager
def part_file(path: Path) -> Iterator[Path]:
    """An empty locked file beside `path`, for the block to write and to rename (`os.replace`);
    what the block leaves of it is removed. The first of a process in a folder removes its orphans.

    Raises:
        OSError: it cannot be made there.
    """
    look_through(path.parent.absolute())
    part, lock = _make(lambda: _named(path))
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        os.close(lock)


@contextlib.contextmanager
def part_folder(target: Path) -> Iterator[Path]:
    """As `part_file`, an empty locked folder beside `target`, with the folders above it; renamed to
    `target` when the block ends without an error.

    Raises:
        OSError: it cannot be made there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    look_through(target.parent.absolute())
    part, lock = _make(lambda: _new_folder(_named(target)) / LOCK)
    part = part.parent
    try:
        yield part
        (part / LOCK).unlink()
        os.rename(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """An empty folder among the system's temporary files, removed after the block; those that
    killed processes of this name left are removed before it."""
    place = Path(tempfile.gettempdir())
    remove_orphans(place, f".{name}.*.part")
    part, lock = _make(lambda: _new_folder(_named(place / name)) / LOCK)
    try:
        yield part.parent
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)
        os.close(lock)


def remove_orphans(folder: Path, pattern: str = ".*.part*") -> int:
    """Remove what killed processes left half-written of a folder's files and folders.

    Args:
        pattern: of their names, as `Path.glob` takes it.

    Returns:
        How many were removed. What a process writes, or may write on another machine, stays.
    """
    count = 0
    with contextlib.suppress(OSError):
        for path in list(folder.glob(pattern)):
            match = NAME.fullmatch(path.name)
            if match and not path.is_symlink():
                with contextlib.suppress(OSError):  # another process removes it as well
                    count += _remove(path, match[1])
    return count


@cache
def look_through(folder: Path) -> None:
    """Remove an absolute folder's orphans, once in a process: a batch writes thousands of files."""
    remove_orphans(folder)


def _named(path: Path) -> Path:
    """A part's name that no other writer has, with the suffix that says the format."""
    suffix = path.suffix if len(path.suffix) <= 16 else ""
    stem = os.fsencode(path.name.removesuffix(suffix))[:MAX_STEM].decode(errors="ignore")
    return path.with_name(f".{stem}.{kernel()}-{secrets.token_hex(6)}.part{suffix}")


def _new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def _make(name: Callable[[], Path]) -> tuple[Path, int]:
    """A new file and the descriptor that holds its lock."""
    while True:
        path = name()
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a process that removes orphans was faster
            pass
        except OSError:  # a file system without locks
            return path, lock
        else:
            if os.fstat(lock).st_nlink:
                return path, lock
        os.close(lock)


def _remove(path: Path, writer: str | None) -> bool:
    """Remove a part whose writer, on the kernel of that name, has ended; whether it did."""
    folder = path.is_dir()
    with _held(path / LOCK if folder else path) as held:
        if held is False:
            return False
        # a disk of this machine, which the kernels of others do not write
        own = writer == kernel() or (writer is not None and os.major(path.stat().st_dev) != 0)
        if not (held and own) and time.time() - _changed(path) < ABANDONED_S:
            return False
        shutil.rmtree(path) if folder else path.unlink()
        return True


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool | None]:
    """A part's lock: True where it was taken, False where its writer holds it, None where there is
    none to ask."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held: bool | None = stat.S_ISREG(os.fstat(lock).st_mode)
    except BlockingIOError:
        held = False
    except OSError:
        held = None
    try:
        yield held
    finally:
        os.close(lock)


def _changed(path: Path) -> float:
    """When a file, or anything in a folder, changed last; seconds as `time.time` counts them."""
    within = path.rglob("*") if path.is_dir() else ()
    return max(p.lstat().st_mtime for p in (path, *within))
