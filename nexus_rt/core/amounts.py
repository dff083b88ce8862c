"""Amounts of memory and frame rates, written and read."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from nexus_rt.core.errors import InputError, shorten, shown

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

RATE = re.compile(r"[0-9]{1,12}(?:\.[0-9]{0,20}|/[0-9]{1,12})?|\.[0-9]{1,20}")


def parse_bytes(text: str | float, name: str = "vram") -> int:
    """ "24GB", "22.5GiB", "800MB" or a number of bytes.

    Raises:
        InputError: none of these, less than a byte, or more than any address space.
    """
    words = shorten(text, 80)
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*", words)
    if not match or match[2].upper() not in UNITS:
        raise InputError(
            f"memory {words!r} is not an amount; expected one such as 24GB or 22GiB.", param=name
        )
    count = int(float(match[1]) * UNITS[match[2].upper()])
    if not 1 <= count < 2**63:
        raise InputError(
            f"memory {words!r} is {'less than a byte' if count < 1 else 'beyond 2^63 bytes'};"
            " expected one such as 24GB or 22GiB.",
            code="out_of_range",
            param=name,
        )
    return count


def amount(count: int) -> str:
    """Bytes for reading: 28.01 GB, 3.4 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def frame_rate(fps: Any, name: str = "fps") -> Fraction:
    """Frames per second as a fraction: a number, a Fraction, or text such as "30000/1001"; 23.976
    and its like are the NTSC rates they stand for (24000/1001).

    Raises:
        InputError: no number, or outside 1/10 to 1000.
    """
    try:
        if isinstance(fps, str):  # of "1e999999999" Fraction makes all the digits
            rate = Fraction(fps) if RATE.fullmatch(fps.strip(" ")) else Fraction(0)
        elif isinstance(fps, (int, Fraction)):
            rate = Fraction(fps)
        else:
            rate = Fraction(float(fps))
    except Exception:  # whatever an object's __float__ raises
        rate = Fraction(0)
    if isinstance(fps, bool) or not Fraction(1, 10) <= rate <= 1000:
        words = shorten(fps, 60) if isinstance(fps, str) else shown(fps, 60)
        raise InputError(
            f"{name} is {words}; expected frames per second from 0.1 to 1000, such as 16 or"
            " 30000/1001.",
            code="out_of_range",
            param=name,
        )
    ntsc = Fraction(round(rate * Fraction(1001, 1000)) * 1000, 1001)
    if rate.denominator != 1 and abs(rate - ntsc) < Fraction(1, 1000):
        return ntsc
    return rate.limit_denominator(10_000)
