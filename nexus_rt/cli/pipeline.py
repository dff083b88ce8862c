"""Arguments to what they describe: a pipeline, a call's settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nexus_rt.core.amounts import frame_rate
from nexus_rt.core.errors import InputError
from nexus_rt.core.fields import fields_of
from nexus_rt.pipeline import settings
from nexus_rt.pipeline.sources import PARTS, ModelSources, RunOptions

if TYPE_CHECKING:
    from nexus_rt.pipeline.pipeline import NexusPipeline
    from nexus_rt.pipeline.rewriting import Rewriter
    from nexus_rt.pipeline.settings import CallSettings

MODEL_ARGUMENTS = ("engines", "pair", *PARTS, "small_lora", "large_lora")


def make_pipeline(args: argparse.Namespace) -> NexusPipeline:
    """The pipeline of the models or engines that the arguments name."""
    import torch

    from nexus_rt.pipeline.pipeline import NexusPipeline

    sources, options = ModelSources.of(vars(args)), RunOptions.of(vars(args))
    shared: dict[str, Any] = {
        "torch_dtype": getattr(torch, options.dtype) if options.dtype else None,
        "kernels": options.kernels,
        "vram": options.vram,
        "cuda_graphs": options.cuda_graphs,
        "parallel": getattr(args, "parallel", None),
    }
    if options.engines:
        return NexusPipeline.from_engines(
            options.engines, device=sources.device, force=options.force, **shared
        )
    return NexusPipeline.from_pretrained(
        **sources.keywords, backend=options.backend, attention=options.attention, **shared
    )


def quiet_pipeline(args: argparse.Namespace) -> NexusPipeline:
    """The same without a progress bar; a function of its own, so that Ray's workers can be sent
    it."""
    pipe = make_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_settings(args: argparse.Namespace) -> CallSettings:
    """A call's settings, of the options that are set.

    `--plan @FRONT:MS` is the front's plan, with the rewriting that it was judged by unless another
    is set. `--rewriter` becomes the rewriter.

    Raises:
        InputError: a value out of range, no such front, or a number that the split does not have.
        ModelError: --rewriter is no chat model's folder.
    """
    values: dict[str, Any] = {}
    for name, field in settings.fields().items():
        if field.nested:
            every = {n: getattr(args, f.flag, None) for n, f in fields_of(field.kind).items()}
            value = {n: v for n, v in every.items() if v is not None} or None
        else:
            value = getattr(args, field.flag, None)
        if value is not None:
            values[name] = value
    if (sides := getattr(args, "size", None)) is not None:
        values["width"], values["height"] = sides
    rewriter = getattr(args, "rewriter", None)
    if values.get("plan", "").startswith("@"):
        from nexus_rt.pipeline.front import from_front

        chosen = from_front(values["plan"])
        values["plan"] = chosen.plan
        if hasattr(args, "rewrite") and rewriter is None:
            values.setdefault("rewrite", chosen.rewrite)
    call = settings.CallSettings(**values)
    check_blend(values.get("blend", {}))
    if rewriter is not None:
        call = call.replace(rewrite=make_rewriter(args, call.rewrite_timeout))
    return call


def clip_settings(args: argparse.Namespace) -> CallSettings:
    """`call_settings`, checked against Wan's own defaults before a model is read.

    Raises:
        InputError: as a call of Wan's pair with them.
    """
    from nexus_rt.pipeline.request import make_request
    from nexus_rt.pipeline.rewriting import check_rewrite

    frame_rate(args.fps, "--fps")
    call = call_settings(args)
    check_rewrite(call.rewrite, 1)
    make_request(call, settings.Defaults())
    return call


def check_blend(blend: Mapping[str, Any]) -> None:
    """Raise an `InputError` for a number that the split or low-pass does not have."""
    split, lowpass = blend.get("split", "gaussian"), blend.get("lowpass", "gaussian")
    if split == "gaussian" and lowpass != "gaussian":
        print(
            f"nexus-rt: --lowpass {lowpass} has no part in --split gaussian, and changes nothing.",
            file=sys.stderr,
        )
    for name in blend:
        option = "--" + name.replace("_", "-")
        if split == "gaussian" and name in ("rho_min", "rho_max", "order"):
            raise InputError(
                f"{option} is of the splits fft and dct; pass --split fft or dct too.",
                code="conflict",
                param=option,
            )
        if split != "gaussian" and name in ("sigma_min", "sigma_max"):
            raise InputError(
                f"{option} is of the split gaussian; with --split {split} use --rho-min and"
                " --rho-max.",
                code="conflict",
                param=option,
            )
        if name == "order" and lowpass != "butterworth":
            raise InputError(
                "--order is of the Butterworth low-pass; pass --lowpass butterworth too, not"
                f" {lowpass}.",
                code="conflict",
                param=option,
            )


def make_rewriter(args: argparse.Namespace, timeout: float) -> Rewriter:
    """The rewriter of `--rewriter`; timeout: seconds for one answer of an endpoint."""
    from nexus_rt.pipeline.rewriting import ChatRewriter, EndpointRewriter

    if "://" in args.rewriter:
        if not args.rewriter_model:
            raise InputError(
                "--rewriter is a URL; pass the model that it serves: --rewriter-model.",
                code="missing",
                param="--rewriter-model",
            )
        return EndpointRewriter(args.rewriter, args.rewriter_model, timeout=timeout)
    if args.rewriter_model:
        raise InputError(
            "--rewriter-model goes with a URL; --rewriter is a folder.",
            code="conflict",
            param="--rewriter-model",
        )
    return ChatRewriter(args.rewriter, device=args.device)


def check_device(name: str | None) -> None:
    """Raise an `InputError` unless tensors can be on the device; None is any."""
    from nexus_rt.core.devices import as_device

    if name is not None:
        as_device("device", name)


def model_words(args: argparse.Namespace) -> str:
    """Where the models are from, as the arguments say it."""
    return " ".join(f"{n}={value}" for n in MODEL_ARGUMENTS if (value := getattr(args, n)))
