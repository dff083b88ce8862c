"""What this processor can do."""

from __future__ import annotations

from pathlib import Path

SIMD = ("avx", "sse4", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm", "neon", "vnni")


def instruction_sets() -> list[str]:
    """The vector extensions of this processor, which compiled code may use any of; empty where the
    system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    line = next(
        (
            v
            for k, _, v in (row.partition(":") for row in text.split("\n"))
            if k.strip() in ("flags", "Features")
        ),
        "",
    )
    return sorted(f for f in set(line.split()) if any(word in f for word in SIMD))
