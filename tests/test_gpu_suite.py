"""The GPU suite in its dry mode: every part runs, a wrong kernel gets no speed, what breaks or is
late is written down."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from nexus_rt.bench import roofline, tables
from nexus_rt.bench.gpu import (
    attention,
    cases,
    clip,
    correctness,
    engines,
    estimates,
    kernels,
    oracles,
    pipeline,
    setting,
    steps,
    suite,
    units,
    wheels,
)
from nexus_rt.bench.gpu.setting import Setting
from nexus_rt.bench.gpu.tables import targets, targets_table
from nexus_rt.bench.gpu.units import Part, run_part
from tests.needs import needs

needs("triton")
FAULTY = {
    "faulty": Part("tests.faulty:units", 60),
    "correctness": Part("nexus_rt.bench.gpu.correctness:units", 60, lanes=2),
    "hanging": Part("tests.faulty:hanging", 60, lanes=3),
    "slow": Part("tests.faulty:slow", 60),
    "unmade": Part("tests.faulty:unmade", 60),
    "short": Part("tests.faulty:slow", 2.0),
    "mixed": Part("tests.faulty:mixed", 60),
    "mixed too": Part("tests.faulty:mixed", 60),
    "lengthy": Part("tests.faulty:lengthy", 3.0),
    "unequipped": Part("tests.faulty:unequipped", 60, needs=()),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))


def run(*parts, results=None, seconds=120, done=lambda results: None):
    return suite.run(Setting(True, results or {}), parts, time.monotonic() + seconds, done, FAULTY)


@pytest.mark.slow
@pytest.mark.process
def test_the_whole_suite_runs_dry(tmp_path):
    command = [
        sys.executable,
        "-m",
        "nexus_rt.bench.gpu.suite",
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
    assert results.keys() == {"run", *suite.PARTS} and results["run"]["dry"]
    right = results["correctness"].values()
    assert all(row["right"] for row in right) and len(right) == 7
    elsewhere = results["correctness elsewhere"]
    assert all(row["right"] for row in elsewhere.values())
    assert {
        "attention far 32 x2 64 keys, pointers",
        "attention far 32 x2 64 keys, descriptors",
    } <= (elsewhere.keys())
    assert not suite.failures(results)
    assert all(row["ms"] > 0 and row["percent_of_roof"] > 0 for row in results["kernels"].values())
    assert {n.split()[0] for n in results["kernels"]} == {
        "band_blend",
        "band_filter",
        "solver_step",
        "modulate",
        "qk_norm_rope",
    }
    assert attention.chosen(results["attention"], "self tiny") in ("sdpa", "flash", "math")
    for part, expected in (("step large", "triton"), ("step small", "torch")):
        rows = results[part]
        assert rows["guided"]["kernels"] == expected and rows["guided"]["ms"] > 0
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
    assert all(results["pipeline"][plan]["predicted_ms"] > 0 for plan in pipeline.PLANS)
    assert results["vae"].keys() == {"float32", "bfloat16"}
    assert results["vae"]["float32"]["difference"] == 0
    assert 1e-5 < results["vae"]["bfloat16"]["difference"] < 0.05
    for plan in clip.PLANS:
        row = results["clip"][plan]
        assert {"small", "large", "solver", "vae", "to host", "uint8", "mp4"} <= row[
            "parts_ms"
        ].keys()
        assert row["mp4_bytes"] > 500 and 0 < row["denoise_ms"] < row["ms"]
        assert sum(row["parts_ms"].values()) == pytest.approx(row["ms"], rel=0.5)
    for name in ("diffusers' step", "diffusers' decoding"):
        assert results["clip"][name]["difference"] < 1e-5 and results["clip"][name]["ours_ms"] > 0
    assert all(
        results["pipeline"][f"peer {p}"]["latent_error"] < 1e-3
        for p in ("diffusers", "switch", "naive")
    )
    found = {name: value for name, _, value, _ in targets(results)}
    # on a CPU: a GPU's memory, the blend at true size, fp8 kernels, what is compiled
    missing = [n for n, v in found.items() if v is None]
    expected = ("memory", "triton-fp8", "band_blend", "compiled", "_rows")
    assert all(any(word in n for word in expected) for n in missing) and len(missing) == 11, missing
    text = file.with_suffix(".md").read_text()
    assert text.count("not measured") == 11 and tables.made_of(file).count("not measured") == 11
    assert "CPU, dry: no speed here means anything" in text and "of_best_exact 1" in text


@pytest.mark.process
def test_a_hang_a_crash_or_a_broken_device_costs_one_row(tmp_path):
    mark = {"date": "2026-01-02T03:04:05+00:00"}
    done = lambda results: suite.keep(tmp_path, {"run": mark, **results})
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
    assert len(suite.failures(kept)) == 6
    assert "## faulty" in (tmp_path / "2026-01-02T0304.md").read_text()


@pytest.mark.process
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
    loads = attention.units(s)["self tiny: triton, descriptors"].call()
    assert loads == {"why": "it is wrong: see correctness"}
    tried = {"self tiny: triton": hung, "self tiny: sdpa": {"ms": 1.0, "exact": True}}
    s = Setting(True, {"attention": tried})
    assert s.attention == "sdpa" and attention.chosen(tried, "self tiny") == "sdpa"


def test_a_wrong_kernel_gets_no_speed():
    wrong = {"modulate 64": {"error": 0.1, "right": False}}
    s = Setting(True, {"correctness": wrong})
    rows = kernels.kernels(s)
    assert rows["modulate tiny 12"].call() == {"refused": "it is wrong: see correctness"}
    assert rows["qk_norm_rope tiny 12"].call()["ms"] > 0


def test_a_wrong_kernel_is_found(monkeypatch):
    from nexus_rt.kernels import modulate

    right = modulate.modulate
    monkeypatch.setattr(
        modulate, "modulate", lambda *a, **k: tuple(t * 1.001 for t in right(*a, **k))
    )
    rows = correctness.units(Setting(True))
    row = rows["modulate tiny"].call()
    assert not row["right"] and row["wrong"] == ["modulate 64", "modulate stream 64"]
    assert rows["solver_step 6x10"].call()["right"]


def test_a_kernel_that_writes_nan_is_wrong():
    bad = torch.full((2, 2), float("nan"))
    assert not oracles.compare(bad, torch.zeros(2, 2).double(), torch.zeros(2, 2))["right"]


@pytest.mark.process
def test_what_the_time_does_not_reach_is_said_and_resumed(tmp_path):
    rows = run("short")["short"]
    late = {n for n, r in rows.items() if r == {"not_reached": "the time was over"}}
    assert 5 < len(late) < 20 and len(rows) == 20
    file = tmp_path / "earlier.json"
    file.write_text(
        json.dumps({"run": {}, "roofs": {"copy_gbps": {"rate": 7.0}, "x": rows["row 19"]}})
    )
    kept = suite.resumed(file)
    assert kept == {"roofs": {"copy_gbps": {"rate": 7.0}}}
    s = Setting(True, kept)
    suite.run(s, ["roofs"], time.monotonic() + 60)
    assert s.results["roofs"]["copy_gbps"] == {"rate": 7.0}  # not measured again
    assert s.results["roofs"]["matmul_tflops"]["rate"] > 0


HEADLINE = [
    *("correctness", "roofs", "attention", "step large", "vae", "clip", "step small", "kernels"),
    "swap",
]


def test_the_headline_is_made_in_the_documented_order_and_fits_the_time():
    """On the GPU's own sizes, without a GPU: labels and estimates alone."""
    rows = suite.headline(Setting(False))
    assert list(rows) == HEADLINE == list(suite.PARTS)[: len(HEADLINE)]
    assert 200 < sum(part["all"] for part in rows.values()) < 420
    for name, part in rows.items():
        assert all(seconds > 0 for seconds in part.values())
        assert part["all"] < suite.PARTS[name].limit
        rows_of = suite.PARTS[name].units(Setting(False))
        assert all(2 * u.estimate <= u.limit or u.limit >= 60 for u in rows_of.values()), name
    assert len(rows["correctness"]) == 14 + 1 and len(rows["kernels"]) == 14 + 1
    assert set(rows["attention"]) >= {"self 14B: triton", "self 14B: cudnn"}
    assert not any("1.3B" in label or "cross" in label for label in rows["attention"])
    assert list(rows["step large"])[:2] == ["guided", "guided, diffusers"]
    assert set(rows["vae"]) == {"float32", "bfloat16", "all"}
    assert set(rows["clip"]) == {*clip.PLANS, "diffusers' step", "diffusers' decoding", "all"}
    assert set(rows["step small"]) == {"guided", "guided, diffusers", "all"}
    assert not any("75600" in label or "90x160" in label for label in rows["kernels"])
    assert set(rows["swap"]) == {"resident", "prefetched", "all"}
    assert suite.LIMIT_S <= 560  # of a command's 600


