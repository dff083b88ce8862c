"""The options in the text of a plan, the schedule among them, and how numbers are written there.

A plan's text is what runs, `handoff=0.3,bridge=5` or segments, then options as `key=value` in the
order of `OPTIONS`, then the schedule as in `SCHEDULE`. What a number's word says is the number
itself, so a text and its plan are the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

from nexus_rt.core.errors import InputError, shorten, shown
from nexus_rt.core.limits import MAX_STEPS, TRAIN_STEPS
from nexus_rt.method.time_grid import TimeGrid, check_levels, time_grid

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?"
AMOUNT = r"[0-9]+(?:\.[0-9]+)?%|[0-9]+"
RENOISE = "renoise="
MAX_TEXT = 100_000  # characters of a plan
# of all steps, in the order in which they are written and applied
OPTIONS = (
    "gamma-w",
    "energy",
    "small-solver",
    "large-solver",
    "solver",
    "small-boundary",
    "large-boundary",
)
SCHEDULE = ("steps", "shift", "timesteps", "sigmas")
KEYS = OPTIONS + SCHEDULE
FLOAT64 = "float64"  # timesteps of the sigmas before they are rounded (`time_grid`)


def exact(value: float) -> str:
    """The shortest decimal that reads as this float64: "0.3", "5", "1e-05"."""
    return repr(float(value)).removesuffix(".0")


def real(text: str, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite decimal number within low..high.

    Raises:
        InputError: another text, or a number outside.
    """
    value = float(text) if re.fullmatch(NUMBER, text) else math.nan
    if not math.isfinite(value):
        raise InputError(
            f"{what} is {shown(text)}; expected a number.", code="invalid_type", param=what
        )
    if not low <= value <= high:
        raise InputError(
            f"{what} is {shorten(text, 80)}; expected a number from {low:g} to {high:g}.",
            code="out_of_range",
            param=what,
        )
    return value


def whole(text: str, what: str, low: int = 1) -> int:
    """A whole number from low to `MAX_STEPS`.

    Raises:
        InputError: another text, or a number outside.
    """
    if not re.fullmatch(r"0*[0-9]{1,6}", text) or not low <= int(text[-6:]) <= MAX_STEPS:
        raise InputError(
            f"{what} is {shown(text)}; expected a whole number from {low} to {MAX_STEPS}.",
            code="out_of_range" if re.fullmatch(r"[0-9]+", text) else "invalid_type",
            param=what,
        )
    return int(text[-6:])


def split_words(spec: str) -> tuple[str, dict[str, str]]:
    """What a text says of generators, and its options by name.

    Raises:
        InputError: it is too long, an option is there twice, or generators stand after options.
    """
    if len(spec) > MAX_TEXT:
        raise InputError(
            f"the plan has {len(spec)} characters; expected at most {MAX_TEXT}: plan"
            f" {shorten(spec, 80)!r}.",
            code="too_large",
            param="plan",
        )
    base: list[str] = []
    options: dict[str, str] = {}
    for word in spec.split():
        key, equals, value = word.partition("=")
        if equals and key in KEYS:
            if key in options:
                raise InputError(
                    f"plan {shorten(spec, 80)!r} sets {key} twice.", code="duplicate", param=key
                )
            options[key] = value
        elif options:
            raise InputError(
                f"{shown(word)} stands after {next(reversed(options))}= in plan"
                f" {shorten(spec, 80)!r}; expected what runs first, and options of the plan"
                f" ({', '.join(KEYS)}) last.",
                param="plan",
            )
        else:
            base.append(word)
    return " ".join(base), options


def joined(base: str, options: Mapping[str, str]) -> str:
    """The text of `split_words`, options in their order."""
    return " ".join([base, *(f"{key}={options[key]}" for key in KEYS if key in options)])


def with_options(name: str, options: Mapping[str, str | None]) -> str:
    """A plan's name with other options; None leaves one out."""
    base, known = split_words(name)
    merged: dict[str, str | None] = {**known, **options}
    return joined(base, {k: v for k, v in merged.items() if v is not None})


def base_name(spec: str) -> str:
    """The first word of a text up to its value: "handoff", "auto", or a segment's."""
    return split_words(spec)[0].partition("=")[0]


