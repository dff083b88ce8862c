"""The command line: `nexus-rt generate | batch | vrbench | decode | plan | export | engines | convert | bench | doctor`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from nexus_rt.arguments import BLEND_NUMBERS, parser
from nexus_rt.errors import InputError, NexusError, choose
from nexus_rt.options import check_options


def _pipeline(args: argparse.Namespace):
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
        )
    return NexusPipeline.from_pretrained(
        args.pair, small=args.small, large=args.large, vae=args.vae, text_encoder=args.text_encoder,
        understanding=args.understanding, connector=args.connector, small_lora=args.small_lora, large_lora=args.large_lora,
        torch_dtype=getattr(torch, args.dtype) if args.dtype else None, device=args.device,
        backend=args.backend, kernels=args.kernels, attention=args.attention,
        local_files_only=args.local_files_only, vram=args.vram, cuda_graphs=args.cuda_graphs,
    )  # fmt: skip


def _blend(args: argparse.Namespace):
    """The blend that the arguments describe; None where they say nothing of it.

    Raises:
        InputError: a number that the chosen split or low-pass does not have.
    """
    from nexus_rt.upfb import BlendConfig

    given = {n: v for n in ("split", "lowpass", *BLEND_NUMBERS) if (v := getattr(args, n)) is not None}
    split, lowpass = given.get("split", "gaussian"), given.get("lowpass", "gaussian")
    blend = BlendConfig(**given)
    if split == "gaussian" and lowpass != "gaussian":
        print(f"nexus-rt: --lowpass {lowpass} has no part in --split gaussian, and changes nothing.", file=sys.stderr)
    for name in given:
        flag = "--" + name.replace("_", "-")
        if split == "gaussian" and name in ("rho_min", "rho_max", "order"):
            raise InputError(f"{flag} is of the splits fft and dct; pass --split fft or dct too.")
        if split != "gaussian" and name in ("sigma_min", "sigma_max"):
            raise InputError(f"{flag} is of the split gaussian; with --split {split} use --rho-min and --rho-max.")
        if name == "order" and lowpass != "butterworth":
            raise InputError(f"--order is of the Butterworth low-pass; pass --lowpass butterworth too, not {lowpass}.")
    return blend if given else None


def _call_options(args: argparse.Namespace) -> dict:
    """What the arguments say of every clip, as the pipeline's call takes it; checked before any model is read."""
    from nexus_rt.pair import Defaults
    from nexus_rt.request import make_request
    from nexus_rt.video import frame_rate

    frame_rate(args.fps, "--fps")
    width, height = args.size or (None, None)
    options = dict(
        height=height, width=width, num_frames=args.frames, num_inference_steps=args.steps, guidance_scale=args.guidance,
        guidance_scale_2=args.guidance_2, plan=args.plan, shift=args.shift, blend=_blend(args), energy=args.energy,
        gamma_w=args.gamma_w, solver=args.solver,
    )  # fmt: skip
    # with any pair's defaults: what no pair would take is said before one is read
    make_request(Defaults(), **options, output_type="np", num_videos_per_prompt=1, published=args.as_published)
    for name, value in (("--size", min(args.size or (1,))), ("--frames", args.frames)):
        if value is not None and value < 1:
            raise InputError(f"{name} has {value}; expected positive numbers, such as --size 832x480 --frames 81.")
    return {**options, "as_published": args.as_published}


def _check_device(name: str | None) -> None:
    import torch

    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here ({reason}); `nexus-rt doctor` lists what can.") from error


def generate(args: argparse.Namespace) -> int:
    from nexus_rt.models.vae import rescue_latents
    from nexus_rt.request import check_seed
    from nexus_rt.video import check_output, made_with, save_video

    output = check_output(args.output)  # before any model is read
    options = _call_options(args)
    if not args.prompt.strip():
        raise InputError("the prompt is empty; say what the video should show.")
    _check_device(args.device)
    import torch

    seed = check_seed("--seed", args.seed)
    if args.seed == -1:
        print(f"seed {seed}", file=sys.stderr)
    pipe = _pipeline(args)
    pipe.set_progress_bar_config(disable=args.quiet or None)
    noise = torch.Generator("cpu").manual_seed(seed)
    latents = pipe(args.prompt, args.negative, generator=noise, output_type="latent", **options)
    frames = pipe.decode(latents.frames, "np", rescue=output.parent)
    made = made_with(args.prompt, args.negative, seed, latents.plan.name, options, model_words(args))
    try:
        save_video(frames[0], output, args.fps, made, truncate=args.as_published)
    except InputError as error:
        if (kept := rescue_latents(latents.frames, output.parent)) is None:
            raise
        raise NexusError(f"{error} The latents are saved in {kept}; decode them again with `nexus-rt decode`.") from error
    if not args.quiet:
        print(f"{output}: {frames.shape[1]} frames of {frames.shape[3]}x{frames.shape[2]}, plan {latents.plan.name}")
    return 0


