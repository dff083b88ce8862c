"""Where this package keeps what it measured and built: `NEXUS_RT_CACHE`, else the user's cache
folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder; it need not exist."""
    base = os.environ.get("NEXUS_RT_CACHE")
    return (
        Path(base)
        if base
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nexus_rt"
    )
