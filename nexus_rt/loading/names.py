"""Names of stored tensors: what wrappers of modules put into them, and what stands beside the
weights.

A model that was compiled, shared between processes or checkpointed when it was saved has its
wrappers' attributes in its keys, at the front or inside (`_orig_mod.blocks.0.`,
`blocks.0._checkpoint_wrapped_module.`). No model has a part of these names of its own.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nexus_rt.core.errors import ModelError, shorten

T = TypeVar("T")
WRAPPERS = (
    "_orig_mod",  # torch.compile
    "module",  # DataParallel, DistributedDataParallel, DeepSpeed, AveragedModel
    "_module",  # Opacus, and others' containers
    "_fsdp_wrapped_module",  # FullyShardedDataParallel
    "_fpw_module",  # the same, earlier and in fairscale
    "_checkpoint_wrapped_module",  # activation checkpointing and offloading
    "_forward_module",  # Lightning Fabric
    "_original_module",  # the same
)
WRAPPED = re.compile(rf"(?:(?<=\.)|^)(?:{'|'.join(WRAPPERS)})\.")
# Counters of moving averages and of batches, one number each.
COUNTERS = re.compile(r"(?:^|\.)(?:n_averaged|num_updates|num_batches_tracked|(?:ema_)?decay)$")
# Stored beside the weights that are used, and rightly left out: vocabulary heads and the decoder of
# an encoder-decoder, at the top of the names, and tables that are computed.
SPARE = re.compile(
    r"^(?:(?:model|base_model|language_model|text_model|transformer)\.)*(?:lm_head|decoder|score)\."
    r"|(?:^|\.)(?:rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias)$"
)
# parts of names -> why a transformer that lacks them computes the same
HARMLESS = {
    "norm_added_q": "a norm of image-to-video's added attention, whose products are not there",
}
# patterns of names -> trained parts of other architectures, and where to go
TRAINED = (
    (
        r"\.to_gate_compress\.",
        "the gates of video sparse attention (VSA), with which FastVideo's FastWan was trained:"
        " they add a coarse attention to every block's, and without them the clip is another. Run"
        " it with FastVideo, or pass FastWan as a LoRA or a checkpoint without gates to recipe"
        " fastwan-3step",
    ),
    (
        r"\.lora_(A|B|down|up)\.",
        "a LoRA that was not merged. Merge it before saving, or save it to a file of its own and"
        " pass that as a LoRA",
    ),
    (
        r"(^|\.)(model_ema|ema_model|ema|shadow_params)\.",
        "a moving average beside the weights. Save one of the two",
    ),
)


def plain_name(name: str) -> str:
    """A tensor's name without the attributes of wrappers, wherever in it they are."""
    return WRAPPED.sub("", name)


def is_counter(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one number of a training run's bookkeeping."""
    return math.prod(shape) == 1 and COUNTERS.search(name) is not None


def is_spare(name: str) -> bool:
    """Whether a stored tensor is beside a text encoder's or language model's used weights."""
    return SPARE.search(name) is not None and "scale" not in name


def without_spare(
    tensors: Mapping[str, T], expected: Collection[str], where: Path | str
) -> dict[str, T]:
    """A transformer's tensors without those that it needs not (`HARMLESS`), of which a warning
    says so."""
    reasons: dict[str, list[str]] = {}
    for name in tensors.keys() - set(expected):
        if reason := next((r for part, r in HARMLESS.items() if part in name), None):
            reasons.setdefault(reason, []).append(name)
    for reason, spare in reasons.items():
        warnings.warn(f"{where}: left out {some(spare)}: {reason}.", stacklevel=3)
    left_out = {name for spare in reasons.values() for name in spare}
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def refuse_unused(names: Iterable[str], where: Path | str, what: str) -> None:
    """Raise where a checkpoint has tensors that a model of `what` would leave out; names them.

    Raises:
        ModelError: there are any.
    """
    if unused := sorted(names):
        reason = extra(unused) or f"{some(unused)} belong to no {what} of this architecture"
        raise ModelError(
            f"{where}: {reason}; left out, they would change what the {what} computes: get a"
            " checkpoint of this architecture.",
            code="mismatch",
        )


def extra(names: Iterable[str]) -> str:
    """What the first known names of trained parts of other architectures are; empty for none."""
    for name in names:
        for pattern, kind in TRAINED:
            if re.search(pattern, name):
                return f"{shorten(name, 120)} is of {kind}"
    return ""


def some(names: Iterable[Any]) -> str:
    """How many names, and the first three."""
    listed = sorted(map(str, names))
    first = shorten(", ".join(listed[:3]))
    return f"{len(listed)} ({first}{', ...' if len(listed) > 3 else ''})"