def test_estimates_are_the_roofline_s(monkeypatch):
    from dataclasses import replace

    s = Setting(False)
    large = s.configs["14B"]
    guided = roofline.predict(roofline.CARDS["h200"], roofline.SIZES["480p"])["large_guided"]
    assert estimates.forward_s(s, large, 2) == pytest.approx(guided["total"] / 1000, rel=1e-3)
    assert estimates.timed_s(5.0) == 10 and estimates.timed_s(1.0) == 3
    before = estimates.step_s(s, large, 0), estimates.denoise_s(s, 3, 2)
    card = roofline.CARDS["h200"]
    twice = replace(card, bf16=2 * card.bf16, bandwidth=2 * card.bandwidth)
    monkeypatch.setitem(roofline.CARDS, "h200", twice)
    after = estimates.step_s(s, large, 0), estimates.denoise_s(s, 3, 2)
    assert after == pytest.approx([x / 2 for x in before])
    from nexus_rt.method.plan_text import parse_plan
    from nexus_rt.method.time_grid import time_grid

    plan = parse_plan("small:2 bridge:1 large:1", time_grid(clip.FEW))
    forwards = sum(s.small for s in plan.steps), sum(s.large for s in plan.steps)
    assert forwards == clip.PLANS["small:2 bridge:1 large:1"]


