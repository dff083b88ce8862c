"""One velocity of an AOTInductor engine by PyTorch alone, without nexus_rt: the loader is the one
its manifest names.

    nexus-rt export --backend aoti --parts large -o engines
    python examples/aoti_consumer.py engines/large

A package is native code: run only what you trust like a program. Its weights lie beside the code
inside the package, which `torch._inductor.aoti_load_package` does not read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.export.pt2_archive._package import load_pt2


def load(folder: Path, graph: str):
    """A graph of an engine folder, as a function of its inputs in the contract's order."""
    (runner,) = load_pt2(
        str(folder / f"{graph}.pt2"), device_index=-1, load_weights_from_disk=True
    ).aoti_runners.values()
    return runner


def example(shape: list, sizes: dict[str, int]) -> torch.Tensor:
    """An input of a contract's shape, dimensions by name as `sizes` has them."""
    return torch.randn(
        [d if isinstance(d, int) else sizes[d] for d in shape],
        generator=torch.Generator().manual_seed(0),
    )


def main(folder: Path) -> torch.Tensor:
    manifest = json.loads((folder / "manifest.json").read_text())
    width, height, frames = manifest["buckets"][0]
    sizes = {
        "batch": 1,
        "tokens": 9,
        "height": height // 8,
        "width": width // 8,
        "frames": (frames - 1) // 4 + 1,
    }
    contract = manifest["contract"]
    keys, values = load(folder, "context")(
        example(contract["context"]["inputs"][0]["shape"], sizes)
    )
    latents = example(contract["velocity"]["inputs"][0]["shape"], sizes)
    return load(folder, "velocity")(latents, torch.tensor(500.0), keys, values, torch.zeros(1, 9))


if __name__ == "__main__":
    print(tuple(main(Path(sys.argv[1])).shape))
