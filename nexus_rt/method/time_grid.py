"""The noise levels that a call walks: Wan's time grid, lists of timesteps, and clocks of each
generator's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real

import numpy as np

from nexus_rt.core.checks import switch
from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.limits import MAX_SHIFT, MAX_STEPS, MIN_SHIFT, TRAIN_STEPS

FIRST = 1 - 1 / TRAIN_STEPS  # u at the first step: sigma = shift u / (1 + (shift-1) u)
MIN_TIMESTEP = 1e-3  # of a list: a millionth of the noise
MIN_RENOISE, MAX_RENOISE = 1e-4, 0.9999  # sigmas


@dataclass(frozen=True)
class TimeGrid:
    """The noise levels that a call walks.

    sigmas: n+1 noise levels, the last 0. timesteps: n numbers 1000..0, the generators' input, whole
        ones but for lists that were given.
    shift: what the sigmas were shifted by; None where they come from elsewhere.
    restarts: steps that begin on re-noised latents: the step before ends at sigma 0, and the solver
        begins anew.
    solvers: steps from which another solver than the call's walks, and its name; a plan's steps
        hold the same, so that it has no part in whether two grids are equal.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    shift: float | None = field(default=None, compare=False)
    restarts: tuple[int, ...] = ()
    solvers: tuple[tuple[int, str], ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.timesteps)

    def legs(self) -> list[TimeGrid]:
        """The grids that a solver walks without a break: to 0 where a restart follows, else to the
        next one's first sigma."""
        starts = {0, *self.restarts, *(step for step, _ in self.solvers)}
        return [
            TimeGrid(
                (*self.sigmas[a:b], 0.0 if b in self.restarts else self.sigmas[b]),
                self.timesteps[a:b],
                self.shift,
            )
            for a, b in pairwise([*sorted(starts), len(self)])
        ]

    def solver_at(self, step: int, default: str) -> str:
        """The name of the solver that walks a step."""
        return next((name for start, name in reversed(self.solvers) if start <= step), default)


def time_grid(steps: int, shift: float = 5.0, float64_timesteps: bool = False) -> TimeGrid:
    """Wan's official grid.

    `s = linspace(0.999, 0, steps+1)[:-1]`, `sigma = shift s / (1 + (shift-1) s)` in float32,
    timestep `int(1000 sigma)`. diffusers' `use_flow_sigmas` grid differs by up to 5e-3 in sigma;
    this one is what the checkpoints were published with.

    Args:
        shift: larger spends more steps at high noise; 5.0 is Wan's default, 3.0 its advice for
            small frames.
        float64_timesteps: timesteps of the sigmas before they are rounded to float32, from s =
            float32(0.999), as the published scheduler computes them: a timestep in a few hundred is
            another.
    """
    try:
        possible = not isinstance(steps, bool) and 1 <= steps <= MAX_STEPS and int(steps) == steps
    except Exception:  # whatever an object's own comparison raises
        possible = False
    if not possible:
        raise InputError(
            f"num_inference_steps is {shown(steps)}; expected a whole number of at least 1 and at"
            f" most {MAX_STEPS}.",
            code="out_of_range" if _is(steps, Integral) else "invalid_type",
            param="num_inference_steps",
        )
    check_shift(shift)
    switch("float64_timesteps", float64_timesteps)
    s = np.linspace(float(np.float32(FIRST)) if float64_timesteps else FIRST, 0, int(steps) + 1)[
        :-1
    ]
    exact = shift * s / (1 + (shift - 1) * s)
    sigmas = exact.astype(np.float32)
    timesteps = (
        exact * TRAIN_STEPS if float64_timesteps else sigmas * np.float32(TRAIN_STEPS)
    ).astype(np.int64)
    levels = (*map(float, sigmas), 0.0)
    return check_levels(TimeGrid(levels, tuple(map(int, timesteps)), float(shift)))


def listed_grid(timesteps: Sequence[float], shift: float) -> TimeGrid:
    """A grid of the timesteps that a few-step model was distilled at.

    Lists are before the shift, as publishers and diffusers' schedulers have them: `[1000, 750, 500,
    250]` with shift 5 walks sigma 1, 0.9375, 0.8333 and 0.625, and the generators are told 1000
    sigma. A list that is shifted already goes with shift 1.

    Raises:
        InputError: not descending numbers above 0 and up to 1000, or two that are one noise level.
    """
    check_shift(shift)
    try:
        values = [float(t) for t in timesteps[: MAX_STEPS + 1]]
    except Exception:  # no list, or what its items raise
        values = []
        shown_values = shown(timesteps)
    else:
        shown_values = ", ".join(f"{v:g}" for v in values[:8]) or "none"
    falls = all(a > b for a, b in pairwise(values))
    inside = values and values[-1] >= MIN_TIMESTEP and values[0] <= TRAIN_STEPS
    if isinstance(timesteps, str) or not falls or not inside or len(values) > MAX_STEPS:
        raise InputError(
            f"timesteps are {shown_values}; expected a descending list of at most {MAX_STEPS},"
            f" from at most {TRAIN_STEPS} to at least {MIN_TIMESTEP:g}, such as 1000,750,500,250.",
            param="timesteps",
        )
    sigmas = tuple(shifted(v / TRAIN_STEPS, shift) for v in values)
    grid = TimeGrid((*sigmas, 0.0), tuple(TRAIN_STEPS * s for s in sigmas), float(shift))
    return check_levels(grid)


