"""Wan's time grid, and the solvers that walk it.

A solver here is a table of scalars: UniPC's predictor and corrector are linear in the samples and predictions of the
last two steps, so their coefficients are computed once per grid, in float64, and a step is a few scaled additions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nexus_rt.errors import InputError, choose

TRAIN_STEPS = 1000
SOLVERS = ("unipc", "euler")


@dataclass(frozen=True)
class TimeGrid:
    """sigmas: n+1 noise levels, the last 0. timesteps: n integers 999..0, what the generators are told."""

    sigmas: tuple[float, ...]
    timesteps: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.timesteps)


def time_grid(steps: int, shift: float = 5.0) -> TimeGrid:
    """Wan's official grid.

    `s = linspace(0.999, 0, steps+1)[:-1]`, `sigma = shift s / (1 + (shift-1) s)` in float32, timestep `int(1000 sigma)`.
    diffusers' `use_flow_sigmas` grid differs by up to 5e-3 in sigma; this one is what the checkpoints were published with.

    Args:
        shift: larger spends more steps at high noise; 5.0 is Wan's default, 3.0 its advice for small frames.
    """
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise InputError(f"num_inference_steps is {steps}; expected a whole number of at least 1.")
    if not (shift > 0 and math.isfinite(shift)):
        raise InputError(f"shift is {shift}; expected a positive number, such as 5.0.")
    s = np.linspace(1 - 1 / TRAIN_STEPS, 0, int(steps) + 1)[:-1]
    sigmas = (shift * s / (1 + (shift - 1) * s)).astype(np.float32)
    timesteps = (sigmas * np.float32(TRAIN_STEPS)).astype(np.int64)
    return TimeGrid((*map(float, sigmas), 0.0), tuple(map(int, timesteps)))


class Euler:
    """First order: `x + (sigma_next - sigma) v`."""

    def __init__(self, grid: TimeGrid) -> None:
        self.sigmas = grid.sigmas

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """The latents at step index+1, float32; `velocity` is the blended one at step `index`."""
        return latents.add(velocity, alpha=self.sigmas[index + 1] - self.sigmas[index])


@dataclass(frozen=True)
class UniPCStep:
    """Scalars of one step. m is a prediction of the clean latents, m_k the one k steps ago.

    corrector: x <- c_x x_(-1) + c_0 m_0 + c_1 m_1 + c_2 m_2 (None at the first step);
    predictor: x_next = p_x x + p_0 m_0 + p_1 m_1.
    """

    sigma: float
    corrector: tuple[float, float, float, float] | None
    predictor: tuple[float, float, float]


def _log_snr(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)


def _phi(h: float) -> tuple[float, float, float]:
    """expm1(-h) and the next two phi functions of UniPC, at -h (h may be inf)."""
    e1 = math.expm1(-h)
    if math.isinf(h):
        return -1.0, -1.0, -0.5
    p1 = e1 / -h - 1
    return e1, p1, p1 / -h - 0.5


def unipc_table(grid: TimeGrid) -> list[UniPCStep]:
    """Coefficients of UniPC (arXiv 2302.04867), order 2, B(h) = e^h - 1 (`bh2`), predicting clean data, for flow matching.

    alpha = 1 - sigma; the last step is first order (`lower_order_final`), as is the first (warm-up).
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
        table.append(UniPCStep(sigmas[i], corrector, predictor))
    return table


class UniPC:
    """Second-order predictor-corrector with its history: call `step` for index 0, 1, ... in order."""

    def __init__(self, grid: TimeGrid) -> None:
        self.table = unipc_table(grid)
        self.history: list[Tensor] = []  # clean-latent predictions, newest first
        self.last: Tensor | None = None  # the corrected latents of the step before

    def step(self, index: int, latents: Tensor, velocity: Tensor) -> Tensor:
        """The latents at step index+1, float32; `velocity` is the blended one at step `index`."""
        c = self.table[index]
        clean = latents.sub(velocity, alpha=c.sigma)
        if c.corrector is not None:
            latents = self._combine(self.last, c.corrector, [clean, *self.history])
        self.last, self.history = latents, [clean, *self.history[:1]]
        return self._combine(latents, c.predictor, self.history)

    @staticmethod
    def _combine(x: Tensor, scalars: tuple[float, ...], predictions: list[Tensor]) -> Tensor:
        out = x * scalars[0]
        for scalar, m in zip(scalars[1:], predictions, strict=False):
            if scalar != 0.0:
                out.add_(m, alpha=scalar)
        return out


def make_solver(name: str, grid: TimeGrid) -> UniPC | Euler:
    """A fresh solver for one generation."""
    return {"unipc": UniPC, "euler": Euler}[choose("solver", name, SOLVERS)](grid)
