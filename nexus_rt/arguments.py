"""The command line's arguments: what each command takes, and what it says of it."""

from __future__ import annotations

import argparse

from nexus_rt import __version__

PLAN_HELP = (
    "reference | small | large | handoff=AT[,bridge=K] | auto[=TOLERANCE] | segments such as "
    "'small:10 bridge:5 large:15@1'. AT is a fraction of the steps below 1, a timestep from 1 up, or sigma:0.9; "
    "segments take steps, percentages (30%%) or * for the rest, and a guidance scale of their own after @"
)
DTYPES = ("float32", "bfloat16", "float16")
BLEND_NUMBERS = {  # of BlendConfig
    "gamma_hf": "the small generator's share of high frequencies (default: 0.7)",
    "sigma_min": "of gaussian: the filter's width in latent cells at w = 0 (default: 0.35)",
    "sigma_max": "of gaussian: the filter's width in latent cells at w = 1 (default: 0.7)",
    "rho_min": "of fft and dct: the cutoff at w = 0, as a fraction of Nyquist (default: 0.1)",
    "rho_max": "of fft and dct: the cutoff at w = 1, as a fraction of Nyquist (default: 0.9)",
    "order": "of butterworth: its order (default: 2)",
}
SEED_HELP = "0 to 2^64 - 1; the same seed gives the same video, -1 draws a fresh one and prints it (default: 0)"
FPS_HELP = "frames per second of the file, such as 16, 23.976 or 30000/1001 (default: 16)"


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 832x480") from None
    return width, height


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="nexus-rt", description="Video generation with two generators in one latent space.",
        epilog="Without --small, --large or --pair the miniature pair that comes with the package runs, offline.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"nexus-rt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
    group.add_argument(
        "--as-published", action="store_true",
        help="the published scripts' defaults and numerics: plan reference, 50 steps, shift 5, guidance 6 (their s = 5)",
    )  # fmt: skip
    group.add_argument("--split", help="gaussian (the paper's) | fft | dct (default: gaussian)")
    group.add_argument("--lowpass", help="of fft and dct: gaussian | butterworth | ideal (default: gaussian)")
    for name, words in BLEND_NUMBERS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int if name == "order" else float, help=words)
    group.add_argument("--gamma-w", type=float, help="exponent of the gate, of reference and auto (default: 0.3)")
    group.add_argument("--energy", help="reference | progressive | none (default: the plan's own)")
    group.add_argument("--solver", help="unipc | euler (default: unipc)")
    group.add_argument("--size", type=_size, metavar="WxH", help="frame size, such as 832x480 (default: the pair's)")
    group.add_argument("--frames", type=int, metavar="N", help="4k+1 frames (default: the pair's; Wan: 81)")

    generate = commands.add_parser("generate", parents=[models, running, walk], help="turn a prompt into a video")
    generate.add_argument("prompt", help="what to show, such as 'a striped red circle moves left on a black background'")
    generate.add_argument("-o", "--output", default="out.mp4", metavar="FILE", help=".mp4, .gif or .png (a contact sheet)")
    generate.add_argument("--negative", default="", metavar="PROMPT", help="what not to show")
    generate.add_argument("--seed", type=int, default=0, help=SEED_HELP)
    generate.add_argument("--fps", default="16", help=FPS_HELP)
    generate.add_argument("--quiet", action="store_true", help="no progress bar")

    many = argparse.ArgumentParser(add_help=False)
    many.add_argument("prompts", metavar="LIST", help="a prompt a line (.txt), .json, .jsonl, or VR-Bench's files")
    group = many.add_argument_group("the folder of clips")
    group.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="for the clips and results.jsonl; goes on where it was"
    )
    group.add_argument("--seed", type=int, default=0, help="of every clip whose entry names none; " + SEED_HELP)
    group.add_argument("--fps", default="16", help=FPS_HELP)
    group.add_argument("--format", default="mp4", help="mp4 (default) | gif | png (contact sheets)")
    group.add_argument("--shard", default="1/1", metavar="I/N", help="this process's part of the list, such as 1/4")
    group.add_argument("--ray", action="store_true", help="share the list among Ray workers (pip install 'nexus-rt[ray]')")
    group.add_argument("--workers", type=int, metavar="N", help="of --ray: how many (default: one a GPU, or one)")
    commands.add_parser("batch", parents=[models, running, walk, many], help="turn a list of prompts into a folder of videos")

    vrbench = commands.add_parser("vrbench", help="VR-Bench: make the clips of its prompts, judge them, report the scores")
    actions = vrbench.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser(
        "generate", parents=[models, running, walk, many], help="make the clips: as batch, of VR-Bench's prompt files"
    )
    judge = actions.add_parser("judge", help="ask a vision-language model every clip's questions; goes on where it was")
    judge.add_argument("prompts", metavar="PROMPTS", help='VR-Bench\'s file or folder of files, or "example"')
    judge.add_argument("clips", metavar="DIR", help="holds a clip for every prompt's id, as generate makes them")
    judge.add_argument("--judge-url", metavar="URL", help="an OpenAI-compatible server, such as http://localhost:8000/v1")
    judge.add_argument(
        "--judge-model", metavar="MODEL", help="what the server calls it; without a URL, a folder such as Qwen3-VL's"
    )
    judge.add_argument("--requests", type=int, default=4, metavar="N", help="clips asked about at a time (default: 4)")
    judge.add_argument(
        "--protocol", default="strict",
        help="strict (default): unread answers are in no mean | published: lenient as the paper, unread ones count as not Yes",
    )  # fmt: skip
    judge.add_argument("--frames", type=int, default=16, metavar="N", help="frames of a clip that the judge sees (default: 16)")
    judge.add_argument(
        "--picture-size", type=int, metavar="N",
        help="longest side of a frame in pixels (default: what keeps a request below 4 MB)",
    )  # fmt: skip
    judge.add_argument("--max-tokens", type=int, metavar="N", help="of a reply (default: 1024)")
    judge.add_argument("--temperature", type=float, default=0.0, help="of a reply (default: 0)")
    judge.add_argument(
        "--retry-unknown", action=argparse.BooleanOptionalAction, default=True,
        help="ask again about clips with answers that could not be read in the run before (default: yes)",
    )  # fmt: skip
    judge.add_argument("--device", help="of a judge that runs here (default: cuda where there is one)")
    judge.add_argument("--dtype", choices=DTYPES, help="of a judge that runs here")
    report = actions.add_parser("report", help="tables of judged folders, the first of them compared with the others")
    report.add_argument("runs", nargs="+", metavar="DIR", help="folders that were judged, or their judgment.json")
    report.add_argument("--markdown", metavar="FILE", help="the tables that are printed")
    report.add_argument("--json", metavar="FILE", help="everything")
    report.add_argument("--html", metavar="FILE", help="one self-contained page with frames, answers and reasons")
    for command in (judge, report):
        command.add_argument("--taxonomy", metavar="FILE", help="categories, layers and groups of your own (JSON)")

    decode = commands.add_parser("decode", parents=[models, running], help="decode latents that a failed decoding left behind")
    decode.add_argument("latents", metavar="LATENTS", help="the safetensors file that the error named")
    decode.add_argument("-o", "--output", default="out.mp4", metavar="FILE", help=".mp4, .gif or .png (a contact sheet)")
    decode.add_argument("--fps", default="16", help=FPS_HELP)

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

    bench = commands.add_parser(
        "bench", parents=[models], help="latency, memory and quality of plans and engines; compare runs"
    )
    bench.add_argument("action", nargs="*", metavar="compare A.json B.json", help="print what changed; 1 where it is worse")
    group = bench.add_argument_group("what is measured")
    group.add_argument(
        "--preset", default="mini", help="mini (default) | wan-480p | wan-720p; random weights where none are given"
    )
    group.add_argument("--plans", metavar="A,B,...", help="plans (default: reference, the pair's own, auto=0.02)")
    group.add_argument(
        "--engines", default="torch", metavar="A,B,...", help="torch | compiled | onnx | aoti | tensorrt | tensorrt-rtx"
    )
    group.add_argument("--parts", metavar="A,B,...", help="of exported engines: small, large, vae, text_encoder (default: all)")
    group.add_argument(
        "--vs", metavar="A,B,...",
        help="peers in the same run: diffusers | switch (each with +compile) | naive | naive-ours | all",
    )  # fmt: skip
    group.add_argument("--scaling", action="store_true", help="also latency against frames, size, batch and steps")
    group.add_argument("--prompt", help="what the clip shows (default: a riddle of the mini pair)")
    group.add_argument("--size", type=_size, metavar="WxH", help="frame size (default: the preset's)")
    group.add_argument("--frames", type=int, metavar="N", help="4k+1 frames (default: the preset's)")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the pair's)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--runs", type=int, default=5, help="counted runs of each row (default: 5)")
    group.add_argument("--warmup", type=int, default=2, help="runs before those (default: 2)")
    group.add_argument(
        "--accuracy", type=int, default=12, metavar="N", help="riddles a row of the mini pair is scored with (12)"
    )
    group.add_argument("--kernels", default="auto", help="torch | triton | auto (default)")
    group.add_argument("--attention", default="auto", help="as in generate")
    group.add_argument("--dtype", choices=DTYPES, help="of the generators (default: bfloat16 on a GPU, float32 on a CPU)")
    group.add_argument("--estimate", default="auto", help="count on the meta device: auto (what does not fit) | never | always")
    group.add_argument("--tflops", type=float, help="of an estimate: the rate to divide by (default: this machine's)")
    group = bench.add_argument_group("where it goes")
    group.add_argument("--json", metavar="FILE", help="everything, for `bench compare`")
    group.add_argument("--html", metavar="FILE", help="one self-contained page")
    group.add_argument("--plot", metavar="FILE.svg", help="timeline and speed against quality")
    group.add_argument("--trace", metavar="DIR", help="a trace of each row's last run, for Perfetto or chrome://tracing")

    commands.add_parser("doctor", help="versions, devices, which backends work here and why others do not")
    return top
