"""Checks of devices, dtypes and tensors: each says what was wrong, what was expected, and what to
do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus_rt.errors import InputError, shorten, shown

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def as_device(name: str, value: Any) -> torch.device:
    """A device that tensors can be on here. No memory of a GPU is touched.

    Raises:
        InputError: no device's name, or one that this machine or PyTorch does not have.
    """
    why = "expected a name such as 'cpu', 'cuda' or 'cuda:1'"
    if isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
        try:
            device = torch.device(value)
            why = _no_device(device)
        except Exception as error:  # torch's backends raise nearly everything
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not why:
            return torch.device("cpu") if device.type == "cpu" else device
    raise InputError(
        f"{name} {shown(value, 60)} cannot be used here ({shorten(why, 200)}); `nexus-rt doctor`"
        f" lists"
        " what can.",
        code="not_found",
        param=name,
    )


def _no_device(device: torch.device) -> str:
    """Why tensors cannot be on a device; "" where they can."""
    if device.type == "meta":
        return "its tensors have no values"
    if device.type in ("cpu", "cuda"):
        there = torch.cuda.device_count() if device.type == "cuda" else 1
        if not there:
            return "no CUDA device" if torch.version.cuda else "this PyTorch build has no CUDA"
        return "" if (device.index or 0) < there else f"there are {there} of this kind"
    torch.zeros(1, device=device).cpu()
    return ""


def as_dtype(name: str, value: Any) -> torch.dtype:
    """A dtype that models compute in.

    Raises:
        InputError: no dtype of torch, or none of those.
    """
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        spelt = str(value).removeprefix("torch.") if isinstance(value, str) else ""
        close = spelt if spelt in [str(d).removeprefix("torch.") for d in DTYPES] else "bfloat16"
        raise InputError(
            f"{name} is {shown(value)}; expected a dtype of torch's, such as torch.{close}"
            f" ({', '.join(map(str, DTYPES))}).",
            code="invalid_type" if not isinstance(value, torch.dtype) else "unsupported",
            param=name,
        )
    return value


def check_generators(generator: Any, videos: int) -> None:
    """Raise unless `generator` is None, a torch.Generator, or one for each video."""
    several = (
        generator
        if isinstance(generator, (list, tuple))
        else []
        if generator is None
        else [generator]
    )
    for one in several:
        if not isinstance(one, torch.Generator):
            raise InputError(
                f"generator is {shown(one)}; expected a torch.Generator, such as"
                " torch.Generator().manual_seed(7), or one for each video.",
                code="invalid_type",
                param="generator",
            )
    if isinstance(generator, (list, tuple)) and len(generator) != videos:
        raise InputError(
            f"{len(generator)} generators for {videos} videos; pass one for each, or a single one.",
            code="mismatch",
            param="generator",
        )


def check_embeddings(given: dict[str, Tensor | None]) -> None:
    """Raise unless embeddings are [B, L, D] and a negative one is like its positive (NaN is the
    first step's to name).

    given: under the call's own names, the texts and the two contexts.
    """
    for name, value in given.items():
        if value is None:
            continue
        if (
            not isinstance(value, Tensor)
            or value.ndim != 3
            or not value.is_floating_point()
            or 0 in value.shape
        ):
            words = (
                f"{list(value.shape)} of {value.dtype}"
                if isinstance(value, Tensor)
                else shown(value)
            )
            raise InputError(
                f"{name} is {words}; expected a tensor of embeddings [batch, tokens, width].",
                code="invalid_type",
                param=name,
            )
    for name in ("prompt_embeds", "context_embeds"):
        positive, negative = given.get(name), given.get(f"negative_{name}")
        if negative is not None and positive is not None and negative.shape != positive.shape:
            raise InputError(
                f"negative_{name} has shape {list(negative.shape)} and {name}"
                f" {list(positive.shape)}; expected the same: one for each video, padded to one"
                " length.",
                code="mismatch",
                param=f"negative_{name}",
            )
    second, first = given.get("prompt_embeds_2"), given.get("prompt_embeds")
    if second is not None and first is not None and second.shape != first.shape:
        raise InputError(
            f"prompt_embeds_2 has shape {list(second.shape)} and prompt_embeds {list(first.shape)};"
            " expected the same: the large generator's text for the same prompts.",
            code="mismatch",
            param="prompt_embeds_2",
        )
    text, context = given.get("prompt_embeds"), given.get("context_embeds")
    if text is not None and context is not None and len(text) != len(context):
        raise InputError(
            f"prompt_embeds are for {len(text)} prompts and context_embeds for {len(context)};"
            " expected as many.",
            code="mismatch",
            param="context_embeds",
        )


def check_latents(latents: Any, shape: tuple[int | None, ...]) -> None:
    """Raise unless latents are finite and of a shape, of which None is any number from 1 up."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        words = str(latents.dtype) if isinstance(latents, Tensor) else shown(latents)
        raise InputError(
            f"latents are {words}; expected a floating-point tensor [B, C, T, H, W].",
            code="invalid_type",
            param="latents",
        )
    have = tuple(latents.shape)
    if len(have) != len(shape) or not all(
        n == wanted or (wanted is None and n) for n, wanted in zip(have, shape, strict=True)
    ):
        sides = [c if n is None else n for c, n in zip("BCTHW", shape, strict=True)]
        raise InputError(
            f"latents have shape {have}; expected [{', '.join(map(str, sides))}], as the models,"
            " the size and the frames ask.",
            code="mismatch",
            param="latents",
        )
    if latents.device.type == "meta" or not bool(latents.isfinite().all()):
        raise InputError(
            "latents hold NaN or infinity, or no values; pass finite ones.",
            code="not_finite",
            param="latents",
        )
