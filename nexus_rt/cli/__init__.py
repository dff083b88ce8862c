"""The command line, a file a command: its parser beside what it runs."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from nexus_rt import __version__
from nexus_rt.cli import (
    batch,
    bench,
    convert,
    decode,
    doctor,
    engines,
    export,
    generate,
    plan,
    serve,
    tune,
    vrbench,
)
from nexus_rt.cli.arguments import real_number, whole_number
from nexus_rt.cli.options import check_options
from nexus_rt.cli.streams import console
from nexus_rt.core.errors import InputError, NexusError, is_text, shown
from nexus_rt.core.log import LEVELS, show
from nexus_rt.core.paths import failed_file

COMMANDS = {
    "generate": generate,
    "batch": batch,
    "vrbench": vrbench,
    "decode": decode,
    "plan": plan,
    "tune": tune,
    "serve": serve,
    "export": export,
    "engines": engines,
    "convert": convert,
    "bench": bench,
    "doctor": doctor,
}


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="nexus-rt",
        description="Video generation with two generators in one latent space.",
        epilog=(
            "Without --small, --large or --pair the miniature pair that comes with the package"
            " runs, offline."
        ),
    )
    top.add_argument("--version", action="version", version=f"nexus-rt {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add(commands)
    for leaf in _leaves(top):
        leaf.register("type", int, whole_number)
        leaf.register("type", float, real_number)
        leaf.add_argument(
            "--log-level",
            choices=LEVELS,
            help="what to log: info says what every 'auto' chose, and why",
        )
    return top


def _leaves(of: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers of commands and actions that have none below them."""
    below = [a for a in of._actions if isinstance(a, argparse._SubParsersAction)]
    return (
        [leaf for a in below for inner in a.choices.values() for leaf in _leaves(inner)]
        if below
        else [of]
    )


def _no_text(word: str) -> str:
    """Why an argument is refused that clips' metadata, engines' manifests and logs cannot hold."""
    return (
        f"the argument {shown(word)} is no text in the encoding of this system"
        f" ({sys.getfilesystemencoding()}), or holds NUL; expected UTF-8: rename the file, or set"
        " the locale to the terminal's."
    )


OUT_OF_MEMORY = (
    "memory ran out; pass --vram, a smaller --size or fewer --frames, or --quantize, and see"
    " `nexus-rt plan` for what a call holds."
)


def _of_device_memory(error: RuntimeError) -> bool:
    """Whether a device's memory ran out; torch is imported wherever that can be."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _ended(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for a failure, 2 for wrong arguments, 130 when
    interrupted."""
    with console(own=argv is None):
        return _main(list(sys.argv[1:] if argv is None else argv), own=argv is None)


def _main(words: list[str], own: bool) -> int:
    if odd := [word for word in words if not is_text(word) or "\0" in word]:
        print(f"nexus-rt: {InputError(_no_text(odd[0]))}", file=sys.stderr)
        return 2
    known = parser()
    args = known.parse_args(words)
    args.line = shlex.join(["nexus-rt", *words])  # engines remember what made them
    # the command's own process, not a program that calls us: what is half-made is taken away
    if own:
        signal.signal(signal.SIGTERM, _ended)
    if args.log_level:
        show(args.log_level)
    try:
        check_options(known, words, args)
        code = COMMANDS[args.command].run(args)
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
    except OSError as error:  # a disk that is full or read-only, a file that is not to be read
        what = error.filename if isinstance(error.filename, (str, os.PathLike)) else "a file"
        print(f"nexus-rt: {NexusError(failed_file(str(what), error))}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"nexus-rt: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not _of_device_memory(error):
            raise
        print(f"nexus-rt: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1


def entry() -> NoReturn:
    """The command's own process: as `main`, and then it ends.

    What is registered for the end runs, output is flushed, and the interpreter is not taken apart:
    with PyTorch in it that takes a third of a second, in which nothing is done.
    """
    code = main()
    # as the interpreter does: first the threads that are not daemons, then what atexit holds
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, which `main` has reported
            stream.flush()
    os._exit(code)
