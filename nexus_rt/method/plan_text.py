"""The text of a plan, as the command line and `plan=` take it, read to a plan.

    reference | small | large | handoff=AT[,bridge=K] | auto[=TOLERANCE] | segments

Segments stand in order, `GENERATOR:STEPS[/CLOCK][@SCALE[FIRST:END]][/every=K][/guidance-every=K]
[/adaptive=SHARE][/shift=SHIFT][/solver=NAME]`, with `renoise=SIGMA` between two of them where the
second begins on re-noised latents. Options of the whole plan follow, and its schedule
(`nexus_rt.method.plan_options`). `Plan.name` and `Plan.text` are written in the same form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nexus_rt.core.checks import instance
from nexus_rt.core.errors import InputError, choose, shorten, shown
from nexus_rt.core.limits import (
    ENERGIES,
    GAMMA_W,
    GENERATORS,
    MAX_GAMMA_W,
    MAX_GUIDANCE,
    MAX_STEPS,
    MIN_GAMMA_W,
    SOLVERS,
)
from nexus_rt.method.named_plans import (
    PLANS,
    TOLERANCE,
    UNITS,
    auto,
    default_unit,
    handoff,
    reference,
)
from nexus_rt.method.plan import Plan
from nexus_rt.method.plan_options import (
    AMOUNT,
    NUMBER,
    OPTIONS,
    RENOISE,
    base_name,
    has_clocks,
    real,
    schedule_of,
    split_words,
    whole,
)
from nexus_rt.method.segments import Reuse, Segment, clocked, segments
from nexus_rt.method.time_grid import TimeGrid, check_shift

SEGMENT = re.compile(
    rf"(?P<name>[a-z]+):(?P<amount>\*|{AMOUNT})(?:/(?P<clock>[0-9]+))?"
    rf"(?:@(?P<scale>{NUMBER})?(?:\[(?P<first>{AMOUNT}):(?P<end>{AMOUNT})\])?)?"
    r"(?P<options>(?:/[a-z][^/]*)*)"
)
SEGMENT_OPTIONS = ("every", "guidance-every", "adaptive", "shift", "solver")
MAX_SEGMENTS = 1000
FORM = "expected a Plan, or its words, such as 'handoff=0.3'"


def parse_plan(spec: str | Plan, grid: TimeGrid, gamma_w: float = GAMMA_W) -> Plan:
    """Read a plan as the command line writes it.

    `reference` | `small` | `large` | `handoff=AT[,bridge=K]` | `auto[=TOLERANCE]` | segments such
    as `small:10 bridge:5 large:15@1`. AT is a fraction of the steps when below 1, a timestep when 1
    or more, or explicit: `handoff=sigma:0.9`, `handoff=fraction:0.3`, `handoff=timestep:850`.
    Segments with clocks, such as `small:4/10 large:4`, make their own grid with the shift of
    `grid`. A text with a schedule (`Plan.text`) makes its own grid too.

    Raises:
        InputError: words that are no plan, or a plan that does not fit the schedule.
    """
    instance("grid", grid, TimeGrid, "a TimeGrid, as `time_grid` makes one")
    if isinstance(spec, Plan):
        if spec.grid != grid:
            raise InputError(
                f"plan {spec.name!r} was made for another time grid of {len(spec)} steps; make it"
                " for this one.",
                code="mismatch",
                param="plan",
            )
        return spec
    spec = _text(spec)
    base, options = split_words(spec)
    if "gamma-w" in options:
        own = real(options["gamma-w"], "gamma-w", MIN_GAMMA_W, MAX_GAMMA_W)
        if gamma_w not in (GAMMA_W, own):
            raise InputError(
                f"gamma_w is {gamma_w}, and plan {shorten(spec, 80)!r} sets its own; leave one"
                " out.",
                code="conflict",
                param="gamma_w",
            )
        gamma_w = own
    build = _builder(base)
    try:
        grid = _schedule(spec, options, grid)
    except InputError as error:
        raise InputError(
            f"plan {shorten(spec, 80)!r}: {error}", code=error.code, param=error.param
        ) from None
    return _with_options(build(grid, gamma_w), options, spec)


def check_plan(spec: str) -> str:
    """The text, which is a plan's over some schedule.

    Raises:
        InputError: words that are no plan.
    """
    base, options = split_words(_text(spec))
    _builder(base)
    for key, low, high in (
        ("gamma-w", MIN_GAMMA_W, MAX_GAMMA_W),
        ("small-boundary", 0.0, 1.0),
        ("large-boundary", 0.0, 1.0),
    ):
        if key in options:
            real(options[key], key, low, high)
    for key in ("small-solver", "large-solver", "solver"):
        choose("solver", options.get(key, "euler"), SOLVERS)
    choose("energy", options.get("energy", "progressive"), ENERGIES)
    return spec


def _text(spec: Any) -> str:
    if not isinstance(spec, str):
        raise InputError(f"plan is {shown(spec)}; {FORM}.", code="invalid_type", param="plan")
    if not spec.strip():
        raise InputError(f"plan is {shown(spec)}; {FORM}.", code="missing", param="plan")
    return spec.strip()


def _builder(base: str) -> Callable[[TimeGrid, float], Plan]:
    """What makes the plan of a text without its options over a schedule, all that does not depend
    on one checked."""
    if has_clocks(base):
        parts = parse_segments(base, None)

        def clocks(grid: TimeGrid, gamma_w: float) -> Plan:
            if grid.shift is None:
                raise InputError(
                    f"plan {shorten(base, 80)!r} has clocks; pass a grid of `time_grid`.",
                    code="missing",
                    param="shift",
                )
            return clocked(parts, grid.shift)

        return clocks
    if ":" in base.split("=")[0]:
        parse_segments(base, MAX_STEPS)
        return lambda grid, gamma_w: segments(grid, parse_segments(base, len(grid)))
    name, equals, value = base.partition("=")
    choose("plan", name, PLANS)
    if name == "handoff":
        where = _parse_handoff(value)
        return lambda grid, gamma_w: handoff(grid, *where)
    if name == "auto":
        tolerance = real(value, "tolerance") if value else TOLERANCE
        return lambda grid, gamma_w: auto(grid, tolerance, gamma_w)
    if equals:
        raise InputError(f"plan {name!r} takes no value; got {shorten(base, 80)!r}.", param="plan")
    if name == "reference":
        return reference
    return lambda grid, gamma_w: segments(grid, [Segment(name, len(grid))], name)


def _schedule(spec: str, options: Mapping[str, str], grid: TimeGrid) -> TimeGrid:
    """The grid of a text, of which clocks take the shift alone."""
    if has_clocks(spec) and (own := options.keys() & {"steps", "timesteps", "sigmas"}):
        raise InputError(
            f"plan {shorten(spec, 80)!r} gives each generator a clock, and {min(own)}= is of one"
            " schedule for all; leave one out.",
            code="conflict",
            param=min(own),
        )
    if has_clocks(spec) and "shift" in options:
        shift = real(options["shift"], "shift")
        check_shift(shift)
        return replace(grid, shift=shift)
    return schedule_of(options, grid)


def _with_options(plan: Plan, options: Mapping[str, str], spec: str) -> Plan:
    """The plan with a text's options, each of which has a part in it."""
    own = {g: options[f"{g}-solver"] for g in GENERATORS if f"{g}-solver" in options}
    shares = {g: options[f"{g}-boundary"] for g in GENERATORS if f"{g}-boundary" in options}
    plan = plan.with_energy(options.get("energy")).with_solvers(own, options.get("solver"))
    if shares:
        plan = plan.with_experts({g: real(v, f"{g}-boundary", 0.0, 1.0) for g, v in shares.items()})
    written = split_words(plan.name)[1]
    for key in OPTIONS:
        # the energy and the gate that the plan has without a word
        same = key == "energy" or (key == "gamma-w" and base_name(spec) in ("reference", "auto"))
        if key in options and key not in written and not same:
            raise InputError(
                f"{key}={shorten(options[key], 80)} has no part in plan {shorten(spec, 80)!r};"
                f" leave it"
                " out.",
                code="conflict",
                param=key,
            )
    return plan


