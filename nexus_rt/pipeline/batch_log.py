"""`results.jsonl` of a batch: a line for each clip as it ends, read again by the next run."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, NexusError, readable
from nexus_rt.pipeline import settings

OUTCOMES = ("models", "rewritten", "rewrite_failure", "plan")  # of a row, which decide nothing


class Row(msgspec.Struct):
    """A line of `results.jsonl`, as far as a later run reads it."""

    id: str
    status: Literal["begun", "done", "failed"]
    when: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    file: str = ""
    settings: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.status != "begun" and not self.settings:
            raise ValueError("a row that ended has no settings")


def finished(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """The last line on every id that ended, of all shards and workers of a folder, and how often
    each was begun since.

    A line cut short by a killed process counts for nothing.

    Raises:
        InputError: a file that cannot be read.
    """
    ended: dict[str, dict[str, Any]] = {}
    starts: dict[str, list[float]] = {}
    for path in sorted(folder.glob("results*.jsonl")):
        for line in _lines(path):
            try:
                record = documents.parse(line, str(path))
                row = documents.check(record, Row, str(path))
            except NexusError:  # cut short by a killed process, or no line of ours
                continue
            if row.status == "begun":
                starts.setdefault(row.id, []).append(row.when)
            elif row.when >= ended.get(row.id, {"when": row.when})["when"]:
                ended[row.id] = record
    return ended, {
        i: sum(t > ended.get(i, {"when": 0.0})["when"] for t in times)
        for i, times in starts.items()
    }


def _lines(path: Path) -> Iterator[str]:
    """A file's lines, whatever bytes stand in them."""
    try:
        with open(path, "rb") as file:
            while line := file.readline(documents.MAX_BYTES):
                yield line.decode("utf-8", errors="replace")
    except OSError as error:  # without it every clip would be made again
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}), and it says which clips are there;"
            " mend its permissions, or move it away to make every clip again.",
            code="unreadable",
        ) from error


def same_clip(kept: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether the settings of two rows make one clip.

    Where the models were read from is no matter, what they are is; nor is the plan's text, of which
    "identity" is what it does. Of the options, "rewrite" is the row's own, and one at a call's
    default is as one that is not set.
    """
    usual = {n: str(f.default) for n, f in settings.fields().items() if not f.optional}

    def decisive(row: dict[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in row.items() if name not in OUTCOMES}
        if isinstance(options := own.get("options"), dict):
            set_otherwise = {n: v for n, v in options.items() if v != usual.get(n)}
            own["options"] = {n: v for n, v in set_otherwise.items() if n != "rewrite"}
        return own

    return decisive(kept) == decisive(wanted)


class Lines:
    """A file that gets a whole line at a time, on disk when `add` returns.

    Raises:
        NexusError: the disk is full, or the folder went away.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._order = path, threading.Lock()
        if not path.exists() or not path.stat().st_size:
            return
        with self._written(), open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a process was killed in the middle of a line
                file.write(b"\n")

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row; returns it as it was written."""
        row = _readable(row)
        with self._written(), self._order, open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return row

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NexusError(
                f"{self.path} cannot be written ({error}); free some space and run the same"
                " command: what was finished is kept.",
                code="not_writable",
            ) from error


def _readable(value: Any) -> Any:
    """A row whose texts a file can hold: half a surrogate pair is spelt out."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, dict):
        return {_readable(k): _readable(v) for k, v in value.items()}
    return [_readable(v) for v in value] if isinstance(value, (list, tuple)) else value
