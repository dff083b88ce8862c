"""Which options go together: a table, checked before a command begins, so that nothing asked for is
dropped in silence."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass

from nexus_rt.core.errors import InputError
from nexus_rt.core.fields import fields_of
from nexus_rt.engines.backends import ENGINE_BACKENDS
from nexus_rt.pipeline.sources import ModelSources

MODELS = tuple(
    field.flag
    for name, field in fields_of(ModelSources).items()
    if name not in ("device", "local_files_only")
)
EVERYWHERE = ("command", "log_level")  # of every command
RUNS = ("generate", "batch", "decode", "plan", "tune", "vrbench", "serve")


@dataclass(frozen=True)
class Rule:
    """Of some commands: `option`, where it is given (and has `value`), goes without `others`, or
    needs `needs` first; or it stands `alone`, without any other.

    why: what is wrong, and what to do.
    """

    commands: tuple[str, ...]
    option: str
    why: str
    others: tuple[str, ...] = ()
    needs: str = ""
    value: str | None = None
    alone: bool = False

    def broken(self, command: str, args: argparse.Namespace, given: set[str]) -> str | None:
        """The offending option, or None."""
        if command not in self.commands or self.option not in given:
            return None
        if self.value is not None and getattr(args, self.option) != self.value:
            return None
        if self.needs:
            return None if self.needs in given else self.option
        others = sorted(given - {self.option, *EVERYWHERE}) if self.alone else self.others
        return next((o for o in others if o in given), None)


def _backend(option: str, *backends: str) -> tuple[Rule, ...]:
    why = f"is of --backend {' and '.join(backends)} alone"
    return tuple(
        Rule(("export",), "backend", why, (option,), value=b)
        for b in ENGINE_BACKENDS
        if b not in backends
    )


TABLE = (
    Rule(
        (*RUNS, "bench", "export"),
        "quantize",
        "keeps weights as they are stored, and --quantize quantises them; leave one of the two out",
        ("weights",),
    ),
    *(
        Rule(
            ("export",),
            option,
            "is of PyTorch's models; engines have --precision (int8 with --backend onnx): leave it"
            " out",
            (option,),
        )
        for option in ("weights", "quantize")
    ),
    Rule(
        RUNS,
        "engines",
        "is of PyTorch's models, and --engines names finished ones: what they are made of was said"
        " when they were exported; leave one of the two out",
        (*MODELS, "backend", "attention"),
    ),
    Rule(
        RUNS,
        "force",
        "goes with --engines: it loads an engine that failed its parity gate",
        needs="engines",
    ),
    Rule(
        ("batch", "vrbench"),
        "workers",
        "goes with --ray; without it, start a process a --shard",
        needs="ray",
    ),
    Rule(("serve",), "replicas", "goes with --ray", needs="ray"),
    Rule(
        ("plan",),
        "costs",
        "measures nothing where --costs gives the prices; leave it out",
        ("kernels", "attention", "backend", "dtype", "cuda_graphs"),
    ),
    Rule(
        ("generate", "batch", "plan", "vrbench"),
        "as_published",
        "is not as published; leave it or --as-published out",
        ("energy", "split", "lowpass"),
    ),
    Rule(
        ("generate", "batch", "vrbench"),
        "rewriter",
        "says who rewrites, and --rewrite what is read; leave one of the two out",
        ("rewrite",),
    ),
    Rule(
        ("generate", "batch", "vrbench"),
        "rewriter_model",
        "goes with --rewriter URL",
        needs="rewriter",
    ),
    *(
        Rule(("tune",), "judge", "is of --judge vlm", ("judge_url", "judge_model"), value=judge)
        for judge in ("pixels", "latents", "statistics")
    ),
    Rule(("tune",), "judge_url", "goes with --judge vlm", needs="judge"),
    Rule(("tune",), "judge_model", "goes with --judge vlm", needs="judge"),
    *_backend("sm", "tensorrt-rtx"),
    *_backend("opset", "onnx", "tensorrt", "tensorrt-rtx"),
    *_backend("weight_streaming", "tensorrt", "tensorrt-rtx"),
    *_backend("refit", "tensorrt", "tensorrt-rtx"),
    Rule(
        ("bench",),
        "action",
        "is of a measurement, and `bench compare` compares two files; leave it out",
        alone=True,
    ),
    Rule(
        ("bench",),
        "estimate",
        "goes with an estimate, and --estimate never makes none",
        ("tflops",),
        value="never",
    ),
)


def options_of(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """The destinations that a command line sets itself, defaults left out."""
    quiet = copy.deepcopy(parser)
    todo = [quiet]
    while todo:
        for action in todo.pop()._actions:
            action.default = argparse.SUPPRESS
            if isinstance(action, argparse._SubParsersAction):
                todo += list({id(p): p for p in action.choices.values()}.values())
    values = vars(quiet.parse_args(argv))
    return {name for name, value in values.items() if value not in ([], None)}


def check_options(
    parser: argparse.ArgumentParser, argv: Sequence[str], args: argparse.Namespace
) -> None:
    """Hold a command line against the table.

    Raises:
        InputError: names the option that does not go with the others.
    """
    given = options_of(parser, argv)
    for rule in TABLE:
        if rule.option == "backend" and args.command == "export":
            given_or_default = given | {"backend"}
        else:
            given_or_default = given
        if (odd := rule.broken(args.command, args, given_or_default)) is not None:
            option = f"--{odd.replace('_', '-')}"
            raise InputError(f"{option} {rule.why}.", code="conflict", param=option)
