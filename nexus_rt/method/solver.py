"""Wan's time grid, and the solvers that walk it.

A solver here is a table of scalars: UniPC's predictor and corrector are linear in the samples and
predictions of the last two steps, so their coefficients are computed once per grid, in float64, and
a step is a few scaled additions (in one Triton launch where that is asked for).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real

import numpy as np
from torch import Tensor

from nexus_rt.core.checks import switch
from nexus_rt.core.errors import InputError, choose, shown
from nexus_rt.core.limits import MAX_SHIFT, MAX_STEPS, MIN_SHIFT, SOLVERS, TRAIN_STEPS
from nexus_rt.method.guidance import Prediction, Velocity

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


FIRST = 1 - 1 / TRAIN_STEPS  # u at the first step: sigma = shift u / (1 + (shift-1) u)


def _is(value: object, kind: type) -> bool:
    """Whether a value is a number of a kind, which a bool is not."""
    return isinstance(value, kind) and not isinstance(value, bool)


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


def shifted(u: float, shift: float) -> float:
    """The sigma of a share u of the schedule: `shift u / (1 + (shift-1) u)`."""
    return shift * u / (1 + (shift - 1) * u)


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


@dataclass(frozen=True)
class SolverStep:
    """Scalars of one step. m is a prediction of the clean latents, m_k the one k steps ago.

    corrector: x <- c_x x_(-1) + c_0 m_0 + c_1 m_1 + c_2 m_2 (None where there is none);
    predictor: x_next = p_x x + p_0 m_0 + p_1 m_1. Trailing zeros are left out: what is not read
        need not exist.
    """

    sigma: float
    corrector: tuple[float, ...] | None
    predictor: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("corrector", "predictor"):
            scalars = getattr(self, name)
            while scalars and scalars[-1] == 0.0 and len(scalars) > 2:
                scalars = scalars[:-1]
            object.__setattr__(self, name, scalars)


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)


def _phi(h: float) -> tuple[float, float, float]:
    """expm1(-h) and the next two phi functions of UniPC, at -h (h may be inf)."""
    e1 = math.expm1(-h)
    if math.isinf(h):
        return -1.0, -1.0, -0.5
    p1 = e1 / -h - 1
    return e1, p1, p1 / -h - 0.5


def unipc_table(grid: TimeGrid) -> list[SolverStep]:
    """Coefficients of UniPC (arXiv 2302.04867), order 2, B(h) = e^h - 1 (`bh2`), predicting clean
    data, for flow matching.

    alpha = 1 - sigma; the last step is first order (`lower_order_final`), as is the first
    (warm-up).
    """
    sigmas, n = grid.sigmas, len(grid)
    lam = [_log_snr(s) for s in sigmas]
    order = [min(2, i + 1, n - i) for i in range(n)]
    table = []
    for i in range(n):
        corrector = None
        if i > 0:  # from step i-1 to i, now that the prediction at i is known
            h, alpha = lam[i] - lam[i - 1], 1 - sigmas[i]
            e1, p1, p2 = _phi(h)
            if order[i - 1] == 1:
                rho_old, rho_new, ratio = 0.0, 0.5, 1.0
            else:
                ratio = (lam[i - 2] - lam[i - 1]) / h
                b1, b2 = p1 / e1, 2 * p2 / e1  # solves [[1, 1], [ratio, 1]] rho = b
                rho_old = (b2 - b1) / (ratio - 1)
                rho_new = b1 - rho_old
            corrector = (
                sigmas[i] / sigmas[i - 1],
                -alpha * e1 * rho_new,
                -alpha * e1 * (1 - rho_new - rho_old / ratio),
                -alpha * e1 * rho_old / ratio,
            )
        h, alpha = lam[i + 1] - lam[i], 1 - sigmas[i + 1]
        e1 = _phi(h)[0]
        second = 0.5 * h / (lam[i - 1] - lam[i]) if order[i] == 2 else 0.0
        predictor = (sigmas[i + 1] / sigmas[i], -alpha * e1 * (1 - second), -alpha * e1 * second)
        table.append(SolverStep(sigmas[i], corrector, predictor))
    return table


def euler_table(grid: TimeGrid) -> list[SolverStep]:
    """First order: `x + (sigma_next - sigma) v`, written with the clean prediction
    `x - sigma v`."""
    pairs = zip(grid.sigmas, grid.sigmas[1:], strict=False)
    return [SolverStep(s, None, (after / s, 1 - after / s)) for s, after in pairs]


# "lcm" is Euler to sigma 0 at every step, and noise again (arXiv 2310.04378's multistep sampling)
TABLES = {"unipc": unipc_table, "euler": euler_table, "lcm": euler_table}


class Solver:
    """Walks a table, with what of the last steps it needs: call `step` for index 0, 1, ... in
    order.

    use_triton: a step is one Triton launch, guidance and energy factor included; else PyTorch.
    """

    def __init__(self, table: list[SolverStep], use_triton: bool = False) -> None:
        self.table, self.use_triton = table, use_triton
        self.history: list[
            Tensor
        ] = []  # the corrected latents of the step before, then clean predictions, newest first

    def step(self, index: int, latents: Tensor, velocity: Velocity | Tensor) -> Tensor:
        """The latents at step index+1, float32; `velocity` is the blended one at step `index`."""
        later = self.table[index + 1] if index + 1 < len(self.table) else None
        keep = later is not None and (later.corrector is not None or len(later.predictor) > 2)
        step = self._triton if self.use_triton else self._torch
        latents, last, clean = step(self.table[index], latents, velocity, keep)
        self.history = [last, clean, *self.history[1:2]] if keep else []
        return latents

    def _torch(
        self, c: SolverStep, x: Tensor, velocity: Velocity | Tensor, keep: bool
    ) -> tuple[Tensor, ...]:
        v = velocity if isinstance(velocity, Tensor) else velocity.tensor()
        clean = x.sub(v, alpha=c.sigma)
        if c.corrector is not None:
            x = self._sum(c.corrector, self.history[0], clean, *self.history[1:])
        return self._sum(c.predictor, x, clean, *self.history[1:]), x, clean

    @staticmethod
    def _sum(scalars: tuple[float, ...], first: Tensor, *rest: Tensor) -> Tensor:
        out = first * scalars[0]
        for scalar, m in zip(scalars[1:], rest, strict=False):
            out.add_(m, alpha=scalar)
        return out

    def _triton(
        self, c: SolverStep, x: Tensor, velocity: Velocity | Tensor, keep: bool
    ) -> tuple[Tensor, ...]:
        from nexus_rt.kernels.solver_step import solver_step

        velocity = Velocity(Prediction(velocity)) if isinstance(velocity, Tensor) else velocity
        p, corrector = velocity.prediction, c.corrector or (0.0,)
        pad = lambda scalars, size: [*scalars, *[0.0] * (size - len(scalars))]
        return solver_step(
            x.contiguous(),
            p.conditional,
            p.unconditional,
            p.scale,
            velocity.sums,
            velocity.energy,
            velocity.w,
            [c.sigma, *pad(corrector, 4), *pad(c.predictor, 3)],
            self.history,
            len(corrector) - 1,
            len(c.predictor) - 1,
            keep,
        )


def check_solver(name: str, grid: TimeGrid) -> None:
    """Raise an `InputError` unless the solver, where a step has no other, can walk a grid."""
    first = 0
    for leg in grid.legs():
        if grid.solver_at(first, name) == "unipc" and leg.sigmas[0] >= 1:
            raise InputError(
                f"the schedule begins at timestep {leg.timesteps[0]:g}, pure noise, where UniPC has"
                " no log-SNR; pass solver 'euler' or 'lcm', or begin at 999.",
                code="conflict",
                param="solver",
            )
        first += len(leg)


def make_solver(name: str, grid: TimeGrid, use_triton: bool = False) -> Solver:
    """A fresh solver for one generation: "unipc", "euler", or "lcm" on a grid that re-noises (see
    `Plan.walked_by`)."""
    choose("solver", name, SOLVERS)
    check_solver(name, grid)
    table: list[SolverStep] = []
    for leg in grid.legs():
        table += TABLES[grid.solver_at(len(table), name)](leg)
    return Solver(table, use_triton)
