"""`nexus-rt bench`: every row has its quality, peers are the same mathematics, results are read,
compared and drawn safely."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nexus_rt import InputError, ModelError, NexusPipeline
from nexus_rt.bench import command, peers, presets, results, scaling, tables, work
from nexus_rt.bench.architectures import DRY
from nexus_rt.bench.latency import Clip
from nexus_rt.bench.page import drawing, page
from nexus_rt.bench.presets import Preset
from nexus_rt.cli import main
from nexus_rt.core.errors import NexusError
from nexus_rt.core.size import ClipSize
from nexus_rt.models.wan_config import WanConfig
from tests.fuzz import places
from tests.needs import program
from tests.pages import Tags, dump
from tests.refusals import refuses

ROOT = Path(__file__).parents[1]
SCRIPT = "<script>document.title='owned'</script>"
TINY = {"small": {**DRY, "num_layers": 1}, "large": DRY}


@pytest.fixture(scope="module")
def measured(tiny_pair, tmp_path_factory):
    """A results file of the tiny pair, with everything that can be asked for, and what the command
    printed."""
    folder = tmp_path_factory.mktemp("bench")
    out = subprocess.run(
        [
            sys.executable,
            "-m",
            "nexus_rt.cli",
            "bench",
            "--pair",
            str(tiny_pair),
            "--prompt",
            f"a red circle {SCRIPT}",
            "--plans",
            "reference,handoff=0.5,bridge=2,auto=0.02",
            "--runs",
            "2",
            "--warmup",
            "1",
            "--vs",
            "diffusers,naive",
            "--engines",
            "torch,tensorrt",
            "--scaling",
            "--json",
            folder / "a.json",
            "--html",
            folder / "a.html",
            "--plot",
            folder / "a.svg",
            "--trace",
            folder / "traces",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "NEXUS_RT_CACHE": str(folder / "cache")},
    )
    assert out.returncode == 0, out.stderr
    return folder, results.read(folder / "a.json"), out.stdout


BLENDS = {"reference": 6, "handoff=0.5,bridge=2": 2, "auto=0.02": 6}


def predicted_ms(row, costs):
    """The price of a row's steps, every forward guided."""
    runs = [step["runs"] for step in row["denoise_steps_ms"]]
    small = len(runs) - runs.count("large")
    large = len(runs) - runs.count("small")
    return (
        small * costs["small_guided"]
        + large * costs["large_guided"]
        + BLENDS[row["plan"]] * costs["blend"]
        + len(runs) * costs["solver"]
    )


def test_no_speed_without_its_quality(measured):
    _, found, printed = measured
    rows = [r for r in found["rows"] if r["engine"] == "torch"]
    assert [r["plan"] for r in rows] == ["reference", "handoff=0.5,bridge=2", "auto=0.02"]
    for row in rows:
        assert row["total_duration_ms"] > row["denoise_ms"] > 0 and len(row["total_runs_ms"]) == 2
        steps = row["denoise_steps_ms"]
        assert [s["step"] for s in steps] == list(range(6)) and all(
            s["duration_ms"] > 0 for s in steps
        )
        assert row["denoise_ms"] == pytest.approx(sum(s["duration_ms"] for s in steps), rel=1e-3)
        assert {"text", "prepare", "large", "solver", "vae", "encode-to-mp4"} <= row[
            "components_ms"
        ].keys()
        assert (
            row["quality"]["latent_error"] >= 0
            and -1 <= row["quality"]["ssim"] <= 1
            and row["peak_host_bytes"] > 1e8
        )
        assert row["first_preview_ms"] > 0
        # the plan's steps at the measured prices, and how far the measured steps are from them:
        # no bound on the latter, which a loaded machine moves
        price = predicted_ms(row, found["costs"])
        assert row["predicted_ms"] == pytest.approx(price, abs=0.01) and price > 0
        off = row["predicted_ms"] / row["denoise_ms"] - 1
        assert row["prediction_error"] == pytest.approx(off, abs=2e-4)
        assert f"{row['total_duration_ms']:.1f}" in printed
    # the same plan, engine and seed: the same bits
    assert rows[0]["quality"]["identical"] and rows[0]["cold_ms"] > 0
    assert not rows[1]["quality"]["identical"] and rows[1]["quality"]["latent_error"] > 1e-3
    assert (
        found["fingerprint"]["weights"].keys() == {"small", "large"}
        and "bench" in found["fingerprint"]["command"]
    )
    assert found["costs"]["large_guided"] > 0 and found["baseline"] == "reference"