def has_schedule(spec: str) -> bool:
    """Whether a text holds the schedule of a plan without clocks: steps, or noise levels."""
    return not has_clocks(spec) and bool(split_words(spec)[1].keys() & {"steps", "sigmas"})


def has_clocks(spec: str) -> bool:
    """Whether a plan's words give each generator a clock of its own."""
    words = spec.split()
    return any(
        re.match(rf"[a-z]+:(?:\*|{AMOUNT})/[0-9]", w) or w.startswith(RENOISE) for w in words
    )


def schedule_options(grid: TimeGrid, clocks: bool) -> dict[str, str]:
    """A grid as options of a text: of clocks the shift, which is all they need; steps and shift
    where it is Wan's; else its noise levels."""
    if clocks and grid.shift is not None:
        return {"shift": exact(grid.shift)}
    levels = (grid.sigmas, grid.timesteps)
    if grid.shift is not None and len(grid) <= MAX_STEPS:
        own = {"steps": str(len(grid)), "shift": exact(grid.shift)}
        for float64 in (False, True):
            wan = time_grid(len(grid), grid.shift, float64)
            if levels == (wan.sigmas, wan.timesteps):
                return {**own, **({"timesteps": FLOAT64} if float64 else {})}
    own = {"sigmas": _listed(grid.sigmas)}
    if grid.shift is not None:
        own["shift"] = exact(grid.shift)
    if grid.timesteps != tuple(TRAIN_STEPS * s for s in grid.sigmas[:-1]):
        own["timesteps"] = _listed(grid.timesteps)
    return own


def schedule_of(options: Mapping[str, str], grid: TimeGrid) -> TimeGrid:
    """The grid of a text's options; what they leave open is `grid`'s.

    Raises:
        InputError: options that do not go together, or values that are no schedule.
    """
    if "sigmas" in options:
        return _levels(options)
    if "timesteps" in options and options["timesteps"] != FLOAT64:
        raise InputError(
            f"a plan's timesteps are {shorten(options['timesteps'], 80)!r}; expected {FLOAT64}, or"
            " sigmas= with them.",
            param="timesteps",
        )
    if not options.keys() & set(SCHEDULE):
        return grid
    steps = whole(options["steps"], "steps") if "steps" in options else len(grid)
    shift = real(options["shift"], "shift") if "shift" in options else grid.shift
    if shift is None:
        raise InputError(
            "a plan with steps needs a shift, and its grid has none; write such as shift=5.",
            code="missing",
            param="shift",
        )
    return time_grid(steps, shift, "timesteps" in options)


def _levels(options: Mapping[str, str]) -> TimeGrid:
    """A grid of the noise levels in `sigmas`, one more than timesteps."""
    if "steps" in options:
        raise InputError(
            "sigmas are a whole schedule; leave steps= out.", code="conflict", param="steps"
        )
    sigmas = _numbers(options["sigmas"], "sigmas")
    falls = all(a > b for a, b in pairwise(sigmas))
    if len(sigmas) < 2 or not falls or sigmas[0] > 1 or sigmas[-1] < 0:
        raise InputError(
            f"sigmas are {shorten(options['sigmas'], 80)}; expected at least two falling noise"
            f" levels"
            " from at most 1 to at least 0, such as 0.9,0.5,0.",
            param="sigmas",
        )
    timesteps = tuple(TRAIN_STEPS * s for s in sigmas[:-1])
    if "timesteps" in options:
        timesteps = _numbers(options["timesteps"], "timesteps")
        inside = all(0 <= t <= TRAIN_STEPS for t in timesteps)
        if len(timesteps) != len(sigmas) - 1 or not inside:
            raise InputError(
                f"timesteps are {shorten(options['timesteps'], 80)}; expected {len(sigmas) - 1}"
                f" from 0"
                f" to {TRAIN_STEPS}, one for each noise level but the last.",
                code="mismatch" if inside else "out_of_range",
                param="timesteps",
            )
    shift = real(options["shift"], "shift") if "shift" in options else None
    return check_levels(TimeGrid(sigmas, timesteps, shift))


def _listed(values: Iterable[float]) -> str:
    return ",".join(map(exact, values))


def _numbers(text: str, what: str) -> tuple[float, ...]:
    return tuple(real(part, f"a number of {what}") for part in text.split(","))
