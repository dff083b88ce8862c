"""Plans from other plans, text to text: another number of steps, steps of each generator's own, and
shifts of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby

from nexus_rt.core.errors import InputError, shorten
from nexus_rt.core.limits import GENERATORS
from nexus_rt.method.plan import Plan
from nexus_rt.method.plan_options import has_clocks, has_schedule, joined, split_words
from nexus_rt.method.plan_text import parse_plan, parse_segments
from nexus_rt.method.segments import Reuse, Segment
from nexus_rt.method.time_grid import TimeGrid


def scaled(spec: str, steps: int) -> str:
    """A plan with clocks over another number of steps in all: every count and clock in proportion,
    at least one step for as many segments as there are steps.

    Raises:
        InputError: as `parse_plan`.
    """
    base, options = split_words(spec)
    parts = parse_segments(base, None)
    if any(p.generator == "bridge" for p in parts) and steps < len(parts):
        parts = [p for p in parts if p.generator != "bridge"]
    parts = parts[-steps:] if steps < len(parts) else parts
    new = []
    for i, (p, n) in enumerate(zip(parts, _shares([p.steps for p in parts], steps), strict=True)):
        ends = i + 1 == len(parts) or parts[i + 1].renoise is not None
        clock = None if ends else max(n + 1, round(n * (p.clock or p.steps) / p.steps))
        new.append(replace(_resized(p, n), clock=clock, renoise=p.renoise if i else None))
    if len(new) == 1:
        new = [replace(new[0], clock=new[0].steps)]
    left = {p.generator for p in new}
    kept = {
        k: v
        for k, v in options.items()
        if k.split("-")[0] not in GENERATORS or k.split("-")[0] in left
    }
    return joined(" ".join(map(str, new)), kept)


def with_own_steps(spec: str, grid: TimeGrid, small: int | None, large: int | None) -> str:
    """A plan of one schedule as clocks, each generator's of a number of steps of its own: it walks
    the share of its schedule that the plan gives it. All else of its segments stays: guidance,
    intervals over the same share of the steps, reuse, solvers.

    Args:
        grid: the schedule of the plan. small, large: steps of the generators' whole schedules;
            None: as many as the grid has.

    Raises:
        InputError: a plan in which both generators run at a step, that has clocks or a schedule,
            or that does not run a generator whose steps are set; so few steps that a segment would
            have none.
    """
    own = {"small": small, "large": large}
    base, options = split_words(spec)
    if has_clocks(base) or has_schedule(spec):
        raise InputError(
            f"plan {shorten(spec, 80)!r} says each generator's steps; leave out small_steps and"
            " large_steps, or write them there.",
            code="conflict",
            param="plan",
        )
    name, _, value = base.partition("=")
    if name == "handoff" and "bridge" not in value:
        base = f"{base},bridge=0"
    plan = parse_plan(joined(base, options), grid)
    if name in ("reference", "auto") or any(step.alone is None for step in plan.steps):
        raise InputError(
            f"plan {shorten(spec, 80)!r} runs both generators at a step, where they have one clock;"
            " steps of their own go with handoff, small, large and segments.",
            code="unsupported",
            param="plan",
        )
    if idle := [g for g, n in own.items() if n is not None and g not in plan.generators]:
        raise InputError(
            f"{idle[0]}_steps is {own[idle[0]]}, and plan {shorten(spec, 80)!r} does not run the"
            f" {idle[0]} generator; leave it out, or pass another plan.",
            code="conflict",
            param=f"{idle[0]}_steps",
        )
    parts = parse_segments(base, len(grid)) if ":" in base.split("=")[0] else _alone(plan)
    turns = [list(turn) for _, turn in groupby(merged(parts), key=lambda p: p.generator)]
    new: list[Segment] = []
    left = 1.0
    for k, turn in enumerate(turns):
        whole_steps = own[turn[0].generator] or len(grid)
        if k + 1 == len(turns):
            count = clock = max(1, round(left * whole_steps))
        else:
            share = sum(p.steps for p in turn) / len(grid)
            count = max(1, round(share * whole_steps))
            # steps of its schedule that are left, of which it walks these
            clock = max(count + 1, round(left * whole_steps))
            left *= 1 - count / clock
        if count < len(turn):
            raise InputError(
                f"{turn[0].generator}_steps is {whole_steps}, of which plan {shorten(spec, 80)!r}"
                f" walks {count} in {len(turn)} segments, and {str(turn[-1])!r} would have none;"
                " take more steps, or fewer segments.",
                code="out_of_range",
                param=f"{turn[0].generator}_steps",
            )
        for part, n in zip(turn, _shares([p.steps for p in turn], count), strict=True):
            new.append(replace(_resized(part, n), clock=clock))
            clock -= n
    new[-1] = replace(new[-1], clock=None if len(new) > 1 else new[-1].steps)
    return joined(" ".join(map(str, new)), options)


def with_shifts(spec: str, shifts: Mapping[str, float]) -> str:
    """A plan with clocks where generators have shifts of their own, unless their segments say
    others."""
    base, options = split_words(spec)
    parts = parse_segments(base, None)
    words = [
        str(replace(p, shift=shifts.get(p.generator) if p.shift is None else p.shift))
        for p in parts
    ]
    return joined(" ".join(words), options)


def _shares(sizes: list[int], total: int) -> list[int]:
    """A total in the proportion of sizes, at least 1 each: the largest remainder, either way."""
    whole_size = sum(sizes)
    exact_shares = [size * total / whole_size for size in sizes]
    counts = [max(1, int(share)) for share in exact_shares]
    while sum(counts) != total:
        off = [share - n for share, n in zip(exact_shares, counts, strict=True)]
        if sum(counts) < total:
            counts[off.index(max(off))] += 1
        else:
            able = [o if n > 1 else math.inf for o, n in zip(off, counts, strict=True)]
            counts[able.index(min(able))] -= 1
    return counts


def _resized(part: Segment, steps: int) -> Segment:
    """A segment of another number of steps, guided over the same share of them."""
    guided = part.guided
    if guided is not None:
        first, end = (round(i * steps / part.steps) for i in guided)
        first = min(first, steps - 1)
        guided = (first, max(first + 1, end))
    # in one go: an interval is valid for its steps alone
    return replace(part, steps=steps, guided=guided)


def _alone(plan: Plan) -> list[Segment]:
    """The segments of a plan that is written as no segments."""
    return [
        Segment(generator, len(list(steps)))
        for generator, steps in groupby(s.alone or "" for s in plan.steps)
    ]


def merged(parts: list[Segment]) -> list[Segment]:
    """Segments that have steps, neighbours joined where that changes nothing."""
    joint: list[Segment] = []
    for part in parts:
        last = joint[-1] if joint else None
        plain = part.guided is None and part.reuse == Reuse()
        if last is not None and plain and last == replace(part, steps=last.steps):
            joint[-1] = replace(last, steps=last.steps + part.steps)
        elif part.steps:
            joint.append(part)
    return joint