def test_an_engine_that_cannot_be_built_is_a_row_that_says_so(measured):
    rows = [r for r in measured[1]["rows"] if r["engine"] == "tensorrt"]
    assert len(rows) == 3 and all(
        "no tensorrt engine can be built here" in r["failed"] for r in rows
    )


def test_peers_are_the_same_mathematics(measured):
    rows = {(r["peer"], r["plan"]): r for r in measured[1]["peers"]}
    assert {k[0] for k in rows} == {"diffusers", "switch", "naive", "naive-ours"}
    for (_, plan), row in rows.items():
        assert "failed" not in row and row["ratio"] > 0 and len(row["ours_ms"]["runs"]) == 2
        if row["same_mathematics"]:
            assert row["latent_error"] < 1e-3 and (row["identical"] or row["psnr_db"] >= 45), plan
    assert (
        rows["switch", "small:2 large:*"]["same_mathematics"]
        and rows["naive", "reference"]["same_mathematics"]
    )
    # another schedule, its distance shown
    assert rows["naive", "auto=0.02"]["same_mathematics"] is False


def test_traces_open_in_a_viewer(measured):
    folder, found, _ = measured
    files = sorted((folder / "traces").iterdir())
    assert len(files) == 3 and {r["trace"] for r in found["rows"] if "failed" not in r} == set(
        map(str, files)
    )
    events = json.loads(files[0].read_text())["traceEvents"]
    assert {"small", "large", "vae"} <= {e["name"] for e in events} and all(
        e["dur"] >= 0 for e in events
    )


def test_scaling_is_fitted(measured):
    found = measured[1]["scaling"]
    assert found.keys() == {"frames", "size", "batch", "steps"}
    for axis in ("frames", "size", "batch"):
        for said in found[axis].values():
            assert len(said["points"]) >= 3 and len(said["fit"]["coefficients"]) == len(
                said["fit"]["powers"]
            )
    tokens = [4 * n for n in (10, 20, 40, 80)]
    fit = scaling.fit(tokens, [3 + 0.5 * n + 0.01 * n * n for n in tokens], (0, 1, 2))
    assert fit["coefficients"] == pytest.approx([3, 0.5, 0.01]) and fit["r2"] == pytest.approx(1)


def test_the_connector_is_part_of_the_naive_schedule():
    """The mini pair, whose small generator is steered: the naive form makes the same frames."""
    pipe = NexusPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    embeds = dict(
        zip(
            ("prompt_embeds", "negative_prompt_embeds"),
            pipe.encode_prompt(presets.PROMPT),
            strict=True,
        )
    )
    clip = Clip(ClipSize(64, 64, 17), 4, 0, presets.PROMPT, embeds)
    for row in peers.measure_peers(pipe, ("naive", "naive-ours", "diffusers"), clip, 1, 0):
        assert row["latent_error"] < 1e-3 and row["psnr_db"] >= 45


def test_a_peer_that_is_not_installed_or_cannot_run_is_a_row(tiny_pipe, monkeypatch):
    embeds = dict(
        zip(("prompt_embeds", "negative_prompt_embeds"), tiny_pipe.encode_prompt("a"), strict=True)
    )
    clip = Clip(ClipSize(48, 32, 5), 2, 0, "a", embeds)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (row,) = peers.measure_peers(tiny_pipe, ("diffusers",), clip, 1, 0)
    assert row == {"peer": "diffusers", "failed": "diffusers is not installed here"}
    monkeypatch.undo()
    alone = copy.copy(tiny_pipe)
    alone.engines = {"large": tiny_pipe.engines["large"]}
    (row,) = peers.measure_peers(alone, ("switch",), clip, 1, 0)
    assert "it runs the small generator, which is not loaded" in row["failed"]


