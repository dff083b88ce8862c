"""examples/: programs without this package open exported folders in place, and compute the same."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_rt import NexusPipeline
from nexus_rt.cli import main
from nexus_rt.core.cpu import instruction_sets
from nexus_rt.core.errors import ModelError
from nexus_rt.engines import aoti, registry
from nexus_rt.engines.folder import EngineFolder, engines_root
from nexus_rt.engines.registry import open_engine
from tests.conftest import SIZES
from tests.refusals import refuses

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.export
def test_onnx_runtime_alone_makes_the_same_clip(tiny_engines, tiny_pair):
    noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    prompt = "a red circle moves left"
    got = loaded("onnx_consumer").generate(tiny_engines, prompt, noise.numpy(), 4, 3.0, 3.0)
    pipe = NexusPipeline.from_pretrained(tiny_pair)
    pipe.set_progress_bar_config(disable=True)
    options = dict(
        plan="large", solver="euler", num_inference_steps=4, shift=3.0, guidance_scale=3.0
    )
    wanted = pipe(prompt, latents=noise, width=48, height=32, num_frames=5, **options).frames[0]
    assert got.shape == wanted.shape and np.abs(got - wanted).max() < 1e-3


@pytest.mark.export
def test_the_example_needs_nothing_of_ours(tiny_engines, tmp_path):
    code = f"""
import sys
for name in ("torch", "nexus_rt", "transformers", "diffusers"):
    sys.modules[name] = None
sys.argv = ["x", {str(tiny_engines)!r}, "a red circle", {str(tmp_path / "clip.npy")!r}]
exec(compile(open({str(EXAMPLES / "onnx_consumer.py")!r}).read(), "x", "exec"))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    assert np.load(tmp_path / "clip.npy").shape == (5, 32, 32, 3)


@pytest.mark.export
def test_graphs_are_whole_named_and_tell_nothing_of_this_machine(tiny_engines, engines_cache):
    """onnx itself opens and checks them; dynamic axes have names; one copy on this disk; no path
    inside."""
    import onnx

    paths = sorted((tiny_engines).rglob("*.onnx"))
    assert len(paths) == 2 + 2 + 2 + 1  # generators, decoder, text encoder
    for path in paths:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path))
        contract = json.loads((path.parent / "manifest.json").read_text())["contract"][path.stem]
        axes = set()
        for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
            shapes = [
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
            ]
            assert [(e["name"], e["shape"]) for e in contract[kind]] == [
                (v.name, s) for v, s in zip(values, shapes, strict=True)
            ]
            assert all(e["meaning"] and e["dtype"] for e in contract[kind])
            axes |= {d for s in shapes for d in s if isinstance(d, str)}
        assert {a.rpartition("*")[2] for a in axes} <= {
            "batch",
            "tokens",
            "words",
            "frames",
            "height",
            "width",
        }
        text = path.read_bytes()
        for word in (str(Path.cwd()), "site-packages", "/nexus_rt/", '.py"'):
            assert word.encode() not in text
        assert (
            path.stat().st_nlink == 1 and path.with_name(f"{path.name}.data").stat().st_nlink == 1
        )
    cached = {p.resolve() for p in (engines_cache / "engines").iterdir()}
    assert {
        p.parent.resolve() for p in tiny_engines.rglob("*.data")
    } <= cached  # one copy: the cache has links


@pytest.mark.export
def test_a_second_folder_is_another_s_copy_and_both_are_whole(
    tiny_engines, tiny_pair, own_cache, tmp_path, capsys
):
    second, parts = tmp_path / "second", ("vae", "text_encoder", "large")
    line = [
        "export",
        "--pair",
        str(tiny_pair),
        "--parts",
        ",".join(parts),
        "--sizes",
        ",".join(SIZES[::-1]),
    ]
    assert main([*line, "-o", str(second)]) == 0
    assert "building" not in capsys.readouterr().err
    for folder in (tiny_engines, second):
        assert main(["engines", "verify", *(str(folder / p) for p in parts)]) == 0
    manifest = json.loads((second / "large" / "manifest.json").read_text())
    assert str(second) in manifest["command"]  # what rebuilds it is the asker's own line
    (second / "large").rename(second / "small")
    with refuses("mismatch", "part", ModelError):
        NexusPipeline.from_engines(second)


