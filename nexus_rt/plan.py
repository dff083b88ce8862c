"""Plans: which generator runs at which step, with what weight, and what that costs.

A plan is made before the first step and does not change. `segments` is the general form; `small`,
`large` and `handoff` are shorthands of it; `reference` and `auto` follow the gate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nexus_rt.errors import InputError, choose
from nexus_rt.solver import TRAIN_STEPS, TimeGrid
from nexus_rt.upfb import ENERGIES

PLANS = ("reference", "small", "large", "handoff", "auto")
UNITS = ("timestep", "fraction", "sigma")
GAMMA_W = 0.3


def gate(timestep: float, gamma_w: float = GAMMA_W) -> float:
    """The small generator's weight `w(t) = (1 + cos(pi (1 - tau)^gamma_w)) / 2`, tau = t/999: 1 at
    t=999, 0 at t=0."""
    tau = min(max(timestep / (TRAIN_STEPS - 1), 0.0), 1.0)
    return (1 + math.cos(math.pi * (1 - tau) ** gamma_w)) / 2


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    w: the small generator's weight. small, large: which generators run. energy: how the blend's RMS
        is set.
    guidance_small, guidance_large: this step's own guidance scale, None for the call's.
    blended: False where a lone generator's velocity is used as it is.
    """

    index: int
    timestep: int
    sigma: float
    w: float
    small: bool
    large: bool
    energy: str = "progressive"
    guidance_small: float | None = None
    guidance_large: float | None = None
    blended: bool = True

    def scale(self, generator: str, default: float) -> float:
        """The guidance scale of "small" or "large": this step's own, else the call's."""
        own = self.guidance_small if generator == "small" else self.guidance_large
        return float(default if own is None else own)

    @property
    def runs(self) -> str:
        return "both" if self.small and self.large else "small" if self.small else "large"


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of one step's parts at the batch, size and device of the run.

    `small`, `large`: one forward without guidance; `*_guided`: with it (a batch of two).
    """

    small: float
    small_guided: float
    large: float
    large_guided: float
    blend: float = 0.0
    solver: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A named sequence of steps, one for each entry of its time grid."""

    name: str
    steps: tuple[Step, ...]
    grid: TimeGrid

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def generators(self) -> tuple[str, ...]:
        """The generators that run at all, in the order small, large."""
        return tuple(g for g in ("small", "large") if any(getattr(s, g) for s in self.steps))

    def with_energy(self, energy: str | None) -> Plan:
        """The same plan under another energy rule.

        Raises:
            InputError: `reference` asked of a plan in which a generator is left out of a step.
        """
        if energy is None:
            return self
        choose("energy", energy, ENERGIES)
        lone = [s for s in self.steps if not (s.small and s.large)]
        if energy == "reference" and lone:
            raise InputError(
                f"energy 'reference' needs both generators at every step, but plan {self.name!r}"
                f" leaves one out at step {lone[0].index} ({len(lone)} steps in all); use energy"
                " 'progressive', or plan 'reference'."
            )
        return replace(self, steps=tuple(replace(s, energy=energy) for s in self.steps))

    def guidance(self, step: Step, generator: str, small: float, large: float) -> float:
        """The guidance scale of a generator at a step, given the call's two defaults."""
        return step.scale(generator, small if generator == "small" else large)

    def evaluations(self, guidance_small: float, guidance_large: float) -> dict[str, int]:
        """Forward passes of each generator (a guided step has two)."""
        count = {"small": 0, "large": 0}
        for step in self.steps:
            for g in count:
                if getattr(step, g):
                    count[g] += (
                        1 if self.guidance(step, g, guidance_small, guidance_large) == 1.0 else 2
                    )
        return count

    def step_price(
        self, step: Step, costs: StepCosts, guidance_small: float, guidance_large: float
    ) -> float:
        """Milliseconds of one step: the sum of what runs in it."""
        price = costs.solver + (costs.blend if step.blended else 0.0)
        for g in ("small", "large"):
            if getattr(step, g):
                plain = self.guidance(step, g, guidance_small, guidance_large) == 1.0
                price += getattr(costs, g if plain else f"{g}_guided")
        return price

    def price(self, costs: StepCosts, guidance_small: float, guidance_large: float) -> float:
        """Milliseconds of the whole denoising loop."""
        return sum(self.step_price(s, costs, guidance_small, guidance_large) for s in self.steps)