def test_random_weights_of_the_true_architecture_say_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(presets.PRESETS, "wan-480p", Preset("wan-480p", ClipSize(48, 32, 5), TINY))
    decoder = dict(base_dim=4, num_res_blocks=1)
    whole = command.random_pipeline
    monkeypatch.setattr(command, "random_pipeline", lambda *args: whole(*args, decoder=decoder))
    line = [
        "bench",
        "--preset",
        "wan-480p",
        "--runs",
        "1",
        "--warmup",
        "0",
        "--steps",
        "3",
        "--vs",
        "diffusers,naive",
        "--engines",
        "torch,onnx",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert main(line) == 0
    found, said = results.read(tmp_path / "a.json"), capsys.readouterr()
    assert (
        "the pictures are not" in said.out
        and found["fingerprint"]["weights"] == {}
        and found["prompt"] is None
    )
    rows = [r for r in found["rows"] if "failed" not in r]
    assert len(rows) == 3 and "text" not in rows[0]["components_ms"]
    assert (
        all(r["latent_error"] < 1e-3 for r in found["peers"] if r["same_mathematics"])
        and len(found["peers"]) == 8
    )
    assert {r["failed"] for r in found["rows"] if "failed" in r} == {
        "engines are exported of folders of weights; pass --small and --large"
    }


def test_what_does_not_fit_is_counted_instead(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(presets, "free_bytes", lambda device: 5_000_000_000)
    line = ["bench", "--preset", "wan-480p", "--dtype", "bfloat16"]
    assert main([*line, "--estimate", "never"]) == 1
    err = capsys.readouterr().err
    assert re.search(
        r"takes 37\.\d GB \(small 2\.8, large 28\.6, working 6\.0\) and 5\.0 GB are free on cpu:"
        r" [\d,]{14} bytes",
        err,
    )
    assert "What would do: a device with 37" in err
    assert (
        main(
            [
                *line,
                "--tflops",
                "800",
                "--plans",
                "large,reference",
                "--json",
                str(tmp_path / "a.json"),
            ]
        )
        == 0
    )
    found = results.read(tmp_path / "a.json")
    assert (
        found["estimate"]["estimated"]
        and not found["rows"]
        and "Estimated on the meta device" in capsys.readouterr().out
    )
    large, both = (r["denoise_ms_at_least"] for r in found["estimate"]["rows"])
    assert large == pytest.approx(
        50 * 2 * found["estimate"]["tflop"]["large forward"] / 800 * 1000, rel=1e-3
    )
    assert both == pytest.approx(
        large + 50 * 2 * found["estimate"]["tflop"]["small forward"] / 800 * 1000, rel=1e-3
    )


def test_arithmetic_is_that_of_the_layers():
    """Linear layers and attention, by hand."""
    config, size = WanConfig(**TINY["large"]), ClipSize(64, 48, 9)
    t, h, w = size.latent
    n, d, f, m = t * h * w // 4, config.dim, config.ffn_dim, 512
    block = n * d * d * (4 + 2) + 2 * n * n * d + 2 * n * m * d + 2 * n * d * f
    ends = n * d * 16 * 4 * 2
    time_ = config.freq_dim * d + d * d + 6 * d * d
    by_hand = 2 * (config.num_layers * block + ends + time_)
    counted = work.forward_flops(TINY["large"], size)
    assert counted == pytest.approx(by_hand, rel=0.01)


def changed(found, **change):
    """The same results with columns of the first row replaced."""
    other = copy.deepcopy(found)
    other["rows"][0] |= change
    return other


@pytest.fixture
def two(tmp_path, measured):
    def write(**change):
        runs = [100.0, 101.0, 99.0, 100.5, 100.0]
        before = changed(measured[1], total_runs_ms=runs, total_duration_ms=100.0)
        (tmp_path / "a.json").write_text(json.dumps(before))
        (tmp_path / "b.json").write_text(json.dumps(changed(before, **change)))
        return main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])

    return write


def test_comparing_finds_what_is_worse_beyond_noise(two, capsys):
    assert two() == 0 and "no regression beyond noise" in capsys.readouterr().out
    noisy = [97.0, 105.0, 99.0, 108.0, 95.0]
    assert two(total_runs_ms=noisy, total_duration_ms=99.0) == 0
    assert (
        two(total_runs_ms=[x * 1.1 for x in (100, 101, 99, 100, 100)], total_duration_ms=110.0) == 1
    )
    assert (
        "reference on torch: 100.0 -> 110.0 ms, 1.100x" in (said := capsys.readouterr().out)
        and "slower" in said
    )
    assert (
        two(total_runs_ms=[x * 0.8 for x in (100, 101, 99, 100, 100)], total_duration_ms=80.0) == 0
    )
    assert two(peak_host_bytes=10**12) == 1 and "peak_host_bytes" in capsys.readouterr().out
    assert two(quality={"latent_error": 0.1, "psnr_db": 30.0, "identical": False}) == 1
    assert "identical -> 30.0 dB" in capsys.readouterr().out
    assert two(failed="no memory") == 1 and "failed (no memory)" in capsys.readouterr().out


