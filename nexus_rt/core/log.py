"""The runtime's logger, `nexus_rt`: at level INFO it says what every "auto" chose, and why. A
library, it has no handler of its own: a program that wants to read it configures `logging`, and the
command line does with `--log-level`.
"""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("nexus_rt")
logger.addHandler(logging.NullHandler())
LEVELS = ("debug", "info", "warning", "error")


def chose(what: str, value: object, why: str, once: bool = False) -> None:
    """Log a choice that was left to the runtime; once: not again in this process while it stays the
    same."""
    if not logger.isEnabledFor(logging.INFO):
        return
    (write_once if once else write)(what, str(value), why)


def write(what: str, value: str, why: str) -> None:
    """A line about a choice."""
    logger.info("%s: %s (%s)", what, value, why)


write_once = functools.cache(write)


def show(level: str) -> None:
    """Write the log of this level and above to standard error, as the command line does."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("nexus-rt: %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())
