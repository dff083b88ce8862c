"""Plans in words: reading what the command line and `plan=` take.

    reference | small | large | handoff=AT[,bridge=K] | auto[=TOLERANCE] | segments

Segments stand in order, `GENERATOR:STEPS[/CLOCK][@SCALE[FIRST:END]][/every=K][/guidance-every=K]
[/adaptive=SHARE][/shift=SHIFT][/solver=NAME]`, with `renoise=SIGMA` between two of them where the
second begins on re-noised latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nexus_rt.errors import InputError, choose, cut
from nexus_rt.plan import (
    GAMMA_W,
    PLANS,
    Plan,
    Reuse,
    Segment,
    auto,
    clocked,
    handoff,
    reference,
    segments,
)
from nexus_rt.solver import SOLVERS, TimeGrid, check_shift

AMOUNT = r"\d+(?:\.\d+)?%|\d+"
SEGMENT = re.compile(
    rf"(?P<name>[a-z]+):(?P<amount>\*|{AMOUNT})(?:/(?P<clock>\d+))?"
    rf"(?:@(?P<scale>\d+(?:\.\d+)?)?(?:\[(?P<first>{AMOUNT}):(?P<end>{AMOUNT})\])?)?"
    r"(?P<options>(?:/[a-z][^/]*)*)"
)
RENOISE = "renoise="
MOST = 100_000  # steps of a clock


def has_clocks(spec: str) -> bool:
    """Whether a plan's words give each generator a clock of its own."""
    words = spec.split()
    return any(re.match(rf"[a-z]+:(?:{AMOUNT})/\d", w) or w.startswith(RENOISE) for w in words)


def parse_plan(spec: str | Plan, grid: TimeGrid, gamma_w: float = GAMMA_W) -> Plan:
    """Read a plan as the command line writes it.

    `reference` | `small` | `large` | `handoff=AT[,bridge=K]` | `auto[=TOLERANCE]` | segments such
    as `small:10 bridge:5 large:15@1`. AT is a fraction of the steps when below 1, a timestep when 1
    or more, or explicit: `handoff=sigma:0.9`, `handoff=fraction:0.3`, `handoff=timestep:850`.
    Segments with clocks, such as `small:4/10 large:4`, make their own grid with the shift of
    `grid`.

    Raises:
        InputError: words that are no plan, or a plan that does not fit the schedule.
    """
    if isinstance(spec, Plan):
        if spec.grid != grid:
            raise InputError(
                f"plan {spec.name!r} was made for another time grid of {len(spec)} steps; make it"
                " for this one."
            )
        return spec
    spec = str(spec).strip()
    if has_clocks(spec):
        if grid.shift is None:
            raise InputError(f"plan {cut(spec, 80)!r} has clocks; pass a grid of `time_grid`.")
        return clocked(_parse_segments(spec, None), grid.shift)
    if ":" in spec.split("=")[0]:
        parts = _parse_segments(spec, len(grid))
        if own := next((p for p in parts if p.shift is not None), None):
            raise InputError(
                f"{str(own)!r} has a shift of its own, and the plan one schedule for all; give each"
                " generator a clock, such as small:4/10 large:4/shift=3."
            )
        return segments(grid, parts)
    name, _, value = spec.partition("=")
    choose("plan", name, PLANS)
    if name == "reference" and not value:
        return reference(grid, gamma_w)
    if name == "auto":
        return auto(grid, _number(value, "auto's tolerance") if value else 0.02, gamma_w)
    if name == "handoff":
        return _parse_handoff(value, grid)
    if value:
        raise InputError(f"plan {name!r} takes no value; got {cut(spec, 80)!r}.")
    return segments(grid, [Segment(name, len(grid))], name)