def clock_grid(
    clocks: Sequence[tuple[int, int]],
    shift: float,
    renoise: Mapping[int, float] | None = None,
    shifts: Sequence[float | None] = (),
) -> TimeGrid:
    """A grid on which each generator has its own number of steps.

    A clock (k, n) walks k of n equal steps in u from where the one before stopped towards 0, the
    first from `FIRST`: `u_j = u (1 - j/n)`, `sigma = shift u / (1 + (shift-1) u)`. The sigmas go on
    across the seam, so a multistep solver keeps its history.

    Args:
        clocks: (steps walked, steps of the whole clock) in order; the last walks all of its own.
        renoise: clock index -> sigma: that clock begins at this sigma on re-noised latents, and the
            one before it ends at 0.
        shifts: of each clock, where it has one of its own; sigma goes on across the seam, and u is
            counted anew.

    Raises:
        InputError: a clock that walks more steps than it has, or does not end at 0 where it must; a
            sigma outside (0, 1); a shift outside its range; levels of noise that are the same.
    """
    for own in (shift, *(s for s in shifts if s is not None)):
        check_shift(own)
    if (total := sum(walked for walked, _ in clocks)) > MAX_STEPS:
        raise InputError(
            f"the clocks walk {total} steps in all; expected at most {MAX_STEPS}.",
            code="out_of_range",
            param="steps",
        )
    renoise = renoise or {}
    exact: list[float] = []
    sigma, restarts = shifted(FIRST, (shifts[0] if shifts else None) or shift), []
    for i, (walked, steps) in enumerate(clocks):
        own = (shifts[i] if shifts else None) or shift
        if not 1 <= walked <= steps:
            raise InputError(
                f"a clock of {steps} steps cannot walk {walked} of them.",
                code="out_of_range",
                param="clock",
            )
        last = i + 1 == len(clocks) or i + 1 in renoise
        if last and walked < steps:
            raise InputError(
                f"the last segment walks {walked} of the {steps} steps of its clock, which leaves"
                f" noise in the clip; let it walk all of them, as in large:{steps}.",
                code="mismatch",
                param="clock",
            )
        if not last and walked == steps:
            raise InputError(
                f"a clock of {steps} steps that walks all of them leaves no noise for the next"
                " generator; write how many it has in all, as in small:4/10, or re-noise between"
                " (renoise=0.75).",
                param="clock",
            )
        if i in renoise:
            sigma = renoise[i]
            if not MIN_RENOISE <= sigma <= MAX_RENOISE or i == 0:
                raise InputError(
                    f"renoise={sigma:g} stands between two segments and is a sigma between 0 and 1"
                    f" ({MIN_RENOISE:g} to {MAX_RENOISE:g}), such as renoise=0.75.",
                    code="out_of_range" if i else "invalid_value",
                    param="renoise",
                )
            restarts.append(len(exact))
        u = sigma / (own - (own - 1) * sigma)
        exact += [shifted(u * (1 - j / steps), own) for j in range(walked)]
        sigma = shifted(u * (1 - walked / steps), own)
    sigmas = np.array(exact).astype(np.float32)
    timesteps = (sigmas * np.float32(TRAIN_STEPS)).astype(np.int64)
    levels = (*map(float, sigmas), 0.0)
    return check_levels(TimeGrid(levels, tuple(map(int, timesteps)), shift, tuple(restarts)))


def shifted(u: float, shift: float) -> float:
    """The sigma of a share u of the schedule: `shift u / (1 + (shift-1) u)`."""
    return shift * u / (1 + (shift - 1) * u)


def check_shift(shift: float) -> None:
    """Raise an `InputError` unless a schedule can be shifted by this."""
    try:
        possible = not isinstance(shift, bool) and bool(MIN_SHIFT <= shift <= MAX_SHIFT)
    except Exception:  # whatever an object's own comparison raises
        possible = False
    if not possible:
        raise InputError(
            f"shift is {shown(shift)}; expected a number from {MIN_SHIFT:g} to {MAX_SHIFT:g},"
            " such as 5.0.",
            code="out_of_range" if _is(shift, Real) else "invalid_type",
            param="shift",
        )


def check_levels(grid: TimeGrid) -> TimeGrid:
    """The grid, whose noise must fall at every step within a leg: solvers divide by the
    difference of two levels, in float32.

    Raises:
        InputError: two levels are the same.
    """
    for leg in grid.legs():
        levels = np.array(leg.sigmas, np.float32)
        if (same := np.flatnonzero(levels[1:] >= levels[:-1])).size:
            level = leg.sigmas[same[0]]
            raise InputError(
                f"a schedule of {len(grid)} steps has noise level {level:g} twice, as float32 has"
                " it; take fewer steps, timesteps further apart, or a shift nearer to 1.",
                code="duplicate",
                param="sigmas",
            )
    return grid


def _is(value: object, kind: type) -> bool:
    """Whether a value is a number of a kind, which a bool is not."""
    return isinstance(value, kind) and not isinstance(value, bool)
