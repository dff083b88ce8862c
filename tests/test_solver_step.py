"""The fused solver step against float64: scalars, history, guidance and energy factor."""

import pytest
import torch

from nexus_rt.kernels.solver_step import ENERGIES, energy_factor, solver_step, solver_step_ref
from tests.needs import needs

needs("triton")
SHAPES = [(1, 2, 1, 60, 104), (2, 3, 2, 17, 23), (3, 1)]
SCALARS = [0.9, 0.7, -0.2, 0.35, 0.11, 0.83, 0.4, -0.09]


def tensors(shape, partials=700):
    g = torch.Generator().manual_seed(sum(shape))
    x, v, twin, last, m1, m2 = (torch.randn(shape, generator=g) for _ in range(6))
    return x, v, twin, [last, m1, m2], torch.rand(3, shape[0], partials, generator=g)


def oracle(x, v, sums, energy, w, history, corrector, predictor):
    """The formulas of the file's head, one by one, float64."""
    sigma, c, p = SCALARS[0], SCALARS[1:5], SCALARS[5:]
    x, v, (last, m1, m2) = x.double(), v.double(), [h.double() for h in history]
    if energy != "none":
        n = x[0].numel()
        s, b, u = ((row.double().sum(-1) / n).sqrt() for row in sums)
        target = {"reference": (s + b * (s / (b + 1e-6))) / 2, "progressive": w * s + (1 - w) * b}[
            energy
        ]
        v = v * (target / (u + 1e-6)).view(-1, *[1] * (x.ndim - 1))
    clean = x - sigma * v
    if corrector:
        x = c[0] * last + sum(
            a * m for a, m in list(zip(c[1:], (clean, m1, m2), strict=True))[:corrector]
        )
    return (
        p[0] * x + sum(a * m for a, m in list(zip(p[1:], (clean, m1), strict=True))[:predictor]),
        x,
        clean,
    )


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, float("nan")))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("corrector, predictor", [(0, 1), (2, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize("guided", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_it_is_the_formula(shape, energy, corrector, predictor, guided, keep):
    x, v, twin, history, sums = tensors(shape)
    if guided:
        v, twin = v.to(guided), twin.to(guided)
        whole = twin.double() + 4.0 * (v.double() - twin.double())
    else:
        twin, whole = None, v
    args = (
        x,
        v,
        twin,
        4.0,
        None if energy == "none" else sums,
        energy,
        0.3,
        SCALARS,
        history,
        corrector,
        predictor,
        keep,
    )
    got, eager = solver_step(*args), solver_step_ref(*args)
    wanted = oracle(x, whole, sums, energy, 0.3, history, corrector, predictor)
    for g, e, w in list(zip(got, eager, wanted, strict=True))[: 3 if keep else 1]:
        allowed = 2 * (e.double() - w).abs().max() + 2e-6 * w.abs().max()
        assert (
            g.dtype == torch.float32
            and torch.isfinite(g).all()
            and (g.double() - w).abs().max() <= allowed
        )
    if keep and not corrector:
        assert got[1] is x  # not copied
    if not keep:
        assert got[2].numel() == 0


def test_the_factor_is_the_formula():
    # of four elements: rms 1, 2, 1.5
    sums = torch.tensor([[[3.0, 1.0]], [[4.0, 12.0]], [[2.0, 7.0]]])
    assert energy_factor(sums, 4, "progressive", 0.25).item() == pytest.approx(1.75 / 1.5, rel=1e-5)
    assert energy_factor(sums, 4, "reference", 0.25).item() == pytest.approx(1 / 1.5, rel=1e-5)
    assert energy_factor(sums, 4, "none", 0.25).item() == 1.0


@pytest.mark.parametrize("partials", [1, 512, 513, 2100])
def test_any_number_of_partial_sums(partials):
    x, v, _, history, sums = tensors((2, 3, 50), partials)
    got = solver_step(x, v, None, 1.0, sums, "progressive", 0.3, SCALARS, history, 3, 2)[0]
    wanted = oracle(x, v, sums, "progressive", 0.3, history, 3, 2)[0]
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(x=torch.zeros(2, 4).half()), "latents is torch.float16"),
        (dict(x=torch.zeros(4, 2).T), "latents has strides"),
        (dict(v=torch.zeros(2, 3)), r"velocity has shape \(2, 3\); expected \(2, 4\)"),
        (dict(v=torch.zeros(2, 4).double()), "velocity is torch.float64"),
        (dict(twin=torch.zeros(2, 4).half()), "velocity_u is torch.float16"),
        (dict(history=[]), "scalars read last, which is missing"),
        (dict(history=[torch.zeros(2, 4)]), "scalars read m1"),
        (dict(energy="reference"), "needs the sums"),
        (dict(sums=torch.zeros(3, 1, 5)), "sums has shape"),
        (dict(x=torch.zeros(3)), r"expected \[B, ...\]"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(change, words):
    z = torch.zeros(2, 4)
    given = {
        "x": z,
        "v": z,
        "twin": None,
        "sums": None,
        "energy": "none",
        "history": [z, z, z],
        **change,
    }
    with pytest.raises(ValueError, match=words):
        solver_step(
            given["x"],
            given["v"],
            given["twin"],
            1.0,
            given["sums"],
            given["energy"],
            0.5,
            SCALARS,
            given["history"],
            3,
            2,
        )


def test_the_op_keeps_torchs_rules(monkeypatch):
    monkeypatch.undo()
    x, v, twin, history, sums = tensors((2, 3, 5), 4)
    op = torch.ops.nexus_rt.solver_step.default
    torch.library.opcheck(op, (x, v, None, sums, *history, 1.0, 0.3, SCALARS, 1, 3, 2, True))
    torch.library.opcheck(
        op, (x, v, twin, None, None, None, None, 4.0, 0.3, SCALARS, 0, 0, 1, False)
    )
