"""The GPU suite in its dry mode: every part runs, a wrong kernel gets no speed, what breaks or is
late is written down."""

import json
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from nexus_rt.bench import (
    gpu_attention,
    gpu_correctness,
    gpu_kernels,
    gpu_pipeline,
    gpu_steps,
    gpu_suite,
    gpu_tables,
    tables,
)
from nexus_rt.bench.gpu_setting import Setting
from nexus_rt.bench.gpu_units import Part, run_part
from tests.interpreter import NO_LOOPS

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(NO_LOOPS is not None, reason=str(NO_LOOPS))
FAULTY = {
    "faulty": Part("tests.faulty:units", 60),
    "correctness": Part("nexus_rt.bench.gpu_correctness:units", 60, lanes=2),
    "hanging": Part("tests.faulty:hanging", 60, lanes=3),
    "slow": Part("tests.faulty:slow", 60),
    "unmade": Part("tests.faulty:unmade", 60),
    "short": Part("tests.faulty:slow", 2.0),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))


def run(*parts, results=None, seconds=120, done=lambda results: None):
    return gpu_suite.run(
        Setting(True, results or {}), parts, time.monotonic() + seconds, done, FAULTY
    )


@interpreted
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
    right = results["correctness"].values()
    assert all(row["right"] for row in right) and len(right) == 14
    assert not gpu_suite.failures(results)
    assert all(row["ms"] > 0 and row["percent_of_roof"] > 0 for row in results["kernels"].values())
    assert {n.split()[0] for n in results["kernels"]} == {
        "band_blend",
        "band_filter",
        "solver_step",
        "modulate",
        "qk_norm_rope",
    }
    assert gpu_attention.chosen(results["attention"], "self tiny") in ("sdpa", "flash", "math")
    for part, kernels in (("step large", "triton"), ("step small", "torch")):
        rows = results[part]
        assert rows["guided"]["kernels"] == kernels and rows["guided"]["ms"] > 0
        assert rows["guided, diffusers"]["difference"] < 1e-5
        assert 1e-5 < rows["guided, fp8 linear"]["difference"] < 0.1
        assert rows["guided, PyTorch's kernels"]["difference"] < 1e-5
        assert "fp8 by row" in rows["guided, fp8 linear"]["layers"]
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
    # on a CPU: a GPU's memory, the blend at true size, fp8 kernels, what is compiled
    missing = [n for n, v in found.items() if v is None]
    expected = ("memory", "triton-fp8", "band_blend", "compiled", "_rows")
    assert all(any(word in n for word in expected) for n in missing) and len(missing) == 11, missing
    text = file.with_suffix(".md").read_text()
    assert text.count("not measured") == 11 and tables.made_of(file).count("not measured") == 11
    assert "CPU, dry: no speed here means anything" in text and "of_best_exact 1" in text


@interpreted
def test_a_hang_a_crash_or_a_broken_device_costs_one_row(tmp_path):
    mark = {"date": "2026-01-02T03:04:05+00:00"}
    done = lambda results: gpu_suite.keep(tmp_path, {"run": mark, **results})
    start = time.monotonic()
    rows = run("faulty", "correctness", done=done)["faulty"]
    assert time.monotonic() - start < 60
    assert rows["hangs"] == {"failed": "it had not ended after 1 s and was killed"}
    assert rows["crashes"] == {"failed": "its process died: of SIGSEGV"}
    assert rows["is killed"] == {"failed": "its process died: of SIGKILL"}
    assert rows["leaves"] == {"failed": "its process died: with exit code 3"}
    assert "illegal memory access" in rows["breaks the device"]["failed"]
    assert rows["raises"] == {"failed": "ZeroDivisionError: division by zero"}
    assert rows["before"]["right"] and rows["after"]["right"] and len(rows) == 8
    assert rows["before"]["process"] != rows["after"]["process"]
    kept = json.loads((tmp_path / "2026-01-02T0304.json").read_text())
    assert kept["faulty"] == rows and all(r["right"] for r in kept["correctness"].values())
    assert len(gpu_suite.failures(kept)) == 6
    assert "## faulty" in (tmp_path / "2026-01-02T0304.md").read_text()


def test_lanes_hang_beside_each_other():
    start = time.monotonic()
    rows = run("hanging")["hanging"]
    assert all("killed" in row["failed"] for row in rows.values()) and len(rows) == 3
    assert time.monotonic() - start < 20


