"""TensorRT for RTX really builds, without a GPU; what has not been compared is not loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from nexus_rt import InputError, ModelError, cli
from nexus_rt.core.size import ClipSize
from nexus_rt.engines.folder import EngineFolder
from nexus_rt.export import build
from nexus_rt.export import tensorrt as builder
from nexus_rt.export.build import Target, export_component
from nexus_rt.export.components import (
    DecoderComponent,
    GeneratorComponent,
    TextComponent,
)
from nexus_rt.export.dynamic_shapes import Traced
from tests.needs import needs
from tests.refusals import refuses

needs("tensorrt_rtx", "onnx", "onnxscript")
pytestmark = pytest.mark.toolchain
CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def target(**change):
    sizes = (ClipSize(32, 32, 5), ClipSize(48, 32, 5))
    return Target(
        **{
            "backend": "tensorrt-rtx",
            "precision": "fp16",
            "buckets": sizes,
            "device": CPU,
            **change,
        }
    )


def small(pair):
    return GeneratorComponent("small", pair / "small")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


@no_gpu
@pytest.mark.parametrize(
    "precision, sm", [("fp16", None), pytest.param("fp32", "8.9", marks=pytest.mark.slow)]
)
def test_an_engine_is_built_and_waits_for_a_gpu_to_compare_it(
    precision, sm, tiny_pair, cache, capsys
):
    engine = export_component(
        small(tiny_pair), target(precision=precision, sm=sm), "nexus-rt export -o x"
    )
    m = engine.manifest
    assert set(m.files) == {
        f"{g}.{kind}" for g in ("context", "velocity") for kind in ("engine", "json")
    }
    assert m.files["velocity.engine"]["bytes"] > 10_000 and m.device == {
        "type": "cuda",
        "sm": sm,
        "name": None,
    }
    report = json.loads((engine.path / "velocity.json").read_text())
    # a block: self and cross
    assert report["attention_operators"] == (2 if precision == "fp16" else 0)
    assert report["attention_fused"] is None and report["inspected"] == "needs a GPU"
    assert m.parity["compared"] is False
    with refuses("parity", kind=ModelError) as caught:
        engine.check_parity()
    assert "never compared" in str(caught.value)
    assert cli.main(["engines", "list"]) == 0 and "never compared" in capsys.readouterr().out


@no_gpu
def test_a_gpu_that_appears_compares_what_is_in_the_cache(tiny_pair, cache, monkeypatch):
    def quick(graph, traced, folder, target):
        (folder / f"{graph}.engine").write_text("plan")

    monkeypatch.setattr(builder, "build", quick)
    nothing = SimpleNamespace(forget=lambda: None)
    monkeypatch.setattr(
        GeneratorComponent, "trace", lambda self, *args: dict.fromkeys(self.graphs(), nothing)
    )
    monkeypatch.setattr(build, "contract", lambda traced: {})
    first = export_component(small(tiny_pair), target(), "x")
    monkeypatch.setattr(builder, "can_run", lambda: True)
    monkeypatch.setattr(builder, "build", lambda *args: pytest.fail("built again"))
    monkeypatch.setattr(
        build, "engine_of", lambda *args: type("Engine", (), {"unload": lambda self: None})()
    )
    monkeypatch.setattr(build, "gate", lambda *args: {"passed": True, "why": "", "rows": {}})
    second = export_component(small(tiny_pair), target(), "x")
    assert (
        second.path == first.path
        and second.manifest.parity["passed"]
        and not first.manifest.parity["passed"]
    )
    EngineFolder.read(second.path).check_parity()


@no_gpu
def test_a_builder_that_dies_takes_nothing_with_it(tiny_pair, cache, monkeypatch):
    traced = small(tiny_pair).trace("fp16", target().ordered(), CPU, ("torch", "auto"))
    monkeypatch.setattr(GeneratorComponent, "trace", lambda self, *args: traced)
    # of another width
    monkeypatch.setattr(
        builder, "profiles", lambda *args: [{"embeds": [[1, 2, 3], [1, 2, 3], [1, 2, 3]]}]
    )
    with refuses("unsupported", kind=ModelError) as caught:
        export_component(small(tiny_pair), target(), "x")
    assert "tensorrt-rtx" in str(caught.value) and "context" in str(caught.value)
    monkeypatch.setattr(builder.sys, "executable", shutil.which("false"))
    with refuses("unsupported", kind=ModelError) as caught:
        export_component(small(tiny_pair), target(), "x")
    assert "context" in str(caught.value) and "said nothing" in str(caught.value)


@no_gpu
@pytest.mark.parametrize(
    "change, code, param, words",
    [
        ({"backend": "tensorrt"}, "missing_package", "backend", "tensorrt"),
        ({"sm": "9.0"}, "unsupported", "sm", "8.9"),
    ],
)
def test_what_cannot_be_built_is_said_before_any_work(change, code, param, words, tiny_pair, cache):
    with refuses(code, param, InputError) as caught:
        export_component(small(tiny_pair), target(**change), "x")
    assert words in str(caught.value) and not cache.exists()


def test_a_profile_a_size_and_both_kinds_of_step():
    stacked = (3, "batch", "tokens", 4, 32)
    shapes = {
        "latents": ("batch", 16, "frames", "2*rows", "2*columns"),
        "timestep": (),
        "keys": stacked,
    }
    found = builder.profiles(Traced(None, {}, shapes, ()), target())
    assert [p["latents"] for p in found] == [[[n, 16, 2, 4, w] for n in (1, 2, 2)] for w in (4, 6)]
    assert (
        found[0]["keys"] == [[3, 1, 2, 4, 32], [3, 2, 128, 4, 32], [3, 2, 2560, 4, 32]]
        and "timestep" not in found[0]
    )
    prompt = Traced(None, {}, {"embeds": ("batch", "tokens", 8)}, ())
    # of no size
    assert builder.profiles(prompt, target()) == [
        {"embeds": [[1, 2, 8], [2, 128, 8], [2, 2560, 8]]}
    ]
    (span,) = builder.profiles(Traced(None, {}, shapes, ()), target(range=True))
    assert span["latents"] == [[1, 16, 2, 4, 4], [2, 16, 2, 4, 6], [2, 16, 2, 4, 6]]


@no_gpu
@pytest.mark.parametrize(
    "part, graphs",
    [
        pytest.param(DecoderComponent, {"first", "next"}, marks=pytest.mark.slow),
        (TextComponent, {"encode"}),
    ],
)
def test_the_other_parts_are_built(part, graphs, tiny_pair, cache):
    source = tiny_pair / "vae" if part is DecoderComponent else tiny_pair
    engine = export_component(part(source), target(precision="fp32", sm="8.9"), "x")
    assert {f.split(".")[0] for f in engine.manifest.files} == graphs
