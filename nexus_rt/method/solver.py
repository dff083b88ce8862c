"""The solvers that walk a time grid.

A solver here is a table of scalars: UniPC's predictor and corrector are linear in the samples and
predictions of the last two steps, so their coefficients are computed once per grid, in float64, and
a step is a few scaled additions (in one Triton launch where that is asked for).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nexus_rt.core.errors import InputError, choose
from nexus_rt.core.limits import SOLVERS
from nexus_rt.method.guidance import Prediction, Velocity
from nexus_rt.method.time_grid import TimeGrid


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