@pytest.mark.process
def test_headline_rows_of_all_parts_come_before_the_others():
    order = []
    note = lambda results: order.append(
        [f"{part}: {label}" for part, rows in results.items() for label in rows]
    )
    rows = run("mixed", "mixed too", done=note)
    assert rows["mixed"].keys() == {"first", "other"}
    seen = [
        next(iter(set(b) - set(a))) for a, b in zip([[], *order], order, strict=False) if a != b
    ]
    assert seen == ["mixed: first", "mixed too: first", "mixed: other", "mixed too: other"]


@pytest.mark.process
def test_a_row_that_the_time_ends_is_not_reached_and_no_failure():
    """Twice: with the headline, and with the other rows."""
    rows = run("lengthy")["lengthy"]
    assert rows == {"long": {"not_reached": "the time was over before it had ended"}}
    assert not suite.failures({"lengthy": rows})


def test_a_long_run_is_timed_once(monkeypatch):
    s = Setting(True)
    s.dry = False  # its runs are counted, on a CPU
    monkeypatch.setattr(setting, "LONG_MS", 2.0)
    calls = []
    s.ms(lambda: (calls.append(1), time.sleep(0.005)), 10, 0)
    assert len(calls) == 1
    s.ms(lambda: calls.append(1), 10, 2)
    assert len(calls) == 1 + 12


def test_scores_far_below_zero_are_compared_in_every_form():
    """Whole blocks and others, every way to load, fp8: what made NaN of 0 times infinity."""
    rows = {
        **cases.cases(Setting(False)),
    }
    forms = ("auto", "pointers", "descriptors", "specialised", "ahead")
    for kernel in ("attention", "attention_fp8"):
        for heads in (40, 12):
            for keys in (1280, 1311):
                labels = {f"{kernel} far 128 x{heads} {keys} keys, {how}" for how in forms}
                assert labels <= rows.keys()
    launched = correctness.launched(Setting(False))
    for row in ("attention 14B self", "attention_fp8 14B", "attention 1.3B"):
        assert any(" far " in label and "1280" in label for label in launched[row])
    q, k, *_ = cases.qkv(Setting(True), 2, 32, 64, False, far=True)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT) / 32**0.5
    assert scores.max() < -128  # in powers of two: above what float32 holds


def test_every_case_is_in_one_part():
    s = Setting(False)
    first = [name for names in correctness.launched(s).values() for name in names]
    rest = correctness.units_elsewhere(s)
    known = cases.cases(s)
    assert set(first) <= known.keys() and len(set(first)) == len(first)
    assert set(first) | rest.keys() == known.keys() and not set(first) & rest.keys()


def test_one_wrong_case_makes_its_row_wrong():
    right = {"error": 0.5, "eager_error": 1.0, "right": True}
    nan = {"error": float("nan"), "eager_error": 1.0, "right": False}
    row = correctness.together({"a": lambda: right, "b": lambda: nan})
    assert not row["right"] and row["wrong"] == ["b"] and row["cases"] == 2
    row = correctness.together({"a": lambda: right, "c": lambda: {**right, "error": 0.7}})
    assert row == {"error": 0.7, "eager_error": 1.0, "right": True, "cases": 2}


