"""Logs as JSON, a line an event: no prompts, no bodies, no addresses unless somebody logs them."""

from __future__ import annotations

import atexit
import json
import logging
import queue
import sys
import threading
import time
import warnings
from typing import Any

KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


MAX_LINES = 10_000  # that wait for whoever reads the log
LAST_LINES = 2.0  # seconds at exit for what still waits


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, logger, event, and what was passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        row |= {k: v for k, v in vars(record).items() if k not in KNOWN and not k.startswith("_")}
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=False, default=str)


class Unhurried(logging.Handler):
    """Standard error, written by a thread of its own: an event loop that logs does not wait for
    whoever reads the log. Above `MAX_LINES` the newest lines are dropped and counted."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.Queue[str] = queue.Queue(MAX_LINES)
        self.dropped = 0
        threading.Thread(target=self._write, daemon=True, name="nexus-rt-log").start()
        atexit.register(self.drain)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.lines.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1
        except Exception:
            self.handleError(record)

    def _write(self) -> None:
        while True:
            line = self.lines.get()
            self._print(line)
            self.lines.task_done()
            if self.dropped and self.lines.empty():
                count, self.dropped = self.dropped, 0
                words = f"{count} lines were dropped: nobody read the log"
                record = logging.makeLogRecord({"name": __name__, "msg": words})
                record.levelno, record.levelname = logging.WARNING, "WARNING"
                self._print(self.format(record))

    @staticmethod
    def _print(line: str) -> None:
        try:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except (AttributeError, OSError, ValueError):  # there is none, or it is closed
            pass

    def drain(self) -> None:
        """Wait a little until all lines are written."""
        until = time.monotonic() + LAST_LINES
        while self.lines.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)


def log_json(level: str = "info", unhurried: bool = False) -> None:
    """Write this package's and uvicorn's log to standard error as JSON lines, Python's warnings
    too; those that quote a prompt are the client's to hear (`/v1/videos/{id}/events`).

    unhurried: by a thread, for a process with an event loop; not for one that may end at once.
    """
    handler: logging.Handler = Unhurried() if unhurried else logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", message="the prompt ")
    for name in ("nexus_rt", "uvicorn", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
