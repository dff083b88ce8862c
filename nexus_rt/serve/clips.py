"""The files of completed jobs: on disk, all of them, before a job is completed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nexus_rt.serve.generate import Clip

FILES = {"video": "video.mp4", "thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.jpg"}


def sync_folder(folder: Path) -> None:
    """Have a folder's names on disk: the sync of a file does not cover its name."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_clip(final: Path, clip: Clip) -> int:
    """Write a clip's files into a new folder, all of them or none, and have them on disk.

    Returns:
        Their bytes.

    Raises:
        OSError: they cannot be written; nothing of them is left.
    """
    part = final.with_name(f"{final.name}.part")
    for folder in (part, final):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        part.mkdir()
        for variant, name in FILES.items():
            with open(part / name, "wb") as file:
                file.write(getattr(clip, variant))
                file.flush()
                os.fsync(file.fileno())
        sync_folder(part)
        part.rename(final)
        sync_folder(final.parent)
    except OSError:
        for folder in (part, final):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return sum(len(getattr(clip, variant)) for variant in FILES)