def test_results_of_something_else_are_refused(tmp_path, measured):
    good = tmp_path / "good.json"
    good.write_text(json.dumps(measured[1]))
    with refuses("not_found", kind=InputError):
        results.read(tmp_path / "none.json")
    for content, code, param in (
        ("{", "unreadable", None),
        ("[]", "invalid_model", "kind"),
        ('{"kind": "other"}', "invalid_model", "kind"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with refuses(code, param, ModelError):
            results.read(tmp_path / "bad.json")
    (tmp_path / "new.json").write_text(json.dumps({**measured[1], "schema": 99}))
    assert main(["bench", "compare", str(good), str(tmp_path / "new.json")]) == 1
    other = changed(measured[1])
    for row in other["rows"]:
        row["steps"] = 77
    with refuses("mismatch", kind=InputError):
        results.compare(measured[1], other)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--engines", "torch,fast"], "unknown engine 'fast'"),
        (["--vs", "everyone"], "unknown peer 'everyone'"),
        (["--estimate", "maybe"], "unknown estimate 'maybe'"),
        (["--plot", "a.png"], "expected a name that ends in .svg"),
        (["--html", "/nowhere/a.html"], "/nowhere does not exist"),
        (["--runs", "0"], "--runs is 0"),
        (["compare", "a.json"], "'compare a.json' is nothing to do"),
        (["--plans", "reference,handover"], "handover"),
        (["--frames", "6"], "num_frames is 6; expected 4k+1"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_measured(
    arguments, words, capsys, monkeypatch
):
    monkeypatch.setattr(command, "suite", lambda *args: pytest.fail("measured"))
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def hostile(found):
    """Results whose every word is a script."""
    other = copy.deepcopy(found)
    other |= {"prompt": SCRIPT, "preset": SCRIPT, "notes": [SCRIPT]}
    other["fingerprint"]["command"] = other["fingerprint"]["hardware"]["processor"] = SCRIPT
    other["fingerprint"]["versions"] = {SCRIPT: SCRIPT}
    for row in [*other["rows"], *other["peers"]]:
        row |= {"plan": SCRIPT, "engine": SCRIPT, "peer": SCRIPT}
    other["rows"][0]["thumbnail"] = f'x" onerror="alert(1){SCRIPT}'
    other["rows"][-1] |= {"failed": SCRIPT}
    other["scaling"] = {SCRIPT: {SCRIPT: found["scaling"]["frames"]["small"]}}
    return other


def test_the_page_is_one_file_and_escapes_everything(measured):
    folder, found, _ = measured
    text = (folder / "a.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.found.count("table") == 2 and tags.found.count("img") == 3 and "svg" in tags.found
    assert all(link.startswith("data:image/png;base64,") for link in tags.links)  # self-contained
    for made in (text, page(hostile(found)), drawing(hostile(found))):
        tags = Tags()
        tags.feed(made)
        assert "script" not in tags.found and SCRIPT not in made and 'onerror="' not in made
    assert "a red circle &lt;script&gt;" in (folder / "a.html").read_text()
    assert drawing(found).count("<rect") > 3 * 6 and (folder / "a.svg").read_text().startswith(
        "<svg"
    )


@pytest.mark.browser
def test_a_browser_shows_the_page(measured, tmp_path):
    (tmp_path / "a.html").write_text(page(hostile(measured[1])))
    shown = dump(program("chromium"), tmp_path / "a.html", tmp_path / "profile")
    assert (
        "<title>Latency: " in shown and "<title>owned" not in shown and "<h2>Scaling</h2>" in shown
    )


def test_a_clip_says_what_the_call_takes(tiny_pipe):
    clip = Clip(ClipSize(48, 32, 5), 6, prompt="a")
    assert clip.inputs == dict(height=32, width=48, num_frames=5, prompt="a")
    given = Clip(ClipSize(48, 32, 5), 6, embeds={"prompt_embeds": torch.zeros(1, 2, 3)}).inputs
    assert "prompt" not in given and given["prompt_embeds"].shape == (1, 2, 3)
    assert len(clip.plan(tiny_pipe, "reference")) == 6
    assert len(clip.plan(tiny_pipe, "small:2/6 large:5")) == 7


def test_a_table_of_numbers_is_what_was_measured(measured):
    rows = [r for r in measured[1]["rows"] if "failed" not in r]
    assert np.allclose(
        [r["total_duration_ms"] for r in rows], [np.median(r["total_runs_ms"]) for r in rows]
    )


def test_tables_in_the_readme_are_those_of_their_files():
    """No figure in a table was typed."""
    text = (ROOT / "bench" / "README.md").read_text()
    assert (
        "<!-- results results/cpu/mini.json -->" in text
        and tables.fill(text, ROOT / "bench") == text
    )
    text = (ROOT / "README.md").read_text()
    assert (
        "<!-- headline bench/results/cpu/mini.json -->" in text and tables.fill(text, ROOT) == text
    )


def test_tables_hold_what_was_measured(measured):
    text = tables.tables(measured[1])
    assert (
        f"{measured[1]['rows'][0]['total_duration_ms']:.0f}, " in text
        and "identical" in text
        and "| tensorrt |" in text
    )
    assert "(another plan)" in text and " tokens²" in text and "| steps |" in text
    head = tables.headline(measured[1])
    assert (
        "| `reference` | the paper's schedule written down, diffusers' transformers |" in head
        and ", another clip" in head
    )
    assert "| torch |" in head and "tensorrt" not in head.split("engine, plan")[1]  # it failed here
    alone = tables.headline(
        {**measured[1], "peers": [{"peer": "naive", "failed": "not installed"}]}
    )
    assert "schedule" not in alone and "| torch |" in alone


def test_the_naive_schedule_without_diffusers_is_the_same(tiny_pipe, monkeypatch):
    """Our DiTs and our UniPC: a machine without diffusers has a schedule to compare with too."""
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    told, none = tiny_pipe.encode_prompt("a red circle")
    clip = Clip(
        ClipSize(48, 32, 5), 4, 0, None, {"prompt_embeds": told, "negative_prompt_embeds": none}
    )
    (row,) = peers.measure_peers(tiny_pipe, ("naive-ours",), clip, 1, 0)
    assert row["latent_error"] < 1e-5 and row["ratio"] > 0


def test_parts_of_an_engine_are_chosen(tiny_pair, tmp_path, capsys):
    """One that there is not fails its rows, and says which there are."""
    line = [
        "bench",
        "--pair",
        str(tiny_pair),
        "--engines",
        "onnx",
        "--parts",
        "small,lage",
        "--plans",
        "small:2 large:*",
    ]
    assert main([*line, "--runs", "1", "--warmup", "0", "--json", str(tmp_path / "a.json")]) == 0
    failed = [r for r in results.read(tmp_path / "a.json")["rows"] if "failed" in r]
    assert [r["engine"] for r in failed] == ["onnx"] and "did you mean 'large'" in failed[0][
        "failed"
    ]


def shown_documents():
    """Documents that tables and pages are made of, and what makes them."""
    cpu = Path(tables.__file__).parent / "results" / "cpu"
    report = json.loads((cpu / "mini.json").read_text())
    row = {**report["rows"][0], "thumbnail": "data:image/png;base64,AA"}
    row["denoise_steps_ms"] = row["denoise_steps_ms"][:1]
    timed = {"ours_ms": {"p50": 1.0}, "theirs_ms": {"p50": 2.0}, "ratio": 2.0}
    peer = {"peer": "diffusers", "plan": "large", "same_mathematics": True, **timed}
    fit = {"coefficients": [1.0, 2.0], "powers": [0, 1], "r2": 0.9}
    points = [{"tokens": 1, "ms": 1.0}, {"tokens": 2, "ms": 2.0}]
    report |= {
        "rows": [row, {"plan": "x", "engine": "torch", "failed": "no"}],
        "peers": [{**peer, "psnr_db": 3.0, "latent_error": 0.1}, {"peer": "x", "failed": "no"}],
        "scaling": {"frames": {"large": {"points": points, "fit": fit}}},
        "estimate": {"rows": [{"plan": "large", "steps": 2, "denoise_ms_at_least": 1.0}]},
    }
    serve = json.loads((cpu / "serve.json").read_text())
    return [
        (report, tables.tables),
        (report, tables.headline),
        (report, page),
        (report, drawing),
        (serve, tables.load_table),
    ]


WRONG = [None, True, -1, 0, 1e308, 10**30, "", "x", "\ud800", [], [1], {}, {"a": 1}, [[]], [None]]


@pytest.mark.parametrize("place", range(5))
def test_a_document_of_wrong_inner_types_is_our_error_or_a_table(place):
    """Every field replaced by every kind of value, and left out."""
    document, make = shown_documents()[place]
    assert len(make(document)) > 100
    tried = refused = 0
    for *parents, last in [p for p in places(document) if p]:
        at = document
        for key in parents:
            at = at[key]
        kept = at[last]
        for wrong in [*WRONG, KeyError]:
            if wrong is KeyError:
                del at[last]
            else:
                at[last] = wrong
            try:
                assert isinstance(make(document), str)
            except ModelError as error:
                refused += 1
                assert len(str(error)) < 1600
            tried += 1
            if isinstance(at, list) and wrong is KeyError:
                at.insert(last, kept)
            else:
                at[last] = kept
    assert tried > 400 and refused > tried / 4


def test_a_tables_file_that_is_none_is_one_sentence(tmp_path, monkeypatch, capsys):
    for name, content in (("a.json", "{"), ("b.json", '{"run": {"torch": 1}}'), ("c.json", "[]")):
        (tmp_path / name).write_text(content)
        document = tmp_path / "r.md"
        document.write_text(f"<!-- results {name} -->\nold\n<!-- end -->")
        monkeypatch.setattr(sys, "argv", ["tables", str(document)])
        with pytest.raises(SystemExit, match=name):
            tables.main()
        assert "old" in document.read_text()
    monkeypatch.setattr(sys, "argv", ["tables", str(tmp_path / "none.md")])
    with pytest.raises(SystemExit, match="none.md"):
        tables.main()


SUITE = {
    "run": {"torch": "2", "triton": "3", "date": "2026-01-01", "commit": "c", "command": "x"},
    "roofs": {"machine": {"gpu": "H200"}},
    "kernels": {"band_blend 60x104": {"eager_called_ms": 8.0, "called_ms": 1.0}},
    "attention": {"self 1: sdpa": {"ms": 1.0, "exact": True}},
    "swap": {"resident": {"first_over_median": 1.0}},
}


def test_a_suite_of_wrong_inner_types_is_our_error_or_a_table(tmp_path):
    path = tmp_path / "suite.json"
    for *parents, last in [p for p in places(SUITE) if len(p) <= 2 and p]:
        for wrong in [w for w in WRONG if w != "\ud800"]:
            document = copy.deepcopy(SUITE)
            at = document
            for key in parents:
                at = at[key]
            at[last] = wrong
            path.write_text(json.dumps(document))
            try:
                assert "wanted" in tables.made_of(path)
            except NexusError as error:
                assert str(path) in str(error)
    path.write_text(json.dumps({**SUITE, "swap": {"resident": {"first_over_median": 0}}}))
    assert "wanted" in tables.made_of(path)


def test_a_row_that_failed_with_null_did_not_fail(measured):
    report = measured[1]
    rows = [{**r, "failed": None} for r in report["rows"] if "failed" not in r]
    assert results.compare({**report, "rows": rows}, report)[1] == []
    many = [{**rows[0], "total_runs_ms": [1.0] * 10_001}]
    with refuses("too_large", "rows[0].total_runs_ms", ModelError):
        results.report_of({**report, "rows": many}, "F")


def test_the_hardware_of_a_gpu_is_named(monkeypatch):
    made = SimpleNamespace(name="NVIDIA H200", total_memory=141 * 10**9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: made)
    found = results.hardware(torch.device("cuda"))
    assert (found["gpu"], found["gpu_bytes"], found["sm"]) == ("NVIDIA H200", 141 * 10**9, "9.0")
