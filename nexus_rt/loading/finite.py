"""The check that weights hold numbers, made once where they are read.

Attention on a CPU and others hide NaN: of a row of scores they keep what is larger, which NaN is
not, so that predictions look like numbers. A checkpoint's tensors are looked at where they have
arrived (12 to 20 GB/s on one core, PyTorch's `aminmax`), 8-bit ones that stay as they are by their
bytes, and GGUF's blocks by their scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_rt.core.errors import ModelError, shorten
from nexus_rt.loading.formats.stored import StoredTensor
from nexus_rt.models.encodings import Blocks, Scaled

# bytes without their sign from which on an 8-bit float is infinite or NaN
LARGEST_BYTE = {torch.float8_e4m3fn: 126, torch.float8_e5m2: 123}
PART = 2**20  # bytes looked at together: what is computed of them stays in a core's cache
LARGEST = torch.finfo(torch.float32).max


def is_finite(value: Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    if not value.numel() or not value.is_floating_point():
        return True
    if value.dtype.itemsize == 1:
        value = value.float()
    low, high = value.aminmax()  # NaN if any is
    return bool(torch.stack((low, high)).isfinite().all())


def check_finite(name: str, stored: StoredTensor, value: Tensor, source: Tensor) -> None:
    """Raise where a weight is not finite in the dtype that it is kept in.

    Args:
        value: as it is kept. source: as it was before it was rounded.

    Raises:
        ModelError: names the tensor, and whether the file or the dtype is at fault.
    """
    if is_finite(value):
        return
    where = f"{stored.path}: {shorten(name, 120)}"
    if is_finite(source):
        raise ModelError(
            f"{where} holds numbers beyond {str(value.dtype).removeprefix('torch.')}; pass"
            " torch_dtype bfloat16 or float32.",
            code="out_of_range",
            param="torch_dtype",
        )
    raise ModelError(f"{where} holds NaN or infinity; get the file again.", code="not_finite")


def check_kept(name: str, stored: StoredTensor, raw: Tensor) -> None:
    """Raise where a weight that stays in 8 bits or fewer stands for numbers that are not finite.

    Args:
        raw: as it lies in the file; scales are checked where they are read.

    Raises:
        ModelError: names the tensor.
    """
    if isinstance(stored.encoding, Blocks):
        whole = all(is_finite(half) for half in stored.encoding.scales(raw))
    elif raw.dtype in LARGEST_BYTE:
        parts = raw.view(torch.uint8).flatten().split(PART)
        whole = all(int((p & 127).max()) <= LARGEST_BYTE[raw.dtype] for p in parts if len(p))
    else:
        whole = True  # whole numbers
    if whole and isinstance(stored.encoding, Scaled) and _overflows(stored.encoding, raw):
        whole = is_finite(stored.decoded(raw))
    if not whole:
        raise ModelError(
            f"{stored.path}: {shorten(name, 120)} holds NaN or infinity; get the file again.",
            code="not_finite",
        )


def _overflows(encoding: Scaled, raw: Tensor) -> bool:
    """Whether values of this type times such scales could leave float32."""
    info = torch.finfo(raw.dtype) if raw.is_floating_point() else torch.iinfo(raw.dtype)
    return float(encoding.scale.abs().max()) * float(info.max) > LARGEST
