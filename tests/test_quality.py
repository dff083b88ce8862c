"""The columns that stand beside a speed, and the spans it is made of."""

import json
import math
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt.bench import measure, quality
from nexus_rt.bench.latency import clean_latents, middle, prediction, swap_ratio
from nexus_rt.core.tracing import record, span
from nexus_rt.method.plan import StepCosts
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.solver import make_solver
from nexus_rt.method.time_grid import time_grid


def frames(seed, shape=(2, 16, 20, 3)):
    return np.random.default_rng(seed).random(shape)


def ssim_by_hand(a, b):
    """Wang et al.'s formula, a window at a time."""
    x, y = (v @ np.array([0.299, 0.587, 0.114]) for v in (a, b))
    taps = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(taps, taps) / np.outer(taps, taps).sum()
    values = []
    for f in range(len(x)):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                p, q = x[f, i : i + 11, j : j + 11], y[f, i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append(
                    (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
                )
    return np.mean(values)


def test_ssim_is_its_formula():
    a = frames(0)
    for b in (frames(1), np.clip(a + 0.1 * frames(2), 0, 1), 1 - a):
        assert quality.ssim(a, b) == pytest.approx(ssim_by_hand(a, b), abs=1e-10)
    assert quality.ssim(a, a) == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-3, 0.5))
def test_psnr_of_a_constant_error_is_its_logarithm(error):
    a = np.zeros((3, 4, 5, 3))
    assert quality.psnr(a, a + error) == pytest.approx(-20 * math.log10(error))
    assert quality.psnr(a, a) == math.inf


def test_quality_columns():
    latents, a = torch.randn(1, 16, 2, 4, 6), frames(3)
    same = quality.distance(latents, a, latents, a)
    assert same["identical"] and same["psnr_db"] is None and same["latent_error"] == 0
    other = quality.distance(2 * latents, a + 0.01, latents, a)
    assert (
        other["latent_error"] == pytest.approx(1)
        and other["psnr_db"] == pytest.approx(40)
        and not other["identical"]
    )
    assert quality.distance(latents, None, latents, None) == {"latent_error": 0.0}  # no VAE
    small = frames(4, (1, 8, 8, 3))
    # smaller than the window
    assert quality.distance(latents, small, latents, small)["ssim"] is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.floats(0, 1))
def test_percentile_is_numpys(values, share):
    assert measure.percentile(values, share) == pytest.approx(
        float(np.quantile(values, share)), abs=1e-9
    )


def test_spans_are_recorded_only_where_somebody_records(tmp_path):
    with span("nobody"):
        pass
    with record() as trace:
        for step in range(3):
            with span("small", step=step):
                time.sleep(0.01)
            with span("solver", step=step):
                pass
    with span("after"):
        pass
    totals = trace.totals()
    assert (
        list(totals) == ["small", "solver"] and 30 <= totals["small"] < 300 and totals["solver"] < 5
    )
    durations = measure.step_durations(trace)
    assert (
        len(durations) == 3
        and all(10 <= ms < 100 for ms in durations)
        and sum(durations) >= sum(totals.values()) - 1
    )
    events = json.loads(trace.save(tmp_path / "t.json").read_text())["traceEvents"]
    assert [e["ph"] for e in events] == ["X"] * 6 and sum(
        e["dur"] for e in events
    ) == pytest.approx(1000 * sum(totals.values()))
    assert events == sorted(events, key=lambda e: e["ts"]) and events[0]["args"] == {"step": 0}


def test_a_span_that_fails_is_recorded_and_the_failure_goes_on():
    with record() as trace, pytest.raises(ZeroDivisionError), span("bad"):
        1 / 0  # noqa: B018
    assert list(trace.totals()) == ["bad"]


def test_a_pipelines_spans_cover_its_time(tiny_pipe):
    """What is not named would be time that nobody accounts for."""
    call = lambda: tiny_pipe("a red circle", plan="small:2 bridge:2 large:2", num_inference_steps=6)
    call()
    run = measure.measured(call, torch.device("cpu"))
    totals = run.trace.totals()
    assert set(totals) == {"text", "prepare", "small", "large", "blend", "solver", "vae"}
    assert 0.7 * run.total_ms <= sum(totals.values()) <= run.total_ms
    assert (
        len(measure.step_durations(run.trace)) == 6
        and run.peak_device is None
        and run.energy is None
    )


@pytest.mark.skipif(measure.resident_bytes() is None, reason="resident memory is read from /proc")
def test_peak_memory_is_seen_while_it_lasts():
    before = measure.resident_bytes()

    def use():
        held = bytearray(200_000_000)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(0.1)

    run = measure.measured(use, torch.device("cpu"))
    assert run.peak_host - before > 150_000_000 and threading.active_count() < 20


def test_runs_are_taken_in_turn():
    order = []
    calls = {n: lambda n=n: order.append(n) for n in "ab"}
    found = measure.interleaved(calls, torch.device("cpu"), 2, 1, lambda: order.append("|"))
    assert "".join(order) == "abab|ab|" and [len(r) for r in found.values()] == [2, 2]


def test_a_preview_is_where_the_first_step_points():
    grid, x, v = time_grid(6, 3.0), torch.randn(1, 2, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    for name in ("unipc", "euler"):
        after = make_solver(name, grid, False).step(0, x, v)
        assert torch.allclose(clean_latents(x, after, grid), x - grid.sigmas[0] * v, atol=1e-5)


def test_prices_and_predictions():
    grid = time_grid(10)
    costs = StepCosts(1, 2, 10, 20, blend=0.5, solver=0.25)
    plan = parse_plan("small:4 bridge:2 large:4@1", grid)
    # the bridge's large half is guided as the large is: not
    price = 10 * 0.25 + 4 * 2 + 2 * (2 + 10 + 0.5) + 4 * 10
    assert prediction(plan, costs, (5.0, 5.0), 100.0) == {
        "predicted_ms": price,
        "prediction_error": round(price / 100 - 1, 4),
    }
    assert middle([StepCosts(i, i, 1, 1) for i in (3, 1, 2)]).small == 2
    assert swap_ratio(plan, [1] * 6 + [30, 10, 10, 10]) == 3.0
    assert (
        swap_ratio(parse_plan("reference", grid), [1] * 10) is None
        and swap_ratio(parse_plan("large", grid), [1] * 10) is None
    )