def scaled(spec: str, steps: int) -> str:
    """A plan with clocks over another number of steps in all: every count and clock in proportion,
    at least one step for as many segments as there are steps.

    Raises:
        InputError: as `parse_plan`.
    """
    parts = _parse_segments(spec, None)
    if any(p.generator == "bridge" for p in parts) and steps < len(parts):
        parts = [p for p in parts if p.generator != "bridge"]
    parts = parts[-steps:] if steps < len(parts) else parts
    whole = sum(p.steps for p in parts)
    counts = [max(1, int(p.steps * steps / whole)) for p in parts]
    while sum(counts) != steps:  # the largest remainder, either way
        off = [p.steps * steps / whole - n for p, n in zip(parts, counts, strict=True)]
        if sum(counts) < steps:
            counts[off.index(max(off))] += 1
        else:
            able = [o if n > 1 else math.inf for o, n in zip(off, counts, strict=True)]
            counts[able.index(min(able))] -= 1
    new = []
    for i, (p, n) in enumerate(zip(parts, counts, strict=True)):
        ends = i + 1 == len(parts) or parts[i + 1].renoise is not None
        clock = None if ends else max(n + 1, round(n * (p.clock or p.steps) / p.steps))
        guided = p.guided and (
            round(p.guided[0] * n / p.steps),
            max(1, round(p.guided[1] * n / p.steps)),
        )
        renoise = p.renoise if i else None
        new.append(replace(p, steps=n, clock=clock, guided=guided, renoise=renoise))
    if len(new) == 1:
        new = [replace(new[0], clock=new[0].steps)]
    return " ".join(map(str, new))


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{what} is {cut(text, 80)!r}; expected a number.")
    return value


def _whole(text: str, what: str, low: int = 1) -> int:
    if not re.fullmatch(r"\d{1,6}", text) or not low <= int(text) <= MOST:
        raise InputError(
            f"{what} is {cut(text, 80)!r}; expected a whole number from {low} to {MOST}."
        )
    return int(text)


def _parse_handoff(value: str, grid: TimeGrid) -> Plan:
    at, *options = value.split(",")
    if not at:
        raise InputError(
            "handoff needs where: handoff=0.3 (fraction of steps), handoff=850 (timestep),"
            " handoff=sigma:0.9."
        )
    bridge: int | None = None
    for option in options:
        key, _, number = option.partition("=")
        choose("handoff option", key.strip(), ("bridge",))
        steps = _number(number, "bridge")
        if steps != int(steps):
            raise InputError(f"bridge is {number!r}; expected a whole number of steps.")
        bridge = int(steps)
    unit, _, number = at.rpartition(":")
    at_value = _number(number, "the handoff")
    return handoff(grid, at_value, unit or ("fraction" if at_value < 1 else "timestep"), bridge)


def _parse_segments(spec: str, n: int | None) -> list[Segment]:
    """The segments of a schedule of n steps: steps, percentages of it, or `*` for the rest; n None:
    each has a clock of its own, and a number of steps."""
    words: list[re.Match[str]] = []
    renoise: float | None = None
    starts: dict[int, float] = {}
    for word in spec.split():
        if word.startswith(RENOISE):
            if renoise is not None:
                raise InputError("two renoise= stand side by side; expected a segment between.")
            renoise = _number(word.removeprefix(RENOISE), "renoise")
            continue
        match = SEGMENT.fullmatch(word)
        if not match:
            raise InputError(
                f"segment {cut(word, 80)!r} is not of the form name:steps, name:30%, name:*,"
                " name:steps/clock or name:steps@guidance, followed by /every=K and the like."
            )
        if renoise is not None:
            starts[len(words)], renoise = renoise, None
        words.append(match)
    if renoise is not None:
        raise InputError("renoise= stands last; expected the segment that begins there.")
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
            " its own; write steps, such as small:4/10 large:4."
        )
    return _whole(amount, "a segment's steps")


def _counts(amounts: list[str], n: int) -> list[int]:
    """Steps of each segment; percentages are rounded at their running total, so that they cover
    what they add up to."""
    if amounts.count("*") > 1:
        raise InputError("only one segment can take the rest ('*').")
    counts, exact, given = [], 0.0, 0
    for amount in amounts:
        if amount.endswith("%"):
            before = round(exact)
            exact += n * float(amount[:-1]) / 100
            counts.append(round(exact) - before)
        else:
            counts.append(0 if amount == "*" else int(amount))
        given += counts[-1]
    if "*" in amounts:
        counts[amounts.index("*")] = max(0, n - given)
    return counts


