"""An engine from the cache to the folder that was asked for: files that any program opens in place,
on one disk once.

onnx refuses external data behind a hard or a symbolic link, so the files of an output folder are
its own: the engine moves there and the cache keeps a link to it; where it lies in another output
already it is shared block by block (a reflink), where the file system can, or copied, and that is
said.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nexus_rt.engines.folder import EngineFolder, link_tree, places

FICLONE = 0x40049409  # Linux's ioctl that makes one file share another's blocks


def remove(path: Path) -> None:
    """Take an engine out of the cache; one that lies in an output folder stays there."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def _clone(source: Path, target: Path) -> bool:
    """A copy that shares its blocks; False where the file system has none."""
    try:
        with open(source, "rb") as old, open(target, "wb") as new:
            fcntl.ioctl(new, FICLONE, old.fileno())
        return True
    except OSError:
        target.unlink(missing_ok=True)
        return False


def _copy_tree(source: Path, target: Path) -> int:
    """A folder's files as files of their own; returns the bytes that were copied and not shared."""
    copied = 0
    for path, place in places(source, target):
        if not _clone(path, place):
            shutil.copyfile(path, place)
            copied += place.stat().st_size
    return copied


def publish(
    engine: EngineFolder,
    place: Path,
    part: str,
    command: str,
    say: Callable[[str], None] = lambda text: None,
    lasting: bool = True,
) -> EngineFolder:
    """Put an engine of the cache into an output folder, under its part's name and with the asker's
    command.

    What stood there is replaced once the new one is complete. lasting: False leaves the engine in
    the cache, and links it.

    Raises:
        OSError: the disk is full; what stood there stays.
    """
    cached = engine.path
    with open(cached.with_name(f"{cached.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        real = cached.resolve()
        if real != place.absolute() and real != place.resolve():
            part_folder, old = (
                place.with_name(f".{place.name}.{kind}-{os.getpid()}") for kind in ("part", "old")
            )
            shutil.rmtree(part_folder, ignore_errors=True)
            moved = False
            try:
                if not lasting:
                    link_tree(real, part_folder)
                elif not cached.is_symlink():
                    with contextlib.suppress(OSError):  # another disk
                        os.rename(real, part_folder)
                        moved = True
                if lasting and not moved:
                    copied = _copy_tree(real, part_folder)
                    if copied > 1 << 20:
                        say(
                            f"{part}: copied {copied / 1e6:.0f} MB, which this file system cannot"
                            f" share with {real.parent}"
                        )
                if place.is_symlink():
                    place.unlink()
                elif place.exists():
                    os.rename(place, old)
                os.rename(part_folder, place)
            except BaseException:
                if moved and part_folder.exists():
                    os.rename(part_folder, real)
                shutil.rmtree(part_folder, ignore_errors=True)
                raise
            shutil.rmtree(old, ignore_errors=True)
            if moved:
                cached.symlink_to(place.absolute(), target_is_directory=True)
        done = EngineFolder(place, replace(engine.manifest, part=part, command=command))
        done.write()
    return done