def test_a_kernel_that_hangs_is_wrong_and_what_models_run_by_leaves_it_out():
    hung = {"failed": "it had not ended after 60 s and was killed"}
    late = {"not_reached": "the time was over"}
    s = Setting(True, {"correctness": {"modulate 64": hung, "solver_step 6x10": late}})
    assert s.wrong == {"modulate"} and s.kernels == "torch" and s.attention == "auto"
    # a way to load that the runtime does not choose takes no speed from the kernel
    s = Setting(True, {"correctness": {"attention 32 x2 7 keys, descriptors": hung}})
    assert not s.wrong and s.kernels == "auto"
    loads = gpu_attention.units(s)["self tiny: triton, descriptors"].call()
    assert loads == {"why": "it is wrong: see correctness"}
    tried = {"self tiny: triton": hung, "self tiny: sdpa": {"ms": 1.0, "exact": True}}
    s = Setting(True, {"attention": tried})
    assert s.attention == "sdpa" and gpu_attention.chosen(tried, "self tiny") == "sdpa"


def test_a_wrong_kernel_gets_no_speed():
    wrong = {"modulate 64": {"error": 0.1, "right": False}}
    s = Setting(True, {"correctness": wrong})
    rows = gpu_kernels.kernels(s)
    assert rows["modulate tiny 12"].call() == {"refused": "it is wrong: see correctness"}
    assert rows["qk_norm_rope tiny 12"].call()["ms"] > 0


def test_a_wrong_kernel_is_found(monkeypatch):
    from nexus_rt.kernels import modulate

    right = modulate.modulate
    monkeypatch.setattr(
        modulate, "modulate", lambda *a, **k: tuple(t * 1.001 for t in right(*a, **k))
    )
    rows = gpu_correctness.units(Setting(True))
    assert not rows["modulate 64"].call()["right"] and rows["solver_step 6x10"].call()["right"]


def test_a_kernel_that_writes_nan_is_wrong():
    bad = torch.full((2, 2), float("nan"))
    assert not gpu_correctness.compare(bad, torch.zeros(2, 2).double(), torch.zeros(2, 2))["right"]


def test_what_the_time_does_not_reach_is_said_and_resumed(tmp_path):
    rows = run("short")["short"]
    late = {n for n, r in rows.items() if r == {"not_reached": "the time was over"}}
    assert 5 < len(late) < 20 and len(rows) == 20
    file = tmp_path / "earlier.json"
    file.write_text(
        json.dumps({"run": {}, "roofs": {"copy_gbps": {"rate": 7.0}, "x": rows["row 19"]}})
    )
    kept = gpu_suite.resumed(file)
    assert kept == {"roofs": {"copy_gbps": {"rate": 7.0}}}
    setting = Setting(True, kept)
    gpu_suite.run(setting, ["roofs"], time.monotonic() + 60)
    assert setting.results["roofs"]["copy_gbps"] == {"rate": 7.0}  # not measured again
    assert setting.results["roofs"]["matmul_tflops"]["rate"] > 0


def test_rows_after_the_deadline_are_not_begun():
    rows = run("slow", "faulty", seconds=-1)
    assert all("not_reached" in r for part in rows.values() for r in part.values())


def test_a_process_that_cannot_begin_says_why(monkeypatch):
    monkeypatch.setenv("NEXUS_RT_TEST_PARENT", str(os.getpid()))
    rows = run("unmade")["unmade"]
    assert rows == {"row": {"failed": "no process for it: ImportError: no such library"}}


def test_a_part_without_labels_leaves_the_others(monkeypatch):
    monkeypatch.setitem(FAULTY, "gone", Part("tests.no_such_module:units", 10))
    results = run("gone", "hanging", seconds=5)
    assert "ModuleNotFoundError" in results["gone"]["all"]["failed"] and results["hanging"]


def test_a_row_that_cannot_be_written_ends_the_run():
    def full(*row):
        raise OSError("no space left on device")

    setting = Setting(True)
    with pytest.raises(OSError, match="no space"):
        run_part(
            FAULTY["slow"], setting, partial(Setting, True), time.monotonic() + 30, full, set()
        )


