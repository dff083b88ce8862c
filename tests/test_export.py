"""Exporting: wrong engines are caught, interrupted builds go on, builders do not clash, and nothing
half-made has a name."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest
import torch

from nexus_rt import InputError, ModelError, NexusPipeline, cli
from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.size import ClipSize
from nexus_rt.engines import folder as folders
from nexus_rt.engines.folder import EngineFolder
from nexus_rt.engines.registry import engine_of
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.export import build, components, contract, graph, parity
from nexus_rt.export import onnx as onnx_builder
from nexus_rt.export.build import Target, export_component
from nexus_rt.export.components import (
    DecoderComponent,
    GeneratorComponent,
    TextComponent,
    chosen_components,
)
from nexus_rt.loading.pair_folder import find_pair
from nexus_rt.loading.transformer import load_transformer
from tests.bad_values import parameters, raw_errors
from tests.conftest import SIZES
from tests.needs import needs
from tests.refusals import refuses

CPU = torch.device("cpu")
SIZE = ClipSize(32, 32, 5)
needs("onnx", "onnxscript", "onnxruntime")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def target(**change):
    return Target(
        **{"backend": "onnx", "precision": "fp32", "buckets": (SIZE,), "device": CPU, **change}
    )


def export_small(pair, **change):
    said = []
    return (
        export_component(
            GeneratorComponent("small", pair / "small"),
            target(**change),
            "nexus-rt export -o x",
            said.append,
        ),
        said,
    )


def without_building(monkeypatch):
    """Building and comparing replaced by a file and a pass: for what stands around them."""
    nothing = SimpleNamespace(forget=lambda: None)
    monkeypatch.setattr(
        GeneratorComponent, "trace", lambda self, *args: dict.fromkeys(self.graphs(), nothing)
    )
    monkeypatch.setattr(
        onnx_builder,
        "build",
        lambda name, traced, folder, target: (folder / f"{name}.onnx").write_text(name),
    )
    monkeypatch.setattr(
        build, "engine_of", lambda folder, device: SimpleNamespace(unload=lambda: None)
    )
    monkeypatch.setattr(build, "contract", lambda traced: {})
    monkeypatch.setattr(build, "gate", lambda *args: {"passed": True, "why": "", "rows": {}})


@pytest.fixture
def quick(monkeypatch):
    without_building(monkeypatch)


@pytest.mark.export
def test_one_graph_serves_several_sizes_and_holds_no_scatter(tiny_pair):
    sizes = (ClipSize(32, 32, 5), ClipSize(64, 48, 9), ClipSize(48, 32, 1))
    engine, said = export_small(tiny_pair, buckets=sizes)
    assert engine.manifest.parity["passed"] and len(engine.manifest.parity["rows"]) == 2 * 3 + 1
    model = onnx.load(str(engine.path / "velocity.onnx"), load_external_data=False)
    kinds = {n.op_type for n in model.graph.node}
    assert (
        not {"ScatterND", "ScatterElements"} & kinds and {"Attention", "RMSNormalization"} <= kinds
    )
    assert model.opset_import[0].version == engine.manifest.opset == 23
    assert [line for line in said if "building" in line] == [
        "small: building context (onnx, fp32)",
        "small: building velocity (onnx, fp32)",
    ]
    assert set(engine.manifest.files) >= {"context.onnx", "velocity.onnx", "velocity.onnx.data"}
    again, said = export_small(tiny_pair, buckets=sizes[::-1])
    # the same sizes in another order are the same engine
    assert again == engine and "found in the cache" in said[-1]
    runs, reference = (
        engine_of(engine, CPU),
        TorchEngine(load_transformer(tiny_pair / "small", torch.float32)),
    )
    embeds, x, t = torch.randn(1, 5, 32), torch.randn(1, 16, 2, 4, 6), torch.tensor(700.0)
    with refuses("unsupported", "size", InputError):
        runs.velocity(x, t, runs.prepare(embeds))
    # the same graph as a range
    ends = replace(engine.manifest, buckets=[[32, 32, 1], [64, 48, 9]], options={"range": True})
    runs = engine_of(replace(engine, manifest=ends), CPU)
    got, wanted = (e.velocity(x, t, e.prepare(embeds)) for e in (runs, reference))
    assert parity.distance(got, wanted)["relative_error"] < 1e-5
    with refuses("unsupported", "size", InputError) as caught:
        runs.check_size(ClipSize(80, 32, 1))
    assert "32x32x1 to 64x48x9" in str(caught.value)


@pytest.mark.export
@pytest.mark.parametrize("part", ["generator", "decoder", "text"])
def test_no_graph_gives_two_lengths_one_name(part, tiny_pair):
    """ONNX Runtime takes axes of one name for equal."""
    made = {
        "generator": lambda: GeneratorComponent("small", tiny_pair / "small"),
        "decoder": lambda: DecoderComponent(tiny_pair / "vae"),
        "text": lambda: TextComponent(tiny_pair),
    }[part]()
    sizes = [SIZE, ClipSize(48, 64, 9)]
    for name, traced in made.trace("fp32", sizes, CPU, ("torch", "auto")).items():
        names = contract.symbols(traced)
        assert len(set(names.values())) == len(names) > 0, name
        ours = {axis for shape in traced.shapes.values() for axis in shape if isinstance(axis, str)}
        assert len(names) == len(ours), name


@pytest.mark.export
def test_a_graph_with_two_lengths_of_one_name_is_not_written(tiny_pair, monkeypatch):
    traced = GeneratorComponent("small", tiny_pair / "small").trace(
        "fp32", [SIZE, ClipSize(48, 64, 9)], CPU, ("torch", "auto")
    )["velocity"]
    monkeypatch.setattr(contract, "public", lambda dimension: "tokens")
    with pytest.raises(ValueError, match="lengths .*s.* of a graph would all be named tokens"):
        contract.contract(traced)


def test_what_an_engine_is_made_of_and_for_is_its_name(quick, tiny_pair, own_pair):
    names = {export_small(tiny_pair)[0].path.name, export_small(own_pair)[0].path.name}
    assert len(names) == 1  # a copy of the weights is the same weights
    names.add(export_small(tiny_pair, opset=20)[0].path.name)
    from safetensors.torch import load_file, save_file

    file = own_pair / "small" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"] += 1
    save_file(weights, file)
    names.add(export_small(own_pair)[0].path.name)
    assert len(names) == 3


def swapped_weights(monkeypatch, tiny_pair):
    right = components.transformer.load_transformer

    def load(folder, dtype, device, *rest, **named):
        model = right(folder, dtype, device, *rest, **named)
        if rest != ("torch",):  # the engine's model, not the reference
            for p in model.blocks[0].ffn.parameters():
                p.data = p.data.flip(0)
        return model

    monkeypatch.setattr(components.transformer, "load_transformer", load)


def wrong_rope(monkeypatch, tiny_pair):
    right = graph.rope_in_graph
    monkeypatch.setattr(
        graph,
        "rope_in_graph",
        lambda d, grid, device: (right(d, grid, device)[0], -right(d, grid, device)[1]),
    )


@pytest.mark.export
@pytest.mark.parametrize(
    "breaks", [swapped_weights, pytest.param(wrong_rope, marks=pytest.mark.slow)]
)
def test_a_broken_engine_is_kept_aside_and_refused(breaks, tiny_pair, monkeypatch, cache):
    with monkeypatch.context() as patch:
        breaks(patch, tiny_pair)
        with refuses("parity", kind=ModelError) as caught:
            export_small(tiny_pair)
    assert re.search("small .* velocity .* t=967: cosine", str(caught.value))
    (kept,) = cache.glob("*.failed")
    failed = EngineFolder.read(kept)
    assert not failed.manifest.parity["passed"] and not any(p.suffix == "" for p in cache.iterdir())
    with refuses("parity", kind=ModelError):
        failed.check_parity()
    without_building(monkeypatch)
    assert export_small(tiny_pair)[0].manifest.parity["passed"]  # the failure is not in the way


def test_an_engine_whose_velocity_is_not_finite_fails_the_gate(tiny_pair):
    class Infinite(TorchEngine):
        def velocity(self, *args):
            return super().velocity(*args) * float("inf")

    part = GeneratorComponent("small", tiny_pair / "small")
    model = load_transformer(tiny_pair / "small", torch.float32)
    result = parity.gate(part, Infinite(model), [SIZE], "fp32", CPU)
    assert not result["passed"] and result["why"] == f"velocity {SIZE} t=967: it is not finite"
    assert len(result["rows"]) == 4 and not any(row["right"] for row in result["rows"].values())
    assert parity.gate(part, TorchEngine(model), [SIZE], "fp32", CPU)["passed"]


def test_an_engine_that_does_not_run_fails_the_gate(tiny_pair):
    class Broken:
        def prepare(self, context):
            raise RuntimeError("no kernel for this\nand more")

    result = parity.gate(
        GeneratorComponent("small", tiny_pair / "small"), Broken(), [SIZE], "fp32", CPU
    )
    assert not result["passed"] and result["why"] == "it does not run: no kernel for this"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_goes_on_after_what_it_finished(
    quick, error, tiny_pair, monkeypatch, cache
):
    right, built = onnx_builder.build, []

    def stop_at_velocity(name, *rest):
        built.append(name)
        if name == "velocity" and len(built) == 2:
            raise error("stop")
        right(name, *rest)

    monkeypatch.setattr(onnx_builder, "build", stop_at_velocity)
    with pytest.raises(error if error is KeyboardInterrupt else ModelError, match="stop"):
        export_small(tiny_pair)
    assert [p.suffix for p in cache.iterdir() if p.is_dir()] == [".part"]
    engine, _ = export_small(tiny_pair)
    assert built == ["context", "velocity", "velocity"] and engine.manifest.parity["passed"]
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [engine.path.name]
    assert not list(engine.path.glob(".*"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_while_building_is_named(quick, tiny_pair, monkeypatch, code):
    def fail(*args):
        raise OSError(code, os.strerror(code), "velocity.onnx")

    monkeypatch.setattr(onnx_builder, "build", fail)
    with refuses("not_writable", kind=ModelError) as caught:
        export_small(tiny_pair)
    assert "velocity.onnx" in str(caught.value) and os.strerror(code) in str(caught.value)


@pytest.mark.export
def test_loading_engines_with_values_that_are_no_arguments(tiny_engines):
    load = NexusPipeline.from_engines
    names = [*parameters(load), "provider", "threads", "variant"]
    assert raw_errors(load, {"folder": tiny_engines}, names) == {}
    for option in ("variant", "return_dict"):
        with refuses("unknown_argument", option, InputError) as caught:
            load(tiny_engines, **{option: 1})
        assert "provider or threads" in str(caught.value)


def test_a_cache_or_an_output_that_cannot_be_written(tiny_pair, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = ["export", "--pair", str(tiny_pair), "--parts", "small", "-o"]
    assert cli.main([*line, str(tmp_path / "file")]) == 2
    assert "file cannot be written" in capsys.readouterr().err
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(onnx_builder, "build", lambda *a: pytest.fail("it was built first"))
    assert cli.main([*line, str(tmp_path / "out")]) == 2
    assert "set NEXUS_RT_CACHE to a folder" in capsys.readouterr().err


def test_an_output_that_fills_up_leaves_the_engines_in_the_cache(
    quick, tiny_pair, monkeypatch, tmp_path, cache, capsys
):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = ["export", "--pair", str(tiny_pair), "--parts", "small", "--sizes", "32x32x5", "-o"]
    with monkeypatch.context() as patch:
        patch.setattr(build, "link_tree", full)
        assert cli.main([*line, str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "No space left on device); free some space" in said and str(cache) in said
    assert cli.main([*line, str(tmp_path / "out")]) == 0
    assert "found in the cache" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_and_says_how_much(quick, tiny_pair, monkeypatch, cache):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(onnx_builder, "build", full)
        with refuses("not_writable", kind=ModelError) as caught:
            export_small(tiny_pair)
    assert re.search(r"0\.\d GB.* NEXUS_RT_CACHE", str(caught.value))
    assert not [p for p in cache.iterdir() if p.is_dir()]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with refuses("not_writable", kind=InputError) as caught:
        export_small(tiny_pair)
    assert "0.0 GB free" in str(caught.value)


def _export_in_a_process(pair, cache, queue):
    import os

    os.environ["NEXUS_RT_CACHE"] = str(cache)
    with pytest.MonkeyPatch.context() as patch:
        without_building(patch)
        built = onnx_builder.build
        # long enough to meet
        patch.setattr(onnx_builder, "build", lambda *args: (time.sleep(1), built(*args)))
        engine, said = export_small(pair)
    queue.put((str(engine.path), said))


@pytest.mark.process
def test_two_processes_build_one_engine(tiny_pair, cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_export_in_a_process, args=(tiny_pair, cache.parent, queue))
        for _ in range(2)
    ]
    for p in processes:
        p.start()
    results = [queue.get(timeout=200) for _ in processes]
    for p in processes:
        p.join()
    assert len({path for path, _ in results}) == 1
    built = [said for _, said in results if any("building" in line for line in said)]
    found = [said for _, said in results if any("found in the cache" in line for line in said)]
    assert len(built) == len(found) == 1


@pytest.mark.parametrize(
    "change, code, param",
    [
        ({"backend": "onxn"}, "unknown_name", "backend"),
        ({"precision": "fp8"}, "unknown_name", "precision"),
        ({"opset": 17}, "invalid_value", "opset"),
        ({"buckets": ()}, "missing", "sizes"),
        ({"precision": "bf16"}, "unsupported", "precision"),
    ],
)
def test_what_cannot_be_built_is_said_before_any_work(change, code, param, tiny_pair, cache):
    with refuses(code, param, InputError):
        export_small(tiny_pair, **change)
    assert not cache.exists()


def test_what_is_not_installed_is_named(tiny_pair, monkeypatch):
    monkeypatch.setattr(onnx_builder, "find_spec", lambda name: None)
    with refuses("missing_package", kind=InputError) as caught:
        export_small(tiny_pair)
    assert "onnx, onnxscript, onnxruntime" in str(caught.value)
    assert "pip install 'nexus-rt[onnx]'" in str(caught.value)


@pytest.mark.export
def test_the_command_makes_a_folder_that_generate_takes(
    tiny_pair, tiny_engines, own_cache, tmp_path, capsys
):
    out = tmp_path / "engines"
    command = ["export", "--pair", str(tiny_pair), "--sizes", ",".join(SIZES), "-o", str(out)]
    capsys.readouterr()
    assert cli.main(command) == 0
    said = capsys.readouterr()
    # a context, and three of each size
    assert f"{out / 'small'}: 0.1 MB, 7 comparisons passed" in said.out
    assert "large: found in the cache" in said.err
    assert {p.name for p in out.iterdir()} >= {
        "small",
        "large",
        "vae",
        "text_encoder",
        "tokenizer",
        "model_index.json",
    }
    video = tmp_path / "a.png"
    assert (
        cli.main(
            [
                "generate",
                "a red circle",
                "--engines",
                str(out),
                "--steps",
                "2",
                "-o",
                str(video),
                "--quiet",
            ]
        )
        == 0
    )
    assert video.stat().st_size > 0
    said = json.loads((out / "small" / "manifest.json").read_text())
    assert (
        said["command"] == f"nexus-rt export --pair {tiny_pair} --sizes {','.join(SIZES)} -o {out}"
    )
    assert (
        cli.main(["generate", "a", "--engines", str(out), "--size", "64x64", "-o", str(video)]) == 2
    )
    assert "built for: 32x32x5, 48x32x5" in capsys.readouterr().err
    assert (
        cli.main(["engines", "list", str(out / "small")]) == 0
        and "parity passed" in capsys.readouterr().out
    )


def test_a_folder_without_weights_is_no_source(tmp_path, tiny_pair):
    shutil.copytree(
        tiny_pair / "small", tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with refuses("missing", kind=ModelError):
        export_small(tmp_path)


def test_links_cost_no_second_copy_and_appear_whole(tmp_path, monkeypatch):
    source = tmp_path / "a"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "x").write_text("x")
    folders.link_tree(source, tmp_path / "b")
    assert (tmp_path / "b" / "inner" / "x").stat().st_ino == (source / "inner" / "x").stat().st_ino

    def refuse(*args):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(folders.os, "link", refuse)
    folders.link_tree(source, tmp_path / "c")
    assert (tmp_path / "c" / "inner" / "x").read_text() == "x"
    monkeypatch.setattr(folders.shutil, "copy2", refuse)
    with pytest.raises(OSError):
        folders.link_tree(source, tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_parts_are_named_or_the_generators(tiny_pair):
    found = find_pair(tiny_pair, {}, {})
    names = lambda *args: [p.name for p in chosen_components(found, *args)]
    assert names(None) == ["small", "large"] and names("vae, small,vae") == ["vae", "small"]
    with refuses("unknown_name", "part", InputError) as caught:
        names("vea")
    assert "did you mean 'vae'" in str(caught.value)
    alone = find_pair(None, {"small": tiny_pair / "small"}, {})
    with refuses("missing", "text_encoder", InputError):
        chosen_components(alone, "text_encoder")


def test_a_decoder_keeps_colours_where_the_generators_are_bfloat16(tiny_pair):
    assert (
        DecoderComponent(tiny_pair / "vae").precision("bf16") == "fp32"
        and TextComponent(tiny_pair).precision("bf16") == "bf16"
    )


def test_a_decoder_that_forgets_fails_the_gate(tiny_pair):
    class Forgets(VideoDecoder):
        def decode_video(self, z):
            return torch.cat(
                [
                    super().decode_video(z[:, :, :1]),
                    *(
                        super(Forgets, self).decode_video(z[:, :, i - 1 : i + 1])[:, :, 1:]
                        for i in range(1, z.shape[2])
                    ),
                ],
                2,
            )

    part = DecoderComponent(tiny_pair / "vae")
    engine = Forgets(tiny_pair / "vae", torch.float32, CPU)
    # two latent frames: nothing to forget
    assert parity.gate(part, engine, [ClipSize(32, 32, 5)], "fp32", CPU)["passed"]
    result = parity.gate(part, engine, [ClipSize(32, 32, 9)], "fp32", CPU)
    assert not result["passed"] and result["why"].startswith("frames 32x32x9: cosine")


@pytest.mark.slow
@pytest.mark.export
def test_int8_engines_multiply_in_int8_and_are_compared(tiny_pair, tmp_path, monkeypatch):
    """The blocks' matrices and what runs at every step; embeddings, the head and the context stay
    as they are."""
    import onnx

    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    command = ["export", "--pair", str(tiny_pair), "--parts", "large,vae", "--sizes", "48x32x5"]
    assert cli.main([*command, "--precision", "int8", "-o", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "large"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["precision"] == "int8" and manifest["parity"]["passed"]
    assert json.loads((tmp_path / "out/vae/manifest.json").read_text())["precision"] == "fp32"
    kinds = lambda name: [
        n.op_type for n in onnx.load(folder / name, load_external_data=False).graph.node
    ]
    layers = 2  # to_qkv, to_out, to_q, to_out and the two of the feed-forward
    assert kinds("velocity.onnx").count("MatMulInteger") == 6 * layers
    assert "MatMulInteger" not in kinds("context.onnx")
    pipe = NexusPipeline.from_engines(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    exact = NexusPipeline.from_pretrained(tiny_pair)
    exact.set_progress_bar_config(disable=True)
    clip = lambda p: (
        p(
            "a red circle",
            plan="large",
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            num_frames=5,
            width=48,
            height=32,
        ).frames
    )
    error = (clip(pipe) - clip(exact)).norm() / clip(exact).norm()
    assert 0 < error < 0.05
    assert cli.main(
        [*command, "--precision", "int8", "--backend", "aoti", "-o", str(tmp_path / "b")]
    )