def _segment(match: re.Match[str], steps: int, renoise: float | None) -> Segment:
    """A segment of its word."""
    name = choose("segment", match["name"], ("small", "large", "bridge"))
    values = _options(match["options"], match[0])
    reuse, (shift, solver) = _reuse(values, match[0]), (values.get("shift"), values.get("solver"))
    if solver is not None:
        choose("solver", solver, SOLVERS)
    guided = None
    if match["first"]:
        first, end = (
            round(float(x[:-1]) * steps / 100) if x.endswith("%") else int(x)
            for x in (match["first"], match["end"])
        )
        if not 0 <= first < end or first >= steps:
            raise InputError(
                f"{cut(match[0], 80)!r} is guided from step {first} to {end} of {steps}; expected"
                " an interval inside, such as [0:40%]."
            )
        guided = (first, min(end, steps))
    if name == "bridge" and (reuse != Reuse() or guided or solver):
        raise InputError(
            f"{cut(match[0], 80)!r}: both generators run in a bridge; guidance intervals, solvers"
            " and reuse go with small and large segments."
        )
    return Segment(
        name,
        steps,
        float(match["scale"]) if match["scale"] else None,
        guided,
        reuse,
        _whole(match["clock"], "a clock") if match["clock"] else None,
        renoise,
        shift,
        solver,
    )


def _options(text: str, word: str) -> dict[str, Any]:
    """What follows a segment's `/`, checked one by one."""
    values: dict[str, Any] = {}
    for option in text.split("/")[1:]:
        key, _, value = option.partition("=")
        choose(
            "option of a segment", key, ("every", "guidance-every", "adaptive", "shift", "solver")
        )
        if key in values:
            raise InputError(f"{cut(word, 80)!r} sets {key} twice.")
        if key == "adaptive":
            values[key] = _number(value, "adaptive")
            if not 0 < values[key] <= 10:
                raise InputError(
                    f"adaptive is {value}; expected the relative change that may be estimated, such"
                    " as 0.05."
                )
        elif key == "shift":
            values[key] = _number(value, "shift")
            check_shift(values[key])
        else:
            values[key] = value if key == "solver" else _whole(value, key)
    return values


def _reuse(values: dict[str, Any], word: str) -> Reuse:
    if "every" in values and "adaptive" in values:
        raise InputError(
            f"{cut(word, 80)!r}: every= fixes which steps are computed and adaptive= finds them;"
            " expected one of the two."
        )
    return Reuse(
        int(values.get("every", 1)), int(values.get("guidance-every", 1)), values.get("adaptive")
    )


def with_own_steps(spec: str, grid: TimeGrid, small: int | None, large: int | None) -> str:
    """A plan of one schedule as clocks, each generator's of a number of steps of its own: it walks
    the share of its schedule that the plan gives it.

    Args:
        grid: the schedule of the plan. small, large: steps of the generators' whole schedules;
            None: as many as the grid has.

    Raises:
        InputError: a plan in which both generators run at a step, that has clocks, or that does not
            run a generator whose steps are asked for.
    """
    asked = {"small": small, "large": large}
    if has_clocks(spec):
        raise InputError(
            f"plan {cut(spec, 80)!r} says each generator's steps; leave out small_steps and"
            " large_steps, or write them there."
        )
    name, _, value = spec.strip().partition("=")
    if name == "handoff" and "bridge" not in value:
        spec = f"{spec},bridge=0"
    plan = parse_plan(spec, grid)
    lone = [step.alone for step in plan.steps]
    if None in lone or name == "auto":
        raise InputError(
            f"plan {cut(spec, 80)!r} runs both generators at a step, where they have one clock;"
            " steps of their own go with handoff, small, large and segments."
        )
    if idle := [n for n, steps in asked.items() if steps is not None and n not in lone]:
        raise InputError(
            f"{idle[0]}_steps is {asked[idle[0]]}, and plan {cut(spec, 80)!r} does not run the"
            f" {idle[0]} generator; leave it out, or pass another plan."
        )
    words, left = [], 1.0
    edges = [i for i in range(len(lone)) if i == 0 or lone[i] != lone[i - 1]]
    for first, end in zip(edges, [*edges[1:], len(lone)], strict=True):
        generator = lone[first]
        assert generator is not None
        whole = asked[generator] or len(grid)
        count = max(1, round((end - first) / len(lone) * whole))
        if end == len(lone):
            words.append(f"{generator}:{max(1, round(left * whole))}")
        else:
            # steps of its schedule that are left, of which it walks these
            clock = max(count + 1, round(left * whole))
            words.append(f"{generator}:{count}/{clock}")
            left *= 1 - count / clock
    if len(words) == 1:
        words = [f"{words[0]}/{words[0].partition(':')[2]}"]
    return " ".join(words)


def with_shifts(spec: str, shifts: Mapping[str, float]) -> str:
    """A plan with clocks where generators have shifts of their own, unless their segments say
    others."""
    parts = _parse_segments(spec, None)
    return " ".join(
        str(replace(p, shift=shifts.get(p.generator) if p.shift is None else p.shift))
        for p in parts
    )
