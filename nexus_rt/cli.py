"""The command line: `nexus-rt generate | decode | plan | export | engines | convert | doctor`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from nexus_rt import __version__
from nexus_rt.errors import InputError, NexusError, choose

PLAN_HELP = (
    "reference | small | large | handoff=AT[,bridge=K] | auto[=TOLERANCE] | segments such as "
    "'small:10 bridge:5 large:15@1'. AT is a fraction of the steps below 1, a timestep from 1 up, or sigma:0.9; "
    "segments take steps, percentages (30%%) or * for the rest, and a guidance scale of their own after @"
)
DTYPES = ("float32", "bfloat16", "float16")


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 832x480") from None
    return width, height


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nexus-rt", description="Video generation with two generators in one latent space.",
        epilog="Without --small, --large or --pair the miniature pair that comes with the package runs, offline.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"nexus-rt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    models = argparse.ArgumentParser(add_help=False)
    group = models.add_argument_group("models (folders in diffusers' or Wan's layout, or hub ids)")
    group.add_argument("--pair", metavar="DIR", help="a folder that holds small/, large/, vae/, text_encoder/, tokenizer/")
    group.add_argument("--small", metavar="DIR", help="the small generator, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    group.add_argument("--large", metavar="DIR", help="the large generator, such as Wan-AI/Wan2.1-T2V-14B-Diffusers")
    group.add_argument("--vae", metavar="DIR", help="the VAE (default: that of --large, else of --small)")
    group.add_argument("--text-encoder", metavar="DIR", help="holds text_encoder/ and tokenizer/ (default: as --vae)")
    group.add_argument("--understanding", metavar="DIR", help="the language model that steers the small generator")
    group.add_argument("--connector", metavar="DIR", help="between the two (both: `nexus-rt convert omnivideo` makes them)")
    for name in ("small", "large"):
        group.add_argument(
            f"--{name}-lora", metavar="FILE[@SCALE]", action="append", default=[],
            help=f"a LoRA to merge into the {name} generator; may be given again",
        )  # fmt: skip
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--local-files-only", action="store_true", help="never ask the hub")

    running = argparse.ArgumentParser(add_help=False)
    group = running.add_argument_group("what runs them")
    group.add_argument("--engines", metavar="DIR", help="exported engines (`nexus-rt export`) instead of models")
    group.add_argument("--force", action="store_true", help="with --engines: load one that failed its parity gate")
    group.add_argument("--vram", metavar="SIZE", help="a memory budget such as 24GB: weights come and go to keep within it")
    group.add_argument("--cuda-graphs", action="store_true", help="record each generator's step once and replay it")
    group.add_argument("--backend", default="torch", help="what runs the models: torch (default)")
    group.add_argument("--kernels", default="auto", help="blend, solver, norms and RoPE by torch | triton | auto (default)")
    group.add_argument(
        "--attention",
        default="auto",
        help="auto (default) | auto-fp8 | sdpa | flash | cudnn | math | triton | triton-fp8 | fa3 | sage",
    )
    group.add_argument("--dtype", choices=DTYPES, help="of the generators (default: bfloat16 on a GPU, float32 on a CPU)")

    walk = argparse.ArgumentParser(add_help=False)
    group = walk.add_argument_group("what runs when")
    group.add_argument("--plan", metavar="PLAN", help=PLAN_HELP)
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 50)")
    group.add_argument("--shift", type=float, help="of the time grid (default: 5.0; 3.0 for small frames)")
    group.add_argument("--guidance", type=float, metavar="G", help="v_u + G (v_c - v_u); 1 is none (default: 6.0)")
    group.add_argument("--guidance-2", type=float, metavar="G", help="of the large generator, where it differs")
    group.add_argument("--split", default="gaussian", help="gaussian (the paper's) | fft | dct (default: gaussian)")
    group.add_argument("--lowpass", default="gaussian", help="of fft and dct: gaussian | butterworth | ideal")
    group.add_argument("--energy", help="reference | progressive | none (default: the plan's own)")
    group.add_argument("--solver", default="unipc", help="unipc | euler (default: unipc)")
    group.add_argument("--size", type=_size, metavar="WxH", help="frame size, such as 832x480 (default: the pair's)")
    group.add_argument("--frames", type=int, metavar="N", help="4k+1 frames (default: the pair's; Wan: 81)")

    generate = commands.add_parser("generate", parents=[models, running, walk], help="turn a prompt into a video")
    generate.add_argument("prompt", help="what to show, such as 'a striped red circle moves left on a black background'")
    generate.add_argument("-o", "--output", default="out.mp4", metavar="FILE", help=".mp4, .gif or .png (a contact sheet)")
    generate.add_argument("--negative", default="", metavar="PROMPT", help="what not to show")
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same video (default: 0)")
    generate.add_argument("--fps", type=int, default=16, help="frames per second of the file (default: 16)")
    generate.add_argument("--quiet", action="store_true", help="no progress bar")

    decode = commands.add_parser("decode", parents=[models, running], help="decode latents that a failed decoding left behind")
    decode.add_argument("latents", metavar="LATENTS", help="the safetensors file that the error named")
    decode.add_argument("-o", "--output", default="out.mp4", metavar="FILE", help=".mp4, .gif or .png (a contact sheet)")
    decode.add_argument("--fps", type=int, default=16, help="frames per second of the file (default: 16)")

    plan = commands.add_parser(
        "plan", parents=[models, running, walk], help="print which generator runs at which step, and its price"
    )
    plan.add_argument(
        "--costs", metavar="SMALL,LARGE",
        help="milliseconds of one guided step of each, instead of measuring the models on this machine",
    )  # fmt: skip

    export = commands.add_parser("export", parents=[models], help="make engines of a pair's parts, compared before they count")
    export.add_argument("--backend", default="onnx", help="onnx (default) | aoti | tensorrt | tensorrt-rtx")
    export.add_argument("--precision", default=None, help="fp32 | fp16 | bf16 (default: bf16 on a GPU, fp32 on a CPU)")
    export.add_argument("--parts", metavar="A,B,...", help="of small, large, vae, text_encoder (default: small,large)")
    export.add_argument("--fuse-step", action="store_true", help="also both generators, guidance and blend in one graph")
    export.add_argument(
        "--sizes",
        metavar="WxHxF,...",
        help="such as 832x480x81,1280x720x81, or a range 256x256x17..832x480x81 (default: the pair's)",
    )
    export.add_argument("--opset", type=int, default=23, help="of onnx: 23 (default), or 20 for consumers that need it")
    export.add_argument("--sm", metavar="X.Y", help="compute capability to build for, of tensorrt-rtx (default: all it knows)")
    export.add_argument("--weight-streaming", action="store_true", help="of the TensorRTs: weights may stay in host memory")
    export.add_argument("--refit", action="store_true", help="of the TensorRTs: weights may be replaced in the engine")
    export.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder for `generate --engines DIR`")

    engines = commands.add_parser("engines", help="the engines in the cache: list, verify, prune")
    engines.add_argument("action", help="list | verify | prune")
    engines.add_argument("folders", nargs="*", metavar="DIR", help="of verify: engine folders instead of the cache's")

    convert = commands.add_parser("convert", help="make a pair's folder of a published checkpoint; reads pickles safely")
    convert.add_argument("kind", help="what SRC is: omnivideo")
    convert.add_argument("source", metavar="SRC", help="the published folder")
    convert.add_argument("target", metavar="DST", help="the folder to make; it appears only when complete")

    commands.add_parser("doctor", help="versions, devices, which backends work here and why others do not")
    return parser


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
    from nexus_rt.solver import SOLVERS
    from nexus_rt.video import check_output, save_video

    output = check_output(args.output)  # before any model is read
    choose("solver", args.solver, SOLVERS)
    blend = _blend(args)
    if not args.prompt.strip():
        raise InputError("the prompt is empty; say what the video should show.")
    if args.fps < 1:
        raise InputError(f"--fps is {args.fps}; expected at least 1.")
    _check_device(args.device)
    import torch

    pipe = _pipeline(args)
    pipe.set_progress_bar_config(disable=args.quiet or None)
    width, height = args.size or (None, None)
    latents = pipe(
        args.prompt, args.negative, height, width, args.frames, args.steps, args.guidance, args.guidance_2,
        generator=torch.Generator("cpu").manual_seed(args.seed), output_type="latent",
        plan=args.plan, shift=args.shift, blend=blend, energy=args.energy, solver=args.solver,
    )  # fmt: skip
    frames = pipe.decode(latents.frames, "np", rescue=output.parent)
    save_video(frames[0], output, args.fps)
    if not args.quiet:
        print(f"{output}: {frames.shape[1]} frames of {frames.shape[3]}x{frames.shape[2]}, plan {latents.plan.name}")
    return 0


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
    from nexus_rt.costs import measure_step_costs

    d = pipe.defaults
    width, height = args.size or (d.width, d.height)
    frames = args.frames or d.num_frames
    pipe.check_inputs(height, width, frames, "latent")
    prompts = pipe.encode("a prompt", single_frame=frames == 1)
    latents = pipe.prepare_latents(1, frames, height, width)
    return measure_step_costs(pipe.engines, prompts, latents, blend, args.solver, kernels=pipe.kernels)


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


def engines(args: argparse.Namespace) -> int:
    from nexus_rt.engines.command import run

    return run(args.action, args.folders)


def doctor(args: argparse.Namespace) -> int:
    from nexus_rt.doctor import report

    print(report())
    return 0


COMMANDS = {
    "generate": generate, "decode": decode, "plan": plan, "export": export, "engines": engines, "convert": convert,
    "doctor": doctor,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for a failure, 2 for wrong arguments, 130 when interrupted."""
    args = _parser().parse_args(argv)
    args.line = shlex.join(["nexus-rt", *(sys.argv[1:] if argv is None else argv)])  # engines remember what made them
    try:
        code = COMMANDS[args.command](args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        kept = "what was finished is kept, and the same command goes on" if args.command == "export" else "nothing was written"
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