def model_words(args: argparse.Namespace) -> str:
    """Where the models are from, as the arguments say it."""
    return " ".join(f"{n}={value}" for n in MODEL_ARGUMENTS if (value := getattr(args, n)))


MODEL_ARGUMENTS = ("engines", "pair", "small", "large", "vae", "text_encoder", "understanding", "connector", "small_lora",
                   "large_lora")  # fmt: skip


def batch(args: argparse.Namespace) -> int:
    from nexus_rt.prompts import read_prompts

    return _batch(args, read_prompts(args.prompts))


def _batch(args: argparse.Namespace, items: list) -> int:
    from pathlib import Path

    from nexus_rt.batch import Job, parse_shard, run

    options = _call_options(args)
    from nexus_rt.request import whole

    whole("--seed", args.seed, -1, 2**64 - 1)
    models = model_words(args)
    folder = Path(args.output).expanduser()
    job = Job(folder, args.seed, args.fps, f".{args.format.lstrip('.')}", parse_shard(args.shard), options, models)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    if args.ray:
        from nexus_rt.batch_ray import run_on_ray

        counts = run_on_ray(_quiet_pipeline, args, items, job, args.workers, say)
    else:
        _check_device(args.device)
        counts = run(_quiet_pipeline(args), items, job, say)
    print(f"{folder}: {counts['made']} made, {counts['kept']} kept, {counts['failed']} failed")
    return 1 if counts["failed"] else 0


def _quiet_pipeline(args: argparse.Namespace):
    pipe = _pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vrbench(args: argparse.Namespace) -> int:
    from nexus_rt.bench.vrbench import command

    if args.action == "generate":
        return _batch(args, command.items(args.prompts))
    return {"judge": command.judge, "report": command.report}[args.action](args)


def decode(args: argparse.Namespace) -> int:
    from nexus_rt.models.vae import read_latents
    from nexus_rt.video import check_output, frame_rate, save_video

    frame_rate(args.fps, "--fps")
    output = check_output(args.output)
    latents = read_latents(args.latents)
    frames = _pipeline(args).decode(latents, "np", rescue=output.parent)
    for i, clip in enumerate(frames):
        save_video(clip, output if len(frames) == 1 else output.with_stem(f"{output.stem}-{i}"), args.fps)
    return 0


def _step_costs(args: argparse.Namespace, pipe, blend):
    """Costs as given, or measured on the loaded pair at the asked size."""
    from nexus_rt.plan import StepCosts

    if args.costs:
        try:
            small, large = (float(x) for x in args.costs.split(","))
        except ValueError:
            raise InputError(f"--costs is {args.costs!r}; expected two numbers, such as 750,4600.") from None
        return StepCosts(small / 2, small, large / 2, large)
    from nexus_rt.costs import measure_step_costs, step_calls

    d = pipe.defaults
    width, height = args.size or (d.width, d.height)
    frames = args.frames or d.num_frames
    pipe.check_inputs(height, width, frames, "latent")
    prompts = pipe.encode("a prompt", single_frame=frames == 1)
    latents = pipe.prepare_latents(1, frames, height, width)
    calls = step_calls(pipe.engines, prompts, latents, blend, args.solver, pipe.kernels)
    return measure_step_costs(calls, cuda=latents.is_cuda)