def test_an_interrupted_run_leaves_what_it_had_measured_and_no_process(tmp_path):
    program = """
import sys, time
from pathlib import Path
from nexus_rt.bench import gpu_suite
from nexus_rt.bench.gpu_setting import Setting
from nexus_rt.bench.gpu_units import Part
mark = {"date": "2026-01-02T03:04:05+00:00"}
done = lambda results: gpu_suite.keep(Path(sys.argv[1]), {"run": mark, **results})
gpu_suite.run(Setting(True), ["slow"], time.monotonic() + 60, done, {"slow": Part("tests.faulty:slow", 60)})
"""
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE)
    file, end = tmp_path / "2026-01-02T0304.json", time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    child.send_signal(2)
    assert b"KeyboardInterrupt" in child.communicate(timeout=30)[1]
    assert json.loads(file.read_text())["slow"]["row 0"] == {"right": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_suite"])
    with pytest.raises(SystemExit, match="--dry"):
        gpu_suite.main()


def test_wheels_are_unpacked_to_import_from(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "NUMBER = 7\n")
    folder = gpu_suite.unpack(tmp_path)
    assert (folder / "peer" / "__init__.py").read_text() == "NUMBER = 7\n"


def test_a_variant_that_fails_takes_no_other_with_it(monkeypatch):
    from nexus_rt.models.wan import WanTransformer

    use = WanTransformer.use_kernels

    def refuse(self, kernels="auto", attention="auto"):
        if attention == "auto-fp8":
            raise RuntimeError("out of memory")
        return use(self, kernels, attention)

    monkeypatch.setattr(WanTransformer, "use_kernels", refuse)
    rows = gpu_steps.small(Setting(True))
    with pytest.raises(RuntimeError, match="out of memory"):
        rows["guided, fp8 attention"].call()
    assert rows["guided"].call()["ms"] > 0 and rows["plain"].call()["ms"] > 0


def test_a_peer_is_timed_on_true_positions_and_not_on_zeros():
    """diffusers' transformer, with weights of ours: its RoPE tables, and what is kept in float32."""
    step = gpu_steps.Step(Setting(True), "tiny", "torch")
    rope = step.theirs.rope
    assert float(rope.freqs_cos.abs().min()) > 0 and float(rope.freqs_sin.abs().max()) > 0.5
    step.s.dtype = torch.bfloat16
    step = gpu_steps.Step(step.s, "tiny", "torch")
    kinds = {n: p.dtype for n, p in step.theirs.named_parameters()}
    wide = {n for n, kind in kinds.items() if kind == torch.float32}
    assert {n.split(".")[-1] for n in wide if "block" not in n} >= {"scale_shift_table"}
    assert all("norm2" in n or "time_embedder" in n or "scale_shift" in n for n in wide)
    assert all(float(p.abs().max()) > 0 for p in step.theirs.parameters())


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "linear"),
        ("_attention_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("_modulate_kernel", "norms and RoPE"),
        ("void at::native::vectorized_elementwise_kernel", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    assert gpu_steps.kind_of(kernel) == kind


def test_what_was_wanted_stands_beside_what_was_measured():
    """A miss stays in the table, and what was not measured is not met."""
    blend = {"eager_called_ms": 0.09, "called_ms": 0.01, "percent_of_roof": 71.0}
    exact = {"exact": True}
    results = {
        "run": {},
        "kernels": {
            "band_blend 90x160": blend,
            "modulate 14B 9": {"percent_of_roof": 90.0},
            "modulate 1.3B 9": {"failed": "x"},
        },
        "attention": {
            "self 14B: sdpa": {"ms": 4.0, **exact},
            "self 14B: cudnn": {"ms": 3.0, **exact},
            "self 14B: triton": {"ms": 3.2, **exact},
            "self 14B: triton, pointers": {"ms": 5.0, **exact},
            "self 14B: triton-fp8": {"ms": 2.0, "exact": False},
            "self 14B: flash": {"why": "not there"},
            "cross 14B: sdpa": {"failed": "it had not ended after 30 s and was killed"},
        },
        "step large": {
            "guided": {"ms": 4600.0},
            "guided, fp8 linear": {"ms": 4100.0},
            "guided, diffusers": {"ms": 6900.0},
        },
        "compiled": {"14B guided, diffusers, blocks compiled": {"ms": 4140.0}},
        "swap": {"resident": {"first_over_median": 1.3, "planned_over_peak": 0.97}},
        "pipeline": {
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
    assert found["14B, a guided step in bf16, seconds"] == (4.6, True)
    assert found["14B, a guided step with fp8 linear layers, seconds"] == (4.1, False)
    assert found["14B, a guided step against diffusers eager"] == (1.5, True)
    assert found["14B, a guided step against the best compiled"] == (pytest.approx(0.9), False)
    assert found["1.3B, a guided step against diffusers eager"] == (None, None)
    assert found["the step after the swap over the median, resident"] == (1.3, False)
    assert found["peak memory off the plan, percent, resident"] == (pytest.approx(3), True)
    assert found["plan reference: price off its time, percent"] == (pytest.approx(7), False)
    assert "| at most 5 | 7 | **no** |" in gpu_tables.targets_table(results)
    assert all(
        value is None
        for _, _, value, _ in gpu_tables.targets(
            {"run": {}, "pipeline": {"all": {"failed": "late"}}}
        )
    )
