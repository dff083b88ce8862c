"""Logs as JSON, a line an event: no prompts, no bodies, no addresses unless somebody logs them."""

from __future__ import annotations

import json
import logging
import time
import warnings
from typing import Any

KNOWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


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


def log_json(level: str = "info") -> None:
    """Write this package's and uvicorn's log to standard error as JSON lines, Python's warnings
    too; those that quote a prompt are the client's to hear (`/v1/videos/{id}/events`)."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", message="the prompt ")
    for name in ("nexus_rt", "uvicorn", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