@pytest.mark.export
def test_a_damaged_engine_that_kept_its_time_is_found_and_built_again(
    tiny_pair, tiny_engines, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    made = EngineFolder.read(tiny_engines / "text_encoder")
    shutil.copytree(made.path, engines_root() / made.manifest.identity())
    line = ["export", "--pair", str(tiny_pair), "--parts", "text_encoder"]
    line += ["-o", str(tmp_path / "out")]
    assert main(line) == 0 and "found in the cache" in capsys.readouterr().err
    file = tmp_path / "out" / "text_encoder" / "encode.onnx.data"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert main(["engines", "verify", str(file.parent)]) == 1
    assert main(["engines", "verify"]) == 1
    capsys.readouterr()
    assert main(line) == 0 and "building encode" in capsys.readouterr().err
    assert main(["engines", "verify", str(file.parent)]) == 0


@pytest.mark.export
def test_aoti_without_this_package(tiny_pair, small_aoti, own_cache, tmp_path, monkeypatch):
    """The loader that the manifest names; and an engine whose instruction sets are not here is
    refused."""
    line = [
        "export",
        "--pair",
        str(tiny_pair),
        "--backend",
        "aoti",
        "--parts",
        "small",
        "--sizes",
        ",".join(SIZES),
    ]
    out = tmp_path / "out"
    assert main([*line, "-o", str(out)]) == 0
    manifest = json.loads((out / "small" / "manifest.json").read_text())
    assert (
        manifest["options"]["loader"] == aoti.LOADER
        and manifest["options"]["instruction_sets"] == instruction_sets() != []
    )
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); sys.modules['nexus_rt'] = None\n"
    code += (
        "import aoti_consumer, pathlib;"
        f" print(tuple(aoti_consumer.main(pathlib.Path({str(out / 'small')!r})).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("(1, 16, 2, 4, 4)")
    open_engine(out / "small", torch.device("cpu"))
    monkeypatch.setattr(
        registry, "instruction_sets", lambda: manifest["options"]["instruction_sets"][1:]
    )
    with refuses("mismatch", kind=ModelError) as caught:
        open_engine(out / "small", torch.device("cpu"))
    absent = manifest["options"]["instruction_sets"][0]
    assert absent in str(caught.value) and "nexus-rt export" in str(caught.value)


def test_a_text_encoder_in_half_precision_is_refused_before_work(tiny_pair, tmp_path, capsys):
    line = [
        "export",
        "--pair",
        str(tiny_pair),
        "--parts",
        "large,text_encoder",
        "--precision",
        "fp16",
        "-o",
        str(tmp_path / "o"),
    ]
    assert main(line) == 2 and "the text encoder is not exported in fp16" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "written, meant",
    [
        ("8.9", "8.9"),
        ("89", "8.9"),
        ("sm_89", "8.9"),
        ("sm120", "12.0"),
        ("12.0", "12.0"),
        ("9.0a", "9.0"),
    ],
)
def test_a_compute_capability_is_one_thing_however_it_is_written(written, meant):
    from nexus_rt.cli.export import capability
    from nexus_rt.core.errors import InputError

    assert capability(written) == meant
    with refuses("invalid_value", "sm", InputError):
        capability("hopper")


def test_a_worker_makes_clips_reports_errors_and_cancels(tiny_pair, tmp_path):
    """examples/embed.py: what a server does with a pipeline."""
    embed = loaded("embed")
    worker = embed.Worker(NexusPipeline.from_pretrained(tiny_pair))
    good = worker.submit(embed.Job("a red circle", tmp_path / "a.mp4", steps=3))
    bad = worker.submit(embed.Job("a red circle", tmp_path / "b.mp4", steps=0))
    long = worker.submit(embed.Job("a red circle", tmp_path / "c.mp4", steps=5000))
    assert good.done.wait(60) and bad.done.wait(60)
    assert good.file.stat().st_size and good.progress == 1.0 and good.error is None
    assert "num_inference_steps is 0" in bad.error and not bad.file.exists()
    while not long.progress:
        assert not long.done.wait(0.01)
    late = worker.submit(embed.Job("a red circle", tmp_path / "d.mp4", steps=3))
    worker.cancel(late)
    worker.cancel(long)
    worker.close()
    assert long.cancelled and late.cancelled and not long.file.exists() and not late.file.exists()


@pytest.mark.export
@pytest.mark.process
def test_exported_engines_are_served(tiny_engines, tmp_path):
    from tests.serving import ServerProcess, ask, wait_for

    arguments = ["--engines", str(tiny_engines), "--plan", "large", "--no-warmup"]
    with ServerProcess(tmp_path / "store", *arguments) as server:
        server.ready()
        body = {"prompt": "a red circle", "size": "48x32", "num_frames": 5}
        body |= {"num_inference_steps": 4}
        status, _, job = ask(server.address, "/v1/videos", "POST", body)
        assert status == 200, job
        path = f"/v1/videos/{job['id']}"
        ended = wait_for(lambda: (row := ask(server.address, path)[2])["completed_at"] and row, 60)
        assert ended["status"] == "completed"
        refused = ask(server.address, "/v1/videos", "POST", {**body, "size": "64x64"})[2]
        assert "was built for" in refused["error"]["message"]
        refused = ask(server.address, "/v1/videos", "POST", {**body, "lora": "x"})[2]
        assert refused["error"]["param"] == "lora"