def plan(args: argparse.Namespace) -> int:
    import torch

    from nexus_rt.loading import Loaded
    from nexus_rt.pair import Defaults
    from nexus_rt.pipeline import NexusPipeline
    from nexus_rt.plan import parse_plan
    from nexus_rt.request import PUBLISHED, Guidance, whole
    from nexus_rt.size import ClipSize
    from nexus_rt.solver import SOLVERS
    from nexus_rt.upfb import BlendConfig

    args.solver = choose("solver", args.solver or "unipc", SOLVERS)
    for name, value in (("--frames", args.frames), *(("--size", side) for side in args.size or ())):
        if value is not None:
            whole(name, value, 1, 16_384)
    blend = _blend(args) or BlendConfig()
    _check_device(args.device)
    real = args.pair or args.small or args.large or args.engines
    nothing = Loaded({}, None, None, None, None, Defaults(), (16, (1, 2, 2)))
    pipe = NexusPipeline(nothing, torch.device("cpu")) if args.costs and real is None else _pipeline(args)
    chosen = pipe.make_plan(args.plan, args.steps, args.shift, args.energy, args.gamma_w, args.as_published)
    memory = None
    if pipe.engines:  # a budget that cannot be met is said before anything is measured
        width, height = args.size or (pipe.defaults.width, pipe.defaults.height)
        memory = pipe.plan_residency(chosen, ClipSize(width, height, args.frames or pipe.defaults.num_frames))
    costs = _step_costs(args, pipe, blend)
    d = pipe.defaults
    own = (PUBLISHED["guidance_scale"], None) if args.as_published else (d.guidance_scale, d.guidance_scale_2)
    guidance = Guidance.of(args.guidance, args.guidance_2, *own)
    scales = (guidance.small, guidance.large)
    cutoff = "sigma" if blend.split == "gaussian" else "cutoff"
    print(f"{'step':>4} {'timestep':>8} {'w':>6} {cutoff:>6}  {'runs':5} {'guidance':>11} {'ms':>10}")
    for step in chosen.steps:
        width_of = blend.sigma(step.w) if blend.split == "gaussian" else blend.cutoff(step.w)
        shown = f"{width_of:6.3f}" if step.blended else "     -"
        own = "/".join(f"{chosen.guidance(step, g, *scales):g}" for g in ("small", "large") if getattr(step, g))
        price = chosen.step_price(step, costs, *scales)
        print(f"{step.index:4d} {step.timestep:8d} {step.w:6.3f} {shown}  {step.runs:5} {own:>11} {price:10.2f}")
    baseline = parse_plan("reference", chosen.grid)
    total, whole = (p.price(costs, *scales) for p in (chosen, baseline))
    runs, full = (p.evaluations(*scales) for p in (chosen, baseline))
    print(f"{chosen.name}: {runs['small']} small and {runs['large']} large forwards, {total:.1f} ms")
    print(
        f"reference: {full['small']} small and {full['large']} large forwards, {whole:.1f} ms; "
        f"this plan takes {100 * total / whole:.0f}% of it ({whole / total:.2f}x faster)"
    )
    if memory is not None:
        print(memory.table())
    source = "as given" if args.costs else "measured on this machine"
    print(f"step costs ({source}): small {costs.small_guided:.2f} ms guided, large {costs.large_guided:.2f} ms guided, "
          f"blend {costs.blend:.3f} ms, solver {costs.solver:.3f} ms")  # fmt: skip
    return 0


def convert(args: argparse.Namespace) -> int:
    choose("checkpoint", args.kind, ("omnivideo",))
    from nexus_rt.convert import convert_omnivideo

    report = convert_omnivideo(args.source, args.target, lambda line: print(line, file=sys.stderr))
    print(report)
    print(f"{args.target}: complete; every key is in conversion.json")
    return 0


def export(args: argparse.Namespace) -> int:
    from nexus_rt.export.command import run

    _check_device(args.device)
    return run(args)


def bench(args: argparse.Namespace) -> int:
    from nexus_rt.bench.command import run

    _check_device(args.device)
    return run(args)


def engines(args: argparse.Namespace) -> int:
    from nexus_rt.engines.command import run

    return run(args.action, args.folders)


def doctor(args: argparse.Namespace) -> int:
    from nexus_rt.doctor import report

    print(report())
    return 0


COMMANDS = {
    "generate": generate, "decode": decode, "plan": plan, "export": export, "engines": engines, "convert": convert,
    "batch": batch, "vrbench": vrbench, "bench": bench, "doctor": doctor,
}  # fmt: skip


def _ended(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for a failure, 2 for wrong arguments, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = parser()
    args = known.parse_args(words)
    args.line = shlex.join(["nexus-rt", *words])  # engines remember what made them
    if argv is None:  # the command's own process, not a program that calls us: what is half-made is taken away
        signal.signal(signal.SIGTERM, _ended)
    try:
        check_options(known, words, args)
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        kept = (
            "what was finished is kept, and the same command goes on"
            if args.command in ("export", "batch", "vrbench")
            else "nothing was written"
        )
        print(f"nexus-rt: interrupted; {kept}.", file=sys.stderr)
        return 130
    except NexusError as error:
        print(f"nexus-rt: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