def without(tmp_path, *packages):
    """An environment in which packages are not installed, for every process that is started."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({packages!r}))\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), root]),
        "NEXUS_RT_CACHE": str(tmp_path / "c"),
    }


def command(env, *options):
    suite_command = [sys.executable, "-m", "nexus_rt.bench.gpu.suite", *options]
    return subprocess.run(suite_command, capture_output=True, text=True, env=env)


CARRIED = ("msgspec", "diffusers", "importlib_metadata", "zipp", "av")


@pytest.mark.parametrize("absent", [CARRIED, CARRIED[1:], ("requests",)])
@pytest.mark.slow
@pytest.mark.process
def test_a_machine_without_wheels_runs_dry(tmp_path, absent):
    """What is not here is named with its wheel; no row fails for it."""
    parts = ["roofs", "vae", "clip", "kernels", "engines"]
    done = command(
        without(tmp_path, *absent), "--dry", "--out", str(tmp_path / "out"), "--parts", *parts
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert results["roofs"]["copy_gbps"]["rate"] > 0
    assert results["kernels"]["modulate tiny 12"]["ms"] > 0
    wheel = f"{absent[0]}-*"
    assert wheel in done.stderr
    if "msgspec" in absent:
        assert "msgspec-*-cp312-*.whl" in results["clip"]["all"]["not_reached"]
        return
    assert wheel in results["vae"]["float32"]["not_reached"]
    row = results["clip"]["small:2 bridge:1 large:1"]
    assert row["denoise_ms"] > 0 and wheel in row["vae_why"] and "mp4" not in row["parts_ms"]
    assert ("mp4_why" in row) == ("av" in absent)
    assert wheel in results["clip"]["diffusers' step"]["not_reached"]


@pytest.mark.process
def test_without_msgspec_nothing_is_measured_and_a_sentence_says_why(tmp_path):
    done = command(without(tmp_path, "msgspec"), "--estimate")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "nothing was measured: msgspec is not installed here; carry msgspec-*-cp312-*.whl" in (
        done.stderr
    )
    done = command(without(tmp_path, "torch"), "--dry")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch is not installed here" in done.stderr


@pytest.mark.process
def test_a_row_that_lacks_a_package_is_made_when_it_is_carried(monkeypatch):
    s = Setting(True)
    error = ModuleNotFoundError("No module named 'msgspec'", name="msgspec")
    monkeypatch.setattr(setting, "absent", lambda package: f"{package} is absent")
    assert s.lacking(error) == "msgspec is absent"
    assert s.lacking(ModuleNotFoundError("x", name="nothing_known")) is None
    behind = RuntimeError("the interpreter failed")
    behind.__cause__ = TypeError(setting.NO_LOOPS)
    assert "Triton 3.7" in s.lacking(behind) and Setting(False).lacking(behind) is None
    assert run("unequipped")["unequipped"] == {"row": {"right": True}}
    row = {"a": {units.NOT_REACHED: "msgspec is absent"}}
    assert not Setting(True, {"correctness": row}).wrong


def test_an_absent_package_is_named_with_its_wheel(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "av is not installed here; carry av-*-cp312-abi3-*.whl" in wheels.absent("av")
    assert not wheels.present("av") and wheels.present("json")
    assert wheels.absent("json") is None
    assert [line for line in wheels.shortages() if line.startswith("without the mp4: av")]
    broken = type(sys)("diffusers")
    monkeypatch.setitem(sys.modules, "diffusers", broken)  # without what it should hold
    assert "diffusers cannot be imported here (AttributeError" in wheels.absent("diffusers")


def test_wheels_are_fetched_for_the_other_machine_s_python(tmp_path, monkeypatch):
    seen = []

    def download(command):
        seen.append(command)
        (tmp_path / "msgspec-1-cp312-cp312-x.whl").write_bytes(bytes(1000))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(wheels.subprocess, "run", download)
    code = 0
    monkeypatch.setattr(sys, "argv", ["suite", "--fetch-wheels", str(tmp_path), "pillow"])
    suite.main()
    (command,) = seen
    assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
    assert command[command.index("--python-version") + 1] == "3.12"
    assert command[-6:] == [*CARRIED[:2], "importlib_metadata", "zipp", "av", "pillow"]
    monkeypatch.setattr(wheels, "MAX_BYTES", 999)
    with pytest.raises(SystemExit, match="expected at most"):
        wheels.fetch(tmp_path)
    code = 1
    with pytest.raises(SystemExit, match="could not be downloaded"):
        wheels.fetch(tmp_path)


def test_a_folder_without_wheels_or_with_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no wheels"):
        wheels.unpack(tmp_path)
    (tmp_path / "av-1-cp312.whl").write_bytes(b"no archive")
    with pytest.raises(SystemExit, match="cannot be unpacked"):
        wheels.unpack(tmp_path)


def test_onnx_asks_for_its_cuda_provider_before_it_traces(monkeypatch):
    needs("onnxruntime")
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(engines, "Blocks", lambda *arguments: pytest.fail("a model was made"))
    setting = Setting(False)
    row = engines.units(setting)[f"{setting.names[0]}: onnx"].call()
    assert "has no provider 'cuda'; it has CPUExecutionProvider" in row["why"]


def test_rows_after_the_deadline_are_not_begun():
    rows = run("slow", "faulty", seconds=-1)
    assert all("not_reached" in r for part in rows.values() for r in part.values())


@pytest.mark.process
def test_a_process_that_cannot_begin_says_why(monkeypatch):
    monkeypatch.setenv("NEXUS_RT_TEST_PARENT", str(os.getpid()))
    rows = run("unmade")["unmade"]
    assert rows == {"row": {"failed": "no process for it: ImportError: no such library"}}


@pytest.mark.process
def test_a_part_without_labels_leaves_the_others(monkeypatch):
    monkeypatch.setitem(FAULTY, "gone", Part("tests.no_such_module:units", 10))
    results = run("gone", "hanging", seconds=5)
    assert "ModuleNotFoundError" in results["gone"]["all"]["failed"] and results["hanging"]


@pytest.mark.process
def test_a_row_that_cannot_be_written_ends_the_run():
    def full(*row):
        raise OSError("no space left on device")

    s = Setting(True)
    with pytest.raises(OSError, match="no space"):
        run_part(FAULTY["slow"], s, partial(Setting, True), time.monotonic() + 30, full, set())


@pytest.mark.process
def test_an_interrupted_run_leaves_what_it_had_measured_and_no_process(tmp_path):
    program = """
