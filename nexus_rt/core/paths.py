"""Paths as callers write them, and the folders that this package keeps things in."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

from nexus_rt.core.errors import InputError, shorten, shown


def as_path(name: str, value: Any) -> Path:
    """`value` as a path, with `~` expanded; nothing need be there.

    Args:
        name: of the argument, for errors.

    Raises:
        InputError: neither text nor a path, a name that no file can have, `~` of a user who is not
            known here, or a place that may not be looked at.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(
            f"{name} is {shown(value, 80)}; expected a path.", code="invalid_type", param=name
        )
    try:
        path = Path(value).expanduser()
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError:
        raise InputError(
            f"{name} is {shown(str(value), 120)}, and there is no home folder for its '~' here;"
            " write the whole path.",
            code="not_found",
            param=name,
        ) from None
    except Exception as error:  # too long, NUL, half a surrogate pair, another's __fspath__
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{name} is {shown(value, 120)}, which cannot be used ({reason}); pass another path.",
            param=name,
        ) from None
    return path


def user_cache() -> Path:
    """The user's cache folder: `XDG_CACHE_HOME` where it is absolute, `~/.cache`, or, for a user
    without a home, one of their own beside the system's temporary files.

    Raises:
        InputError: that one belongs to somebody else.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the specification ignores others
        return Path(xdg)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # neither HOME nor a passwd entry
        folder = Path(tempfile.gettempdir()) / f"nexus_rt-cache-{os.getuid()}"
    if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
        raise InputError(
            f"there is no home folder, and {folder} is somebody else's; set NEXUS_RT_CACHE to a"
            " folder of your own.",
            code="not_writable",
        )
    return folder


def cache_root() -> Path:
    """The folder of what this package measures and builds: `NEXUS_RT_CACHE`, else one in the user's
    cache folder. It need not exist.

    Raises:
        InputError: `NEXUS_RT_CACHE` is no path, or no folder of the user's own can be named.
    """
    base = os.environ.get("NEXUS_RT_CACHE")
    return as_path("NEXUS_RT_CACHE", base) if base else user_cache() / "nexus_rt"


def failed_file(what: str, error: OSError) -> str:
    """One sentence on a file or folder that could not be read or written, and what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = (
        "free some space, or write somewhere else"
        if full
        else "check the path and its permissions, or choose another"
    )
    reason = error.strerror or str(error) or type(error).__name__
    return f"{what} cannot be used ({shorten(reason)}); {remedy}."


def check_outputs(*names: str | None) -> None:
    """Find out before any work whether files can be written; None is a file nobody wants.

    Raises:
        InputError: a name that can be no path, or a folder that is not there or not writable.
    """
    for path in (as_path("output", name) for name in names if name):
        if not path.parent.is_dir():
            raise InputError(
                f"{path.parent} does not exist; make the folder first, or write somewhere else.",
                code="not_found",
                param="output",
            )
        check_folder(path.parent, "choose a place you may write to")


def check_folder(folder: Path, remedy: str) -> None:
    """Make a folder, and find out before any work whether files can be written to it.

    Raises:
        InputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"{folder} cannot be written ({shorten(reason)}); {remedy}.", code="not_writable"
        ) from None
