"""The command line: `nexus-rt generate | batch | vrbench | decode | plan | export | engines | convert | bench | doctor`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from nexus_rt.arguments import parser
from nexus_rt.errors import InputError, NexusError, choose


def _pipeline(args: argparse.Namespace):
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar, of the denoising steps

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
    from nexus_rt.upfb import BlendConfig

    return BlendConfig(split=args.split, lowpass=args.lowpass)


def _call_options(args: argparse.Namespace) -> dict:
    """What the arguments say of every clip, as the pipeline's call takes it; checked before any model is read."""
    from nexus_rt.solver import SOLVERS

    choose("solver", args.solver, SOLVERS)
    if args.fps < 1:
        raise InputError(f"--fps is {args.fps}; expected at least 1.")
    width, height = args.size or (None, None)
    return dict(
        height=height, width=width, num_frames=args.frames, num_inference_steps=args.steps, guidance_scale=args.guidance,
        guidance_scale_2=args.guidance_2, plan=args.plan, shift=args.shift, blend=_blend(args), energy=args.energy,
        solver=args.solver,
    )  # fmt: skip


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
    from nexus_rt.video import check_output, save_video

    output = check_output(args.output)  # before any model is read
    options = _call_options(args)
    if not args.prompt.strip():
        raise InputError("the prompt is empty; say what the video should show.")
    _check_device(args.device)
    import torch

    pipe = _pipeline(args)
    pipe.set_progress_bar_config(disable=args.quiet or None)
    seed = torch.Generator("cpu").manual_seed(args.seed)
    latents = pipe(args.prompt, args.negative, generator=seed, output_type="latent", **options)
    frames = pipe.decode(latents.frames, "np", rescue=output.parent)
    save_video(frames[0], output, args.fps)
    if not args.quiet:
        print(f"{output}: {frames.shape[1]} frames of {frames.shape[3]}x{frames.shape[2]}, plan {latents.plan.name}")
    return 0


MODEL_ARGUMENTS = ("engines", "pair", "small", "large", "vae", "text_encoder", "understanding", "connector", "small_lora",
                   "large_lora")  # fmt: skip


def batch(args: argparse.Namespace) -> int:
    from nexus_rt.prompts import read_prompts

    return _batch(args, read_prompts(args.prompts))


def _batch(args: argparse.Namespace, items: list) -> int:
    from pathlib import Path

    from nexus_rt.batch import Job, parse_shard, run

    options = _call_options(args)
    models = " ".join(f"{n}={said}" for n in MODEL_ARGUMENTS if (said := getattr(args, n)))
    folder = Path(args.output).expanduser()
    job = Job(folder, args.seed, args.fps, f".{args.format.lstrip('.')}", parse_shard(args.shard), options, models)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    if args.ray:
        from nexus_rt.batch_ray import run_on_ray

        counts = run_on_ray(_quiet_pipeline, args, items, job, args.workers, say)
    else:
        if args.workers is not None:
            raise InputError("--workers is for --ray; without it, start a process a --shard.")
        _check_device(args.device)
        counts = run(_quiet_pipeline(args), items, job, say)
    print(f"{folder}: {counts['made']} made, {counts['kept']} kept, {counts['failed']} failed")
    return 1 if counts["failed"] else 0


def _quiet_pipeline(args: argparse.Namespace):
    pipe = _pipeline(args)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vrbench(args: argparse.Namespace) -> int:
    from transformers.utils import logging

    from nexus_rt.bench.vrbench import command

    logging.disable_progress_bar()
    if args.action == "generate":
        return _batch(args, command.items(args.prompts))
    return {"judge": command.judge, "report": command.report}[args.action](args)


def decode(args: argparse.Namespace) -> int:
    from nexus_rt.models.vae import read_latents
    from nexus_rt.video import check_output, save_video

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

    from nexus_rt.engines.exported import Bucket
    from nexus_rt.loading import Loaded
    from nexus_rt.pair import Defaults
    from nexus_rt.pipeline import NexusPipeline
    from nexus_rt.plan import parse_plan
    from nexus_rt.solver import SOLVERS

    choose("solver", args.solver, SOLVERS)
    blend = _blend(args)
    _check_device(args.device)
    real = args.pair or args.small or args.large or args.engines
    nothing = Loaded({}, None, None, None, None, Defaults(), (16, (1, 2, 2)))
    pipe = NexusPipeline(nothing, torch.device("cpu")) if args.costs and real is None else _pipeline(args)
    chosen = pipe.make_plan(args.plan, args.steps, args.shift, args.energy)
    memory = None
    if pipe.engines:  # a budget that cannot be met is said before anything is measured
        width, height = args.size or (pipe.defaults.width, pipe.defaults.height)
        memory = pipe.plan_residency(chosen, Bucket(width, height, args.frames or pipe.defaults.num_frames))
    costs = _step_costs(args, pipe, blend)
    guidance = pipe.defaults.guidance_scale if args.guidance is None else args.guidance
    second = pipe.defaults.guidance_scale_2 if args.guidance is None and args.guidance_2 is None else args.guidance_2
    scales = (guidance, guidance if second is None else second)
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
    from transformers.utils import logging

    from nexus_rt.bench.command import run

    logging.disable_progress_bar()
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for a failure, 2 for wrong arguments, 130 when interrupted."""
    args = parser().parse_args(argv)
    args.line = shlex.join(["nexus-rt", *(sys.argv[1:] if argv is None else argv)])  # engines remember what made them
    try:
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