def reference(grid: TimeGrid, gamma_w: float = GAMMA_W) -> Plan:
    """Both generators at every step, w from the gate, energy `reference`: the published
    schedule."""
    steps = [
        Step(i, t, s, gate(t, gamma_w), True, True, "reference")
        for i, (t, s) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False))
    ]
    return Plan("reference", tuple(steps), grid)


def auto(grid: TimeGrid, tolerance: float = 0.02, gamma_w: float = GAMMA_W) -> Plan:
    """w from the gate, snapped to 0 below `tolerance` and to 1 above `1 - tolerance`; what has no
    share does not run."""
    if not 0 <= tolerance < 0.5:
        raise InputError(
            f"auto's tolerance is {tolerance}; expected a weight from 0 up to (not including) 0.5."
        )
    steps = []
    for i, (t, s) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False)):
        w = gate(t, gamma_w)
        w = 0.0 if w < tolerance else 1.0 if w > 1 - tolerance else w
        steps.append(Step(i, t, s, w, w > 0, w < 1, "progressive", blended=w > 0))
    return Plan(f"auto={tolerance:g}", tuple(steps), grid)


@dataclass(frozen=True)
class Segment:
    """`generator` ("small", "large" or "bridge") for a number of steps, with a guidance scale of
    its own or None."""

    generator: str
    steps: int
    guidance: float | None = None


def segments(grid: TimeGrid, parts: Sequence[Segment], name: str | None = None) -> Plan:
    """The general plan: generators in turn, `bridge` a cosine ramp of w between its neighbours,
    both running.

    Raises:
        InputError: the segments do not cover the schedule exactly, or a bridge lacks two different
            neighbours.
    """
    parts = [p for p in parts if p.steps > 0]
    total = sum(p.steps for p in parts)
    if total != len(grid):
        raise InputError(
            f"the segments have {total} steps, the schedule {len(grid)}; make them add up, or let"
            " one take the rest ('large:*')."
        )
    steps: list[Step] = []
    for k, part in enumerate(parts):
        choose("segment", part.generator, ("small", "large", "bridge"))
        if part.generator != "bridge":
            levels = [1.0 if part.generator == "small" else 0.0] * part.steps
            own = (part.guidance, part.guidance)
        else:
            sides = [parts[j].generator if 0 <= j < len(parts) else None for j in (k - 1, k + 1)]
            if sorted(map(str, sides)) != ["large", "small"]:
                raise InputError(
                    "a bridge stands between a small and a large segment, one on each side."
                )
            start = 1.0 if sides[0] == "small" else 0.0
            ramp = [
                (1 + math.cos(math.pi * (j + 1) / (part.steps + 1))) / 2 for j in range(part.steps)
            ]
            levels = [r if start else 1 - r for r in ramp]
            beside = {sides[0]: parts[k - 1].guidance, sides[1]: parts[k + 1].guidance}
            own = (
                (part.guidance, part.guidance)
                if part.guidance is not None
                else (beside["small"], beside["large"])
            )
        for w in levels:
            i = len(steps)
            both = part.generator == "bridge"
            steps.append(
                Step(
                    i,
                    grid.timesteps[i],
                    grid.sigmas[i],
                    w,
                    both or w == 1,
                    both or w == 0,
                    "progressive",
                    *own,
                    both,
                )
            )
    text = " ".join(
        f"{p.generator}:{p.steps}" + (f"@{p.guidance:g}" if p.guidance is not None else "")
        for p in parts
    )
    return Plan(name or text, tuple(steps), grid)


