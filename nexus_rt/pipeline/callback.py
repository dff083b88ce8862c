"""A caller's `callback_on_step_end`: the tensors that it reads and changes, and the hook that calls
it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nexus_rt.core.errors import InputError, choose, shorten, shown
from nexus_rt.method.hooks import CallbackResult
from nexus_rt.method.step import Step
from nexus_rt.pipeline.encode import Conditioning
from nexus_rt.pipeline.inputs import EMBEDS

CALLBACK_TENSORS = ("latents", *EMBEDS)


def callback_tensors(callback: Any, names: Any) -> tuple[str, ...]:
    """Names of the tensors that a callback is called with.

    An object with `tensor_inputs`, as diffusers' `PipelineCallback` and `MultiPipelineCallbacks`
    have them, names its own; `names` other than the default are added to them.

    Raises:
        InputError: it cannot be called, or there are no tensors of such names.
    """
    if callback is None and isinstance(names, tuple) and names == ("latents",):
        return names
    if callback is not None and not callable(callback):
        raise InputError(
            f"callback_on_step_end is {shown(callback)}; expected a function.",
            code="invalid_type",
            param="callback_on_step_end",
        )
    wanted = _names("callback_on_step_end_tensor_inputs", names)
    if inspect.getattr_static(callback, "tensor_inputs", None) is None:
        return wanted
    kind = type(callback).__name__
    try:
        own = callback.tensor_inputs
    except Exception as error:  # diffusers' base class has a property that raises
        raise InputError(
            f"the {kind} has no tensor_inputs that can be read ({shorten(error, 120)}); set them to"
            " a list of names, such as ['latents'].",
            param="callback_on_step_end",
        ) from error
    mine = _names(f"{kind}.tensor_inputs", own)
    return mine if wanted == ("latents",) else tuple(dict.fromkeys((*mine, *wanted)))


def _names(argument: str, value: Any) -> tuple[str, ...]:
    """Names of callback tensors, once each."""
    if not isinstance(value, (list, tuple)):
        raise InputError(
            f"{argument} is {shown(value)}; expected a list of names.",
            code="invalid_type",
            param=argument,
        )
    return tuple(
        dict.fromkeys(choose("callback tensor", n, CALLBACK_TENSORS, argument) for n in value)
    )


class StepCallback:
    """A caller's `callback_on_step_end` as a hook of the loop.

    pipe: the pipeline of the call, which the callback is called with.
    """

    def __init__(
        self,
        pipe: Any,
        callback: Callable[[Any, int, int, dict], dict | None],
        tensors: Sequence[str],
        conditioning: Conditioning,
    ) -> None:
        self.pipe, self.callback, self.tensors, self.conditioning = (
            pipe,
            callback,
            tensors,
            conditioning,
        )

    def __call__(self, step: Step, latents: Tensor) -> CallbackResult | None:
        """Ask it; new embeddings are read from the next step on.

        Raises:
            InputError: it returned anything but a dictionary of tensors like those there are.
        """
        known = {"latents": latents, **self.conditioning.embeds}
        tensors = {name: known[name] for name in self.tensors}
        result = self.callback(self.pipe, step.index, step.timestep, tensors)  # type: ignore[arg-type]
        if result is None:
            return None
        if not isinstance(result, dict):
            raise InputError(
                f"the callback returned {shown(result)}; expected a dictionary of tensors.",
                code="invalid_type",
                param="callback_on_step_end",
            )
        for name, value in result.items():
            choose("callback tensor", name, known, "callback_on_step_end")
            there = known[name]
            if not isinstance(value, Tensor) or there is None or value.shape != there.shape:
                shape = None if there is None else list(there.shape)
                returned = list(value.shape) if isinstance(value, Tensor) else shown(value)
                raise InputError(
                    f"the callback returned {name} as {returned}; expected a tensor of shape"
                    f" {shape}.",
                    code="mismatch",
                    param=name,
                )
        new = {n: v for n, v in result.items() if n != "latents" and v is not known[n]}
        self.conditioning = self.conditioning.changed(new)
        prompts = self.conditioning.prompts(self.pipe.engines) if new else None
        return CallbackResult(result.get("latents"), prompts)
