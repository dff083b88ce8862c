"""The GPU suite in its dry mode: every part runs, a wrong kernel gets no speed, what breaks or is
late is written down."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from nexus_rt.bench import gpu_correctness, gpu_pipeline, gpu_suite, gpu_tables, tables

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))


def suite(**change):
    return gpu_suite.Suite(**{"dry": True, "deadline": time.monotonic() + 300, **change})


def test_the_whole_suite_runs_dry(tmp_path):
    command = [
        sys.executable,
        "-m",
        "nexus_rt.bench.gpu_suite",
        "--dry",
        "--out",
        str(tmp_path / "out"),
    ]
    said = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "NEXUS_RT_CACHE": str(tmp_path / "c")},
    )
    assert said.returncode == 0, said.stderr[-2000:]
    (file,) = (tmp_path / "out").glob("*.json")
    results = json.loads(file.read_text())
    assert results.keys() == {"run", *gpu_suite.PARTS} and results["run"]["dry"]
    assert (
        all(row["right"] for row in results["correctness"].values())
        and len(results["correctness"]) == 14
    )
    assert all(row["ms"] > 0 and row["percent_of_roof"] > 0 for row in results["kernels"].values())
    assert {n.split()[0] for n in results["kernels"]} == {
        "band_blend",
        "band_filter",
        "solver_step",
        "modulate",
        "qk_norm_rope",
    }
    assert all(row["chosen"] in row["backends"] for row in results["attention"].values())
    for part in ("dit small", "dit large"):
        assert results[part]["triton"]["difference"] < 1e-5 and results[part]["diffusers"]["ms"] > 0
    assert set(results["swap"]) == {"resident", "prefetched", "swapped", "streamed"}
    assert all(
        row["first_over_median"] > 0 and row["small_ms"] > 0 for row in results["swap"].values()
    )
    exported = results["engines"]["tiny: onnx"]
    assert (
        exported["difference"] < 1e-4
        and exported["parity_error"] < 1e-3
        and exported["build_s"] > 0
    )
    assert {f"peer {p}" for p in ("diffusers", "switch", "naive")} <= results["pipeline"].keys()
    assert all(results["pipeline"][plan]["predicted_ms"] > 0 for plan in gpu_pipeline.PLANS)
    assert all(
        results["pipeline"][f"peer {p}"]["latent_error"] < 1e-3
        for p in ("diffusers", "switch", "naive")
    )
    found = {name: value for name, _, value, _ in gpu_tables.targets(results)}
    # on a CPU: a GPU's memory, the blend at true size, fp8
    missing = [n for n, v in found.items() if v is None]
    assert (
        all("memory" in n or "fp8" in n or n.startswith("band_blend") for n in missing)
        and len(missing) == 7
    ), missing
    text = file.with_suffix(".md").read_text()
    assert "not measured" in text and tables.made_of(file).count("not measured") == 7
    assert "CPU, dry: no speed here means anything" in text and "(chosen)" in text


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    from nexus_rt.kernels import modulate

    right = modulate.modulate
    monkeypatch.setattr(
        modulate, "modulate", lambda *a, **k: tuple(t * 1.001 for t in right(*a, **k))
    )
    s = suite()
    monkeypatch.setattr(gpu_suite, "loop_calls", lambda suite: {})  # the slowest to interpret
    results = gpu_suite.run(s, ["correctness", "roofs", "kernels"])
    assert s.wrong == {"modulate"} and not results["correctness"]["modulate 64"]["right"]
    for name, row in results["kernels"].items():
        assert ("refused" in row and "ms" not in row) == name.startswith("modulate")


def test_a_kernel_that_does_not_run_is_wrong_and_the_others_are_checked(monkeypatch):
    from nexus_rt.kernels import solver_step

    def broken(*args):
        raise RuntimeError("PassManager::run failed\nand more")

    monkeypatch.setattr(solver_step, "solver_step", broken)
    s = suite()
    rows = gpu_suite.run(s, ["correctness"])["correctness"]
    assert s.wrong == {"solver_step"} and len(rows) == 14
    assert rows["solver_step"] == {
        "failed": "RuntimeError: PassManager::run failed",
        "right": False,
    }


def test_a_kernel_that_writes_nan_is_wrong():
    bad = torch.full((2, 2), float("nan"))
    assert not gpu_correctness.compare(bad, torch.zeros(2, 2).double(), torch.zeros(2, 2))["right"]


def test_a_part_that_breaks_leaves_the_others(monkeypatch):
    def broken(suite):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(gpu_suite.PARTS, "kernels", broken)
    results = gpu_suite.run(suite(), ["kernels", "roofs"])
    assert results["kernels"]["failed"].startswith(
        "RuntimeError: no such thing (test_gpu_suite.py:"
    )
    assert results["roofs"]["copy_gbps"] > 0


def test_a_run_that_is_killed_leaves_what_it_had_measured(monkeypatch, tmp_path):
    def killed(suite):
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_suite.PARTS, "kernels", killed)
    mark = {"date": "2026-01-02T03:04:05+00:00"}
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.run(
            suite(),
            ["roofs", "kernels"],
            lambda found: gpu_suite.keep(tmp_path, {"run": mark, **found}),
        )
    assert json.loads((tmp_path / "2026-01-02T0304.json").read_text())["roofs"]["copy_gbps"] > 0
    assert "## roofs" in (tmp_path / "2026-01-02T0304.md").read_text()


def test_what_the_time_does_not_reach_is_said():
    results = gpu_suite.run(suite(deadline=time.monotonic() - 1), ["roofs", "kernels"])
    assert all("not_reached" in r for r in results.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_suite"])
    with pytest.raises(SystemExit, match="--dry"):
        gpu_suite.main()


def test_every_variant_of_the_dit_is_tried_and_a_failing_one_named(monkeypatch):
    from nexus_rt.models.wan import WanTransformer

    use = WanTransformer.use_kernels

    def refuse(self, kernels, *rest):
        if kernels == "triton":
            raise RuntimeError("out of memory")
        return use(self, kernels, *rest)

    monkeypatch.setattr(WanTransformer, "use_kernels", refuse)
    rows = gpu_suite.dit(suite(), "tiny")
    assert rows["triton"] == {"failed": "RuntimeError: out of memory"} and rows["torch"]["ms"] > 0


def test_a_way_to_load_that_is_wrong_gets_no_speed():
    from nexus_rt.attention import Case

    s = suite()
    s.results["correctness"] = {"attention 32 x2 7 keys, pointers": {"right": False}}
    found = gpu_suite._other_loads(s, Case(1, 8, 8, 2, 32, s.dtype, s.device, False))
    assert found["triton, pointers"] == {"why": "it is wrong: see correctness"}
    assert "16-bit" in found["triton, descriptors"]["why"] and len(found) == 6


def test_what_was_wanted_stands_beside_what_was_measured():
    """A miss stays in the table, and what was not measured is not met."""
    blend = {"eager_called_ms": 0.09, "called_ms": 0.01, "percent_of_roof": 71.0}
    backends = {
        "sdpa": {"ms": 4.0},
        "cudnn": {"ms": 3.0},
        "triton": {"ms": 3.2},
        "triton, pointers": {"ms": 5.0},
        "triton-fp8": {"ms": 2.0},
        "flash": {"why": "not there"},
    }
    results = {
        "run": {},
        "kernels": {
            "band_blend 90x160": blend,
            "modulate 14B 9": {"percent_of_roof": 90.0},
            "modulate 1.3B 9": {"failed": "x"},
        },
        "attention": {
            "self 14B": {"chosen": "cudnn", "backends": backends},
            "cross": {"chosen": "sdpa", "backends": {}},
        },
        "dit large": {
            "torch": {"ms": 2200.0},
            "triton": {"ms": 2000.0},
            "diffusers": {"ms": 4000.0},
            "diffusers, blocks compiled": {"ms": 2200.0},
        },
        "swap": {"resident": {"first_over_median": 1.3, "planned_over_peak": 0.97}},
        "pipeline": {
            "costs": {"large_guided": 4100.0},
            "reference": {"prediction_error": -0.07},
            "peer naive": {"ratio": 2},
        },
    }
    found = {name: (value, met) for name, _, value, met in gpu_tables.targets(results)}
    assert found["band_blend 90x160, against eager"] == (pytest.approx(9), True)
    assert found["band_blend 90x160, percent of the copy"] == (71.0, False)
    assert found["band_blend 60x104, against eager"] == (None, None)
    # one of the two failed
    assert found["modulate, percent of the copy, the least of 2"] == (
        None,
        None,
    )
    assert found["attention self 14B: auto against the best of PyTorch's"] == (1.0, True)
    assert found["attention self 14B: triton"] == (pytest.approx(3.0 / 3.2), True)
    assert found["attention self 14B: triton-fp8"] == (1.5, True)
    assert found["14B, a guided step in seconds"] == (4.1, True)
    assert found["14B, a forward against the best of diffusers'"] == (1.1, False)
    assert found["the step after the swap over the median, resident"] == (1.3, False)
    assert found["peak memory off the plan, percent, resident"] == (pytest.approx(3), True)
    assert found["plan reference: price off its time, percent"] == (pytest.approx(7), False)
    assert "| at most 5 | 7 | **no** |" in gpu_tables.targets_table(results)
    assert all(
        value is None
        for _, _, value, _ in gpu_tables.targets({"run": {}, "pipeline": {"not_reached": "late"}})
    )
