"""Amounts of memory, written and read."""

from __future__ import annotations

import re

from nexus_rt.core.errors import InputError, shorten

UNITS = {
    "": 1,
    "B": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_bytes(text: str | float, name: str = "vram") -> int:
    """ "24GB", "22.5GiB", "800MB" or a number of bytes.

    Raises:
        InputError: none of these, less than a byte, or more than any address space.
    """
    shown = shorten(text, 80)
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*", shown)
    if not match or match[2].upper() not in UNITS:
        raise InputError(
            f"memory {shown!r} is not an amount; expected one such as 24GB or 22GiB.", param=name
        )
    count = int(float(match[1]) * UNITS[match[2].upper()])
    if not 1 <= count < 2**63:
        raise InputError(
            f"memory {shown!r} is {'less than a byte' if count < 1 else 'beyond 2^63 bytes'};"
            " expected one such as 24GB or 22GiB.",
            code="out_of_range",
            param=name,
        )
    return count


def amount(count: int) -> str:
    """Bytes for reading: 28.01 GB, 3.4 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
