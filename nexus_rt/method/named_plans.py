"""The plans that have names: `reference` and `auto` follow the gate, `handoff` changes generators
at one point. `small` and `large` are plans of one segment."""

from __future__ import annotations

from nexus_rt.core.checks import number, whole
from nexus_rt.core.errors import InputError, choose
from nexus_rt.core.limits import GAMMA_W, MAX_GAMMA_W, MAX_STEPS, MIN_GAMMA_W
from nexus_rt.method.plan import Plan
from nexus_rt.method.plan_options import exact, with_options
from nexus_rt.method.segments import Segment, segments
from nexus_rt.method.step import Step
from nexus_rt.method.time_grid import TimeGrid
from nexus_rt.method.upfb import gate

PLANS = ("reference", "small", "large", "handoff", "auto")
UNITS = ("timestep", "fraction", "sigma")
TOLERANCE = 0.02  # of `auto`


def reference(grid: TimeGrid, gamma_w: float = GAMMA_W) -> Plan:
    """Both generators at every step, w from the gate, energy `reference`: the published
    schedule."""
    name = with_options("reference", _gate_option(gamma_w))
    steps = [
        Step(i, t, s, gate(t, gamma_w), True, True, "reference")
        for i, (t, s) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False))
    ]
    return Plan(name, tuple(steps), grid)


def auto(grid: TimeGrid, tolerance: float = TOLERANCE, gamma_w: float = GAMMA_W) -> Plan:
    """w from the gate, snapped to 0 below `tolerance` and to 1 above `1 - tolerance`; what has no
    share does not run."""
    number("tolerance", tolerance, -MAX_STEPS, MAX_STEPS)
    if not 0 <= tolerance < 0.5:
        raise InputError(
            f"auto's tolerance is {tolerance}; expected a weight from 0 up to (not including) 0.5.",
            code="out_of_range",
            param="tolerance",
        )
    name = with_options(f"auto={exact(tolerance)}", _gate_option(gamma_w))
    steps = []
    for i, (t, s) in enumerate(zip(grid.timesteps, grid.sigmas, strict=False)):
        w = gate(t, gamma_w)
        w = 0.0 if w < tolerance else 1.0 if w > 1 - tolerance else w
        steps.append(Step(i, t, s, w, w > 0, w < 1, "progressive", blended=w > 0))
    return Plan(name, tuple(steps), grid)


def handoff(grid: TimeGrid, at: float, unit: str = "timestep", bridge: int | None = None) -> Plan:
    """The small generator alone, a cosine ramp over `bridge` steps, then the large one alone.

    Args:
        at: where the small one stops running alone: a timestep (it runs while t >= at, as
            diffusers' boundary has it), a fraction of the steps, or a sigma, as `unit` says.
        bridge: steps with both; the default is a tenth of the schedule, at most what is left.
    """
    n = len(grid)
    choose("handoff unit", unit, UNITS)
    number("handoff", at, -1e9, 1e9)
    if bridge is not None:
        whole("bridge", bridge, -MAX_STEPS, MAX_STEPS)
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
            f"handoff at {unit} {exact(at)} lies outside the schedule of {n} steps; expected"
            f" {spans[unit]}, or plan 'small' or 'large'.",
            code="out_of_range",
            param="handoff",
        )
    bridge = max(0, min(max(1, round(n / 10)), n - alone - 1)) if bridge is None else bridge
    if bridge < 0 or alone + bridge > n - (bridge > 0):
        raise InputError(
            f"a bridge of {bridge} steps after {alone} small ones leaves none of the {n} for the"
            " large one.",
            code="out_of_range",
            param="bridge",
        )
    if bridge and not alone:
        raise InputError(
            f"handoff at {unit} {exact(at)} leaves the small generator no step of its own in {n};"
            " hand over later.",
            param="handoff",
        )
    parts = [
        Segment("small", alone),
        Segment("bridge", bridge),
        Segment("large", n - alone - bridge),
    ]
    where = exact(at) if unit == default_unit(at) else f"{unit}:{exact(at)}"
    return segments(grid, parts, f"handoff={where},bridge={bridge}")


def default_unit(at: float) -> str:
    """The unit of a handoff's number where its text has none."""
    return "fraction" if at < 1 else "timestep"


def _gate_option(gamma_w: float) -> dict[str, str]:
    """The option of a plan whose gate is another than the published."""
    number("gamma_w", gamma_w, MIN_GAMMA_W, MAX_GAMMA_W)
    return {} if gamma_w == GAMMA_W else {"gamma-w": exact(gamma_w)}
