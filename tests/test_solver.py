"""The time grid and the solvers, against the formulas and against diffusers' solver on the same
grid."""

import importlib.util
import math

import numpy as np
import pytest
import torch

from nexus_rt.core.errors import InputError
from nexus_rt.method.solver import make_solver
from nexus_rt.method.time_grid import TimeGrid, time_grid
from tests.refusals import refuses

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("steps, shift", [(1, 5.0), (4, 3.0), (50, 5.0), (50, 1.0), (30, 8.0)])
def test_grid_follows_the_formula(steps, shift):
    grid = time_grid(steps, shift)
    assert len(grid) == steps and grid.sigmas[-1] == 0.0 and len(grid.sigmas) == steps + 1
    for i in range(steps):
        s = 0.999 * (1 - i / steps)
        sigma = shift * s / (1 + (shift - 1) * s)
        assert grid.sigmas[i] == pytest.approx(sigma, abs=1e-7)
        assert grid.timesteps[i] == int(np.float32(1000) * np.float32(sigma))


def test_grid_of_the_published_schedule():
    grid = time_grid(50, 5.0)
    assert (
        grid.timesteps[:3] == (999, 995, 991)
        and grid.timesteps[0] == 999
        and grid.timesteps[-1] == 92
    )


@pytest.mark.parametrize(
    "steps, code",
    [
        (0, "out_of_range"),
        (-3, "out_of_range"),
        (np.int64(0), "out_of_range"),
        (2.5, "invalid_type"),
        (True, "invalid_type"),
        ("5", "invalid_type"),
    ],
)
def test_steps_must_be_a_positive_whole_number(steps, code):
    with refuses(code, "num_inference_steps", InputError):
        time_grid(steps)


@pytest.mark.parametrize(
    "shift, code",
    [
        *((shift, "out_of_range") for shift in (0.0, -1.0, math.inf, math.nan, np.float32(-1))),
        ("5", "invalid_type"),
        (True, "invalid_type"),
    ],
)
def test_shift_must_be_positive(shift, code):
    with refuses(code, "shift", InputError):
        time_grid(10, shift)


def field(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth, nonlinear velocity field that depends on time."""
    return torch.sin(1.7 * x + sigma) + 0.3 * x * sigma - 0.2


def diffusers_solver(grid: TimeGrid):
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
        lower_order_final=True,
    )
    scheduler.set_timesteps(len(grid))
    scheduler.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32)
    scheduler.timesteps = torch.tensor(grid.timesteps)
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize(
    "steps, shift", [(1, 5.0), (2, 5.0), (3, 3.0), (8, 1.0), (50, 5.0), (50, 3.0), (200, 5.0)]
)
def test_unipc_equals_diffusers_on_the_same_grid(steps, shift, fused):
    grid = time_grid(steps, shift)
    theirs, ours = diffusers_solver(grid), make_solver("unipc", grid, fused)
    torch.manual_seed(0)
    x = y = torch.randn(2, 16, 3, 5, 7)
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(field(x, grid.sigmas[i]), t, x, return_dict=False)[0]
        y = ours.step(i, y, field(y, grid.sigmas[i]))
    assert (x - y).norm() / x.norm() <= 1e-5


@pytest.mark.parametrize("name, order", [("euler", 1), ("unipc", 2)])
def test_order_of_convergence(name, order):
    """Halving the step of x' = -x (x at sigma=1 to 0) cuts the error by at least 2^order
    (float64)."""

    # From sigma 0.9: UniPC's log-SNR steps are unbounded at both ends of the schedule.
    def error(n: int) -> float:
        sigmas = tuple(float(s) for s in np.linspace(0.9, 0.1, n + 1))
        grid = TimeGrid(sigmas, tuple(int(1000 * s) for s in sigmas[:-1]))
        x, s = torch.ones(1, dtype=torch.float64), make_solver(name, grid)
        for i in range(n):
            x = s.step(i, x, -x)
        return abs(float(x) - math.exp(0.8))

    assert error(40) / error(80) >= 0.8 * 2**order


def test_only_what_the_next_step_reads_is_kept():
    """The last step keeps nothing, Euler never does: memory that a decoder can use."""
    for name, most in (("unipc", 3), ("euler", 0)):
        solve, x = make_solver(name, time_grid(4)), torch.zeros(1, 2)
        sizes = []
        for i in range(4):
            x = solve.step(i, x, x)
            sizes.append(len(solve.history))
        assert max(sizes) == most and sizes[-1] == 0


def test_unknown_solver_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'unipc'"):
        make_solver("unipcm", time_grid(4))
