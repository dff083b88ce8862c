"""Where this package keeps what it measured and built: `NEXUS_RT_CACHE`, else the user's cache
folder."""

from __future__ import annotations

import os
from pathlib import Path

from nexus_rt.core.paths import as_path, user_cache


def cache_root() -> Path:
    """The folder; it need not exist.

    Raises:
        InputError: `NEXUS_RT_CACHE` is no path, or no folder of the user's own can be named.
    """
    base = os.environ.get("NEXUS_RT_CACHE")
    return as_path("NEXUS_RT_CACHE", base) if base else user_cache() / "nexus_rt"
