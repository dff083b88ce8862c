"""How attention is launched: the way its tiles come, the blocks of a program, the compile-time
constants."""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128)
FP8_HEAD_DIMS = (64, 128)
LOADS = ("auto", "pointers", "descriptors", "specialised")
TIMED = (*LOADS, "ahead")  # and what is there to be timed beside them
SHORT = 512  # keys up to which descriptors are not worth making


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability, Hopper's where there is no GPU to ask."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def end_to_end(t: Tensor) -> bool:
    """Whether the heads of a [B, L, heads, D] tensor follow each other: what a two-dimensional tile
    of a sample can walk."""
    return t.stride(2) == t.shape[3]


def resolve_loads(
    loads: str, q: Tensor, k: Tensor, v: Tensor, biased: bool, fp8: bool = False
) -> str:
    """What "auto" stands for: the most that the chip, the layout and the compiler take.

    Hopper and data-centre Blackwell load by their tensor memory accelerator in a warp group of its
    own (fp8 on Blackwell would spill so). Few keys, as a prompt's are, and a bias, which is loaded
    by ordinary instructions, come by pointers.
    """
    if loads not in TIMED:
        raise ValueError(f"attention: loads is {loads!r}; expected one of {', '.join(TIMED)}.")
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0
    # bytes are written end to end
    tiled = q.element_size() == 2 and (fp8 or all(end_to_end(t) for t in (q, k, v)))
    if loads == "auto":
        if major < 9 or not tiled or biased or k.shape[1] <= SHORT:
            return "pointers"
        return "specialised" if major == 9 or (major == 10 and not fp8) else "descriptors"
    if loads != "pointers" and not tiled:
        raise ValueError(
            f"attention: loads={loads!r} needs 16-bit tensors whose heads lie end to end; use"
            " 'auto'."
        )
    if loads in ("specialised", "ahead") and biased:
        raise ValueError(f"attention: loads={loads!r} takes no bias; use 'auto'.")
    return loads


def launch_config(
    head_dim: int,
    element_size: int,
    capability: tuple[int, int],
    loads: str = "pointers",
    fp8: bool = False,
) -> dict[str, int]:
    """128 queries a program, and as many stages of keys and values as shared memory holds without
    spilling registers.

    Specialised on Hopper, four warps load and twice four compute 64 queries each. Consumer chips
    have 99 KiB.
    """
    if element_size > 2:  # four warps spill up to 36 KB at head_dim 128
        return {"ROWS": 64, "COLUMNS": 32, "num_warps": 8, "num_stages": 2}
    if loads != "pointers" and capability[0] == 9:
        warps = 4 if loads == "specialised" else 8
        stages = 2 if loads != "specialised" or (head_dim == 128 and not fp8) else 3
        return {"ROWS": 128, "COLUMNS": 128, "num_warps": warps, "num_stages": stages}
    wide = capability in ((9, 0), (10, 0)) or fp8
    few = capability[0] == 12 and fp8 and head_dim == 64  # eight warps have 128 registers there
    return {
        "ROWS": 128,
        "COLUMNS": 64,
        "num_warps": 4 if few else 8,
        "num_stages": 3 if loads != "pointers" and wide else 2,
    }


def again_config(config: dict[str, int]) -> dict[str, int]:
    """Of the second launch: the same blocks, as flags and scales belong to them."""
    return {**config, "num_warps": 8, "num_stages": 2}


def flags(
    keys: int,
    head_dim: int,
    biased: bool,
    loads: str,
    fp8: bool,
    config: dict[str, int],
    again: bool = False,
) -> dict:
    """The kernel's other compile-time constants. By pointers at head_dim 128, whole blocks would
    spill on sm_80.

    again: the second launch, which is masked.
    """
    whole = keys % config["COLUMNS"] == 0 and not biased and head_dim < 128
    return {
        "D": head_dim,
        "HAS_BIAS": biased,
        "MASKED": again or (loads == "pointers" and not whole),
        "PRECISION": "ieee",
        "FP8": fp8,
        "DESCRIPTORS": loads != "pointers",
        "SPECIALISED": loads == "specialised",
        "AHEAD": loads == "ahead",
        "AGAIN": again,
    }
