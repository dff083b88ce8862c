"""What a program's innermost loop costs, read from its machine code
(`python -m nexus_rt.bench.aot --loops attention`).

Needs triton, no GPU: `nvdisasm`, which Triton ships, writes out what `ptxas` assembled. The loop is
the innermost one with the most matrix products: from the target of a backward branch to the branch.
Instructions are those of a warp; matrix products are counted apart, as their time is that of the
matrix units.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
LABEL = re.compile(r"^(\.L_x_\d+):")
PRODUCTS = ("HGMMA", "QGMMA", "HMMA", "QMMA", "UTCHMMA", "UTCQMMA", "OMMA")
# instructions by what executes them on Hopper; the multi-function unit does 16 a cycle and
# multiprocessor, the others 64 or 128 (CUDA C++ programming guide, "Arithmetic Instructions")
KINDS = {
    "special": ("MUFU",),
    "conversions": ("F2F", "F2FP", "I2F", "F2I"),
    "products": PRODUCTS,
    "waits": ("WARPGROUP", "WARPSYNC", "SYNCS", "BAR", "DEPBAR", "LDGDEPBAR", "NANOSLEEP"),
    "loads and stores": ("LD", "ST", "UTMA", "UBLKCP"),
}


@dataclass(frozen=True)
class Loop:
    """A loop's instructions by name, modifiers left out."""

    counts: Counter

    @property
    def instructions(self) -> int:
        """All but the matrix products."""
        return sum(n for name, n in self.counts.items() if name not in PRODUCTS)

    @property
    def products(self) -> int:
        return sum(n for name, n in self.counts.items() if name in PRODUCTS)

    def kinds(self) -> dict[str, int]:
        """Instructions by what executes them; "arithmetic" is the rest."""
        out: Counter = Counter()
        for name, n in self.counts.items():
            own = (k for k, names in KINDS.items() if name.startswith(names))
            out[next(own, "arithmetic")] += n
        return dict(out)


def disassemble(cubin: Path) -> str:
    """A program's machine code, as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout


def inner_loop(text: str) -> Loop | None:
    """The innermost loop with the most matrix products; None where no loop has any.

    Of several with as many, the one of the most instructions: a specialised program has a copy a
    warp group.
    """
    code: list[tuple[str, str]] = []  # (name, operands)
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif match := LINE.match(line):
            code.append((match[2].split(".")[0], match[3]))
    loops = []
    for at, (name, operands) in enumerate(code):
        target = re.search(r"\.L_x_\d+", operands)
        if name == "BRA" and target and labels.get(target[0], at + 1) <= at:
            loops.append((labels[target[0]], at))
    has = lambda loop: any(name in PRODUCTS for name, _ in code[loop[0] : loop[1] + 1])
    within = lambda loop, others: any(
        other != loop and loop[0] <= other[0] and other[1] <= loop[1] for other in others
    )
    busy = [loop for loop in loops if has(loop)]
    # with no loop inside; else, as a wait may be one, with none that has products
    inner = [loop for loop in busy if not within(loop, loops)]
    inner = inner or [loop for loop in busy if not within(loop, busy)]
    counted = [Loop(Counter(n for n, _ in code[a : b + 1] if n != "NOP")) for a, b in inner]
    return max(counted, key=lambda loop: (loop.products, loop.instructions), default=None)