def _parse_handoff(value: str) -> tuple[float, str, int | None]:
    """Where a handoff is, its unit, and the bridge; None for the default."""
    at, *options = value.split(",")
    if not at:
        raise InputError(
            "handoff needs where: handoff=0.3 (fraction of steps), handoff=850 (timestep),"
            " handoff=sigma:0.9.",
            code="missing",
            param="handoff",
        )
    bridge: int | None = None
    for option in options:
        key, _, number = option.partition("=")
        choose("handoff option", key.strip(), ("bridge",))
        if bridge is not None:
            raise InputError(
                f"handoff={shorten(value, 80)} sets bridge twice.", code="duplicate", param="bridge"
            )
        bridge = whole(number.strip(), "bridge", 0)
    unit, _, number = at.strip().rpartition(":")
    at_value = real(number, "handoff")
    if unit:
        choose("handoff unit", unit, UNITS)
    return at_value, unit or default_unit(at_value), bridge


def parse_segments(spec: str, n: int | None) -> list[Segment]:
    """The segments of a schedule of n steps: steps, percentages of it, or `*` for the rest; n None:
    each has a clock of its own, and a number of steps."""
    words: list[re.Match[str]] = []
    renoise: float | None = None
    starts: dict[int, float] = {}
    for word in spec.split():
        if word.startswith(RENOISE):
            if renoise is not None:
                raise InputError(
                    "two renoise= stand side by side; expected a segment between.",
                    code="duplicate",
                    param="renoise",
                )
            renoise = real(word.removeprefix(RENOISE), "renoise")
            continue
        match = SEGMENT.fullmatch(word)
        if not match:
            raise InputError(
                f"segment {shorten(word, 80)!r} is not of the form name:steps, name:30%, name:*,"
                " name:steps/clock or name:steps@guidance, followed by /every=K and the like.",
                code="unreadable",
                param="segment",
            )
        if renoise is not None:
            starts[len(words)], renoise = renoise, None
        words.append(match)
    if renoise is not None:
        raise InputError(
            "renoise= stands last; expected the segment that begins there.",
            code="missing",
            param="renoise",
        )
    if len(words) > MAX_SEGMENTS:
        raise InputError(
            f"the plan has {len(words)} segments; expected at most {MAX_SEGMENTS}.",
            code="too_large",
            param="plan",
        )
    amounts = [match["amount"] for match in words]
    counts = _counts(amounts, n) if n is not None else [_steps(a) for a in amounts]
    return [
        _segment(match, count, starts.get(i))
        for i, (match, count) in enumerate(zip(words, counts, strict=True))
    ]


