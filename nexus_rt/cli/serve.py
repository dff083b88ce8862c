"""`nexus-rt serve`: OpenAI's video routes over HTTP."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from nexus_rt.cli.arguments import PLAN_HELP, add_settings, models, running
from nexus_rt.cli.pipeline import call_settings, check_device, quiet_pipeline
from nexus_rt.core.errors import InputError
from nexus_rt.core.fields import fields_of
from nexus_rt.core.paths import as_path
from nexus_rt.pipeline.sources import ModelSources
from nexus_rt.serve.settings import MODEL, Settings

if TYPE_CHECKING:
    from nexus_rt.pipeline.pipeline import NexusPipeline

KEYS = "NEXUS_RT_API_KEY"
LISTENING = (
    "host",
    "port",
    "models",
    "max_connections",
    "max_connections_per_address",
    "trusted_proxies",
)


def add(commands: argparse._SubParsersAction) -> None:
    """The command's parser."""
    serve = commands.add_parser(
        "serve",
        parents=[models(), running()],
        help="serve videos over HTTP, as OpenAI's API does (pip install 'nexus-rt[serve]')",
    )
    known = fields_of(Settings)
    group = serve.add_argument_group("where it listens")
    add_settings(group, [known[n] for n in LISTENING], closed=True)
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=(
            "a client's key; may be given again. Other users of this machine see a command line:"
            f" {KEYS} (keys with commas between) or --api-key-file hide it"
        ),
    )
    group.add_argument("--api-key-file", metavar="FILE", help="a key a line")
    group = serve.add_argument_group("jobs")
    group.add_argument(
        "--store",
        default="nexus-rt-jobs",
        metavar="DIR",
        help="the folder of the queue and the clips (default: nexus-rt-jobs)",
    )
    group.add_argument(
        "--plan", metavar="PLAN", help=f"default plan for jobs without one: {PLAN_HELP}"
    )
    group.add_argument(
        "--rewrite",
        choices=("auto", "off"),
        help="what the large generator reads of jobs that do not say (default: the pair's)",
    )
    add_settings(group, [f for n, f in known.items() if n not in LISTENING], closed=True)
    group.add_argument(
        "--quota",
        default="10GB",
        metavar="SIZE",
        help="of all results, in equal shares of the API keys (default: 10GB)",
    )
    group.add_argument(
        "--max-size",
        default="1920x1088x129",
        metavar="WxHxF",
        help="the largest clip, by its pixels in all (default: 1920x1088x129)",
    )
    group.add_argument(
        "--lora-dir", metavar="DIR", help="where the LoRAs lie that jobs may name (default: none)"
    )
    group.add_argument(
        "--load-timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="seconds of loading and warming up (default: 1800)",
    )
    group.add_argument("--no-warmup", action="store_true", help="no clip before the first job")
    group = serve.add_argument_group("many machines (pip install 'nexus-rt[serve,ray]')")
    group.add_argument("--ray", action="store_true", help="run the models in Ray Serve replicas")
    group.add_argument(
        "--replicas",
        default="1",
        metavar="N|MIN-MAX",
        help="replicas, or between which numbers the queue's depth scales them (default: 1)",
    )


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The keys of the command line, the file and the environment.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    keys = list(args.api_key)
    keys += [k.strip() for k in os.environ.get(KEYS, "").split(",") if k.strip()]
    if args.api_key_file is not None:
        try:
            with open(args.api_key_file, encoding="utf-8") as file:
                lines = [line.strip() for line in file]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--api-key-file cannot be read ({error}); check the path.",
                code="not_found" if isinstance(error, FileNotFoundError) else "unreadable",
                param="--api-key-file",
            ) from error
        if not (own := [line for line in lines if line and not line.startswith("#")]):
            raise InputError(
                f"--api-key-file {args.api_key_file} holds no key; put one a line.",
                code="missing",
                param="--api-key-file",
            )
        keys += own
    return tuple(dict.fromkeys(keys))


def served_pipeline(args: argparse.Namespace) -> NexusPipeline:
    """The pipeline that the arguments name, their plan and rewriting its defaults; a function of
    its own, so that workers can be sent it.

    Raises:
        NexusError: the models cannot be loaded, or do not run the plan.
    """
    pipe = quiet_pipeline(args)
    pipe.defaults = pipe.defaults.replace(**call_settings(args).given)
    absent = [g for g in pipe.make_plan().generators if g not in pipe.engines]
    if absent:
        raise InputError(
            f"plan {pipe.defaults.plan!r} runs the {absent[0]} generator, which was not loaded;"
            f" pass --{absent[0]}, or another --plan.",
            code="missing",
            param="--plan",
        )
    return pipe


def run(args: argparse.Namespace) -> int:
    """Returns the exit code."""
    try:
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{error}: pip install 'nexus-rt[serve]'.", code="missing_package", param=error.name
        ) from error

    from nexus_rt.core.size import ClipSize
    from nexus_rt.pipeline.defaults import pair_defaults
    from nexus_rt.serve.logs import log_json
    from nexus_rt.serve.runners import ProcessRunner, Runner
    from nexus_rt.serve.server import NexusServer, run_server

    check_device(args.device)
    call = call_settings(args)
    args.plan, args.rewrite = call.plan, call.rewrite  # workers read no front
    if not args.engines:
        # what is missing is raised before anything is started
        pair_defaults(ModelSources.of(vars(args)).find()[1].stated)
    runner: Runner
    if args.ray:
        from nexus_rt.serve.ray_runner import RayRunner, parse_replicas

        low, high = parse_replicas(args.replicas)
        runner = RayRunner(
            served_pipeline,
            args,
            low,
            high,
            args.preview_every,
            not args.no_warmup,
            args.load_timeout,
        )
    else:
        runner = ProcessRunner(
            served_pipeline,
            args,
            args.preview_every,
            not args.no_warmup,
            args.log_level or "info",
            args.load_timeout,
        )
    options = {n: getattr(args, f.flag) for n, f in fields_of(Settings).items()}
    options["models"] = tuple(options["models"]) or (MODEL,)
    options["trusted_proxies"] = tuple(options["trusted_proxies"])
    server = NexusServer(
        runner,
        args.store,
        **options,
        api_keys=api_keys(args),
        max_size=ClipSize.parse(args.max_size),
        quota=args.quota,
        lora_folder=as_path("--lora-dir", args.lora_dir) if args.lora_dir else None,
    )
    log_json(args.log_level or "info", unhurried=True)
    print(f"nexus-rt: http://{args.host}:{args.port} (store {args.store})", file=sys.stderr)
    run_server(server)
    return 0