import sys, time
from pathlib import Path
from nexus_rt.bench.gpu import suite
from nexus_rt.bench.gpu.setting import Setting
from nexus_rt.bench.gpu.units import Part
mark = {"date": "2026-01-02T03:04:05+00:00"}
done = lambda results: suite.keep(Path(sys.argv[1]), {"run": mark, **results})
suite.run(Setting(True), ["slow"], time.monotonic() + 60, done, {"slow": Part("tests.faulty:slow", 60)})
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stderr=subprocess.PIPE,
        # ignored where the tests run in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    file, end = tmp_path / "2026-01-02T0304.json", time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in child.communicate(timeout=30)[1]
    assert json.loads(file.read_text())["slow"]["row 0"] == {"right": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["suite"])
    with pytest.raises(SystemExit, match="--dry"):
        suite.main()


def test_wheels_are_unpacked_to_import_from(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "NUMBER = 7\n")
    folder = wheels.unpack(tmp_path)
    assert (folder / "peer" / "__init__.py").read_text() == "NUMBER = 7\n"


def test_a_variant_that_fails_takes_no_other_with_it(monkeypatch):
    from nexus_rt.models.wan import WanTransformer

    use = WanTransformer.use_kernels

    def refuse(self, kernels="auto", attention="auto"):
        if attention == "auto-fp8":
            raise RuntimeError("out of memory")
        return use(self, kernels, attention)

    monkeypatch.setattr(WanTransformer, "use_kernels", refuse)
    rows = steps.small(Setting(True))
    with pytest.raises(RuntimeError, match="out of memory"):
        rows["guided, fp8 attention"].call()
    assert rows["guided"].call()["ms"] > 0 and rows["plain"].call()["ms"] > 0


def test_a_peer_is_timed_on_true_positions_and_not_on_zeros():
    """diffusers' transformer, with weights of ours: its RoPE tables, and what is kept in float32."""
    step = steps.Step(Setting(True), "tiny", "torch")
    rope = step.theirs.rope
    assert float(rope.freqs_cos.abs().min()) > 0 and float(rope.freqs_sin.abs().max()) > 0.5
    step.s.dtype = torch.bfloat16
    step = steps.Step(step.s, "tiny", "torch")
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
    assert steps.kind_of(kernel) == kind


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
    found = {name: (value, met) for name, _, value, met in targets(results)}
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
    assert "| at most 5 | 7 | **no** |" in targets_table(results)
    assert all(
        value is None
        for _, _, value, _ in targets({"run": {}, "pipeline": {"all": {"failed": "late"}}})
    )