def handoff(grid: TimeGrid, at: float, unit: str = "timestep", bridge: int | None = None) -> Plan:
    """The small generator alone, a cosine ramp over `bridge` steps, then the large one alone.

    Args:
        at: where the small one stops running alone: a timestep (it runs while t >= at, as
            diffusers' boundary has it), a fraction of the steps, or a sigma, as `unit` says.
        bridge: steps with both; the default is a tenth of the schedule, at most what is left.
    """
    n = len(grid)
    choose("handoff unit", unit, UNITS)
    if unit == "fraction":
        alone, inside = round(at * n), 0 < at < 1
    elif unit == "sigma":
        alone, inside = (
            sum(s >= at for s in grid.sigmas[:-1]),
            grid.sigmas[n - 1] < at <= grid.sigmas[0],
        )
    else:
        alone, inside = (
            sum(t >= at for t in grid.timesteps),
            grid.timesteps[-1] < at <= grid.timesteps[0],
        )
    if not inside:
        spans = {
            "fraction": "between 0 and 1 (exclusive)",
            "sigma": f"above {grid.sigmas[n - 1]:.4f} and up to {grid.sigmas[0]:.4f}",
            "timestep": f"above {grid.timesteps[-1]} and up to {grid.timesteps[0]}",
        }
        raise InputError(
            f"handoff at {unit} {at:g} lies outside the schedule of {n} steps; expected"
            f" {spans[unit]}, or plan 'small' or 'large'."
        )
    bridge = max(0, min(max(1, round(n / 10)), n - alone - 1)) if bridge is None else bridge
    if bridge < 0 or alone + bridge > n - (bridge > 0):
        raise InputError(
            f"a bridge of {bridge} steps after {alone} small ones leaves none of the {n} for the"
            " large one."
        )
    if bridge and not alone:
        raise InputError(
            f"handoff at {unit} {at:g} leaves the small generator no step of its own in {n}; hand"
            " over later."
        )
    parts = [
        Segment("small", alone),
        Segment("bridge", bridge),
        Segment("large", n - alone - bridge),
    ]
    return segments(grid, parts, f"handoff={at:g}" + (f",bridge={bridge}" if bridge else ""))


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{what} is {text!r}; expected a number.")
    return value


def _parse_segments(spec: str, n: int) -> list[Segment]:
    """`small:10 bridge:5 large:*@1`: steps, percentages of the schedule, or `*` for the rest, each
    with an own guidance."""
    names, amounts, scales = [], [], []
    for word in spec.split():
        match = re.fullmatch(r"([a-z]+):(\*|\d+(?:\.\d+)?%|\d+)(?:@(\d+(?:\.\d+)?))?", word)
        if not match:
            raise InputError(
                f"segment {word!r} is not of the form name:steps, name:30%, name:* or"
                " name:steps@guidance."
            )
        names.append(choose("segment", match[1], ("small", "large", "bridge")))
        amounts.append(match[2])
        scales.append(float(match[3]) if match[3] else None)
    if amounts.count("*") > 1:
        raise InputError("only one segment can take the rest ('*').")
    # Percentages are rounded at their running total, so that they cover what they add up to.
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
    return [Segment(*p) for p in zip(names, counts, scales, strict=True)]


def parse_plan(spec: str | Plan, grid: TimeGrid, gamma_w: float = GAMMA_W) -> Plan:
    """Read a plan as the command line writes it.

    `reference` | `small` | `large` | `handoff=AT[,bridge=K]` | `auto[=TOLERANCE]` | segments such
    as `small:10 bridge:5 large:15@1`. AT is a fraction of the steps when below 1, a timestep when 1
    or more, or explicit: `handoff=sigma:0.9`, `handoff=fraction:0.3`, `handoff=timestep:850`.
    """
    if isinstance(spec, Plan):
        if spec.grid != grid:
            raise InputError(
                f"plan {spec.name!r} was made for another time grid of {len(spec)} steps; make it"
                " for this one."
            )
        return spec
    spec = str(spec).strip()
    if ":" in spec.split("=")[0]:
        return segments(grid, _parse_segments(spec, len(grid)))
    name, _, value = spec.partition("=")
    choose("plan", name, PLANS)
    if name == "reference" and not value:
        return reference(grid, gamma_w)
    if name == "auto":
        return auto(grid, _number(value, "auto's tolerance") if value else 0.02, gamma_w)
    if name == "handoff":
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
    if value:
        raise InputError(f"plan {name!r} takes no value; got {spec!r}.")
    return segments(grid, [Segment(name, len(grid))], name)
