"""Arguments to what they describe: a pipeline, a blend, a call's options."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from nexus_rt.cli.arguments import BLEND_NUMBERS
from nexus_rt.errors import InputError

if TYPE_CHECKING:
    from nexus_rt.loading.pair_folder import PairFolders
    from nexus_rt.pipeline import NexusPipeline
    from nexus_rt.upfb import BlendConfig

PARTS = ("small", "large", "vae", "text_encoder", "tokenizer", "understanding", "connector")
MODEL_ARGUMENTS = ("engines", "pair", *PARTS, "small_lora", "large_lora")


def given_models(args: argparse.Namespace) -> dict[str, Any]:
    """The sources of a pair's parts that the arguments name."""
    return {n: getattr(args, n) for n in PARTS if getattr(args, n) is not None}


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the arguments say of the models, as `from_pretrained` takes it."""
    names = ("small_lora", "large_lora", "small_recipe", "large_recipe")
    own = {n: getattr(args, n) for n in names}
    weights = args.quantize or args.weights or "dense"
    return {**given_models(args), **own, "boundary_ratio": args.boundary, "weights": weights}


def find_models(args: argparse.Namespace) -> tuple[Any, PairFolders]:
    """The pair that the arguments name, else the mini pair; and where its parts lie.

    Raises:
        ModelError, InputError: as `find_pair`.
    """
    from nexus_rt.loading.pair_folder import MINI, find_pair

    pretrained = args.pair if args.pair or args.small or args.large else MINI
    hub = {"local_files_only": args.local_files_only}
    return pretrained, find_pair(pretrained, given_models(args), hub, args.boundary)


def make_pipeline(args: argparse.Namespace) -> NexusPipeline:
    """The pipeline of the models or engines that the arguments name."""
    import torch

    from nexus_rt.pipeline import NexusPipeline

    if args.engines:
        dtype = getattr(torch, args.dtype) if args.dtype else None
        return NexusPipeline.from_engines(
            args.engines,
            device=args.device,
            torch_dtype=dtype,
            kernels=args.kernels,
            force=args.force,
            vram=args.vram,
            cuda_graphs=args.cuda_graphs,
            parallel=getattr(args, "parallel", None),
        )
    return NexusPipeline.from_pretrained(
        args.pair,
        **model_options(args),
        torch_dtype=getattr(torch, args.dtype) if args.dtype else None,
        device=args.device,
        backend=args.backend,
        kernels=args.kernels,
        attention=args.attention,
        local_files_only=args.local_files_only,
        vram=args.vram,
        cuda_graphs=args.cuda_graphs,
        parallel=getattr(args, "parallel", None),
    )


def quiet_pipeline(args: argparse.Namespace) -> NexusPipeline:
    """The same without a progress bar; a function of its own, so that Ray's workers can be sent
    it."""
    pipe = make_pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_blend(args: argparse.Namespace) -> BlendConfig | None:
    """The blend that the arguments describe; None where they say nothing of it.

    Raises:
        InputError: a number that the chosen split or low-pass does not have.
    """
    from nexus_rt.upfb import BlendConfig

    given = {
        n: v for n in ("split", "lowpass", *BLEND_NUMBERS) if (v := getattr(args, n)) is not None
    }
    split, lowpass = given.get("split", "gaussian"), given.get("lowpass", "gaussian")
    blend = BlendConfig(**given)
    if split == "gaussian" and lowpass != "gaussian":
        print(
            f"nexus-rt: --lowpass {lowpass} has no part in --split gaussian, and changes nothing.",
            file=sys.stderr,
        )
    for name in given:
        flag = "--" + name.replace("_", "-")
        if split == "gaussian" and name in ("rho_min", "rho_max", "order"):
            raise InputError(f"{flag} is of the splits fft and dct; pass --split fft or dct too.")
        if split != "gaussian" and name in ("sigma_min", "sigma_max"):
            raise InputError(
                f"{flag} is of the split gaussian; with --split {split} use --rho-min and"
                " --rho-max."
            )
        if name == "order" and lowpass != "butterworth":
            raise InputError(
                "--order is of the Butterworth low-pass; pass --lowpass butterworth too, not"
                f" {lowpass}."
            )
    return blend if given else None


def call_options(args: argparse.Namespace) -> dict:
    """What the arguments say of every clip, as the pipeline's call takes it; checked before any
    model is read."""
    from nexus_rt.front import from_front
    from nexus_rt.loading.pair_folder import Defaults
    from nexus_rt.request import make_request
    from nexus_rt.video import frame_rate

    frame_rate(args.fps, "--fps")
    if args.plan is not None and args.plan.startswith("@"):
        chosen = from_front(args.plan)
        if chosen.rewrite != "off" and args.rewrite is None and args.rewriter is None:
            args.rewrite = chosen.rewrite
        args.plan = chosen.plan
    width, height = args.size or (None, None)
    options = dict(
        height=height,
        width=width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        guidance_scale_2=args.guidance_2,
        plan=args.plan,
        shift=args.shift,
        blend=make_blend(args),
        energy=args.energy,
        gamma_w=args.gamma_w,
        solver=args.solver,
        timesteps=args.timesteps,
        small_steps=args.small_steps,
        large_steps=args.large_steps,
    )
    # with any pair's defaults: what no pair would take is said before one is read
    make_request(
        Defaults(),
        **options,
        output_type="np",
        num_videos_per_prompt=1,
        published=args.as_published,
    )
    return {**options, **rewrite_options(args), "as_published": args.as_published}


def rewrite_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of rewriting, as the pipeline's call takes it."""
    from nexus_rt.checks import number
    from nexus_rt.request import TIMEOUT
    from nexus_rt.rewriting import ChatRewriter, EndpointRewriter, check_rewrite

    if args.rewrite is not None:
        check_rewrite(args.rewrite, 1)
    timeout = TIMEOUT if args.rewrite_timeout is None else args.rewrite_timeout
    number("--rewrite-timeout", timeout, 1e-3, 1e6)
    rewrite: Any = args.rewrite
    if args.rewriter is not None and "://" in args.rewriter:
        if not args.rewriter_model:
            raise InputError(
                "--rewriter is a URL; pass the model that it serves: --rewriter-model."
            )
        rewrite = EndpointRewriter(args.rewriter, args.rewriter_model, timeout=timeout)
    elif args.rewriter is not None:
        if args.rewriter_model:
            raise InputError("--rewriter-model goes with a URL; --rewriter is a folder.")
        rewrite = ChatRewriter(args.rewriter, device=args.device)
    if rewrite is None:
        return {}
    return {"rewrite": rewrite, "rewrite_timeout": timeout}


def check_device(name: str | None) -> None:
    """Raise an `InputError` unless tensors can be on the device; None is any."""
    from nexus_rt.checks import as_device

    if name is not None:
        as_device("device", name)


def model_words(args: argparse.Namespace) -> str:
    """Where the models are from, as the arguments say it."""
    return " ".join(f"{n}={value}" for n in MODEL_ARGUMENTS if (value := getattr(args, n)))