def _steps(amount: str) -> int:
    if not amount.isdecimal():
        raise InputError(
            f"{amount!r} is a share of one schedule, and this plan gives each generator a clock of"
            " its own; write steps, such as small:4/10 large:4.",
            code="conflict",
            param="steps",
        )
    return whole(amount, "a segment's steps")


def _counts(amounts: list[str], n: int) -> list[int]:
    """Steps of each segment; percentages are rounded at their running total, so that they cover
    what they add up to."""
    if amounts.count("*") > 1:
        raise InputError(
            "only one segment can take the rest ('*').", code="duplicate", param="steps"
        )
    counts, share, total = [], 0.0, 0
    for amount in amounts:
        if amount.endswith("%"):
            before = round(share)
            share += n * real(amount[:-1], "a segment's percentage", 0, 100) / 100
            counts.append(round(share) - before)
        else:
            counts.append(0 if amount == "*" else whole(amount, "a segment's steps", 0))
        total += counts[-1]
    if "*" in amounts:
        counts[amounts.index("*")] = max(0, n - total)
    return counts


def _segment(match: re.Match[str], steps: int, renoise: float | None) -> Segment:
    """A segment of its word."""
    values = _options(match["options"], match[0])
    guided = None
    if match["first"]:
        first, end = (_guided(match[side], steps) for side in ("first", "end"))
        guided = (first, end)
    try:
        return Segment(
            match["name"],
            steps,
            real(match["scale"], "guidance", -MAX_GUIDANCE, MAX_GUIDANCE)
            if match["scale"]
            else None,
            guided,
            Reuse(values.get("every", 1), values.get("guidance-every", 1), values.get("adaptive")),
            whole(match["clock"], "clock") if match["clock"] else None,
            renoise,
            values.get("shift"),
            values.get("solver"),
        )
    except InputError as error:
        raise InputError(
            f"segment {shorten(match[0], 80)!r}: {error}", code=error.code, param=error.param
        ) from None


def _guided(amount: str, steps: int) -> int:
    """A guided step: a number, or a percentage of the segment's."""
    if amount.endswith("%"):
        return round(real(amount[:-1], "a guided percentage", 0, 100) * steps / 100)
    return whole(amount, "a guided step", 0)


def _options(text: str, word: str) -> dict[str, Any]:
    """What follows a segment's `/`, checked one by one."""
    values: dict[str, Any] = {}
    for option in text.split("/")[1:]:
        key, _, value = option.partition("=")
        choose("option of a segment", key, SEGMENT_OPTIONS)
        if key in values:
            raise InputError(
                f"{shorten(word, 80)!r} sets {key} twice.", code="duplicate", param=key
            )
        if key in ("adaptive", "shift"):
            values[key] = real(value, key)
        else:
            values[key] = value if key == "solver" else whole(value, key)
    return values
