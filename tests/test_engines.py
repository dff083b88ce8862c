"""One conformance test over every backend that runs here, and what an engine folder refuses."""

import json
import os
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from nexus_rt import InputError, ModelError, NexusPipeline
from nexus_rt.cli.engines import maintain as engines_command
from nexus_rt.core.errors import DecodeError, NumericsError
from nexus_rt.core.size import ClipSize, parse_sizes
from nexus_rt.engines import folder as folders
from nexus_rt.engines.backends import ENGINE_BACKENDS
from nexus_rt.engines.exported_engine import Sessions
from nexus_rt.engines.folder import EngineFolder
from nexus_rt.engines.registry import engine_of, open_engine
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.export.build import BUILDERS, Target, export_component, export_components
from nexus_rt.export.components import GeneratorComponent, chosen_components, folders_beside
from nexus_rt.export.parity import distance
from nexus_rt.loading.pair_folder import MINI, find_pair
from nexus_rt.loading.transformer import load_transformer
from tests.conftest import SIZES
from tests.needs import needs
from tests.refusals import refuses

CPU = torch.device("cpu")
SIZE = ClipSize(48, 32, 5)
BACKENDS = [
    "torch",
    pytest.param("torch, compiled", marks=pytest.mark.toolchain),
    "onnx",
    *(pytest.param(name, marks=pytest.mark.export) for name in ("onnx 20", "onnx fp16", "aoti")),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = [
    pytest.param(f"{b} {p}", marks=[pytest.mark.gpu, needs_gpu])
    for b in ("tensorrt", "tensorrt-rtx")
    for p in ("fp16", "fp32")
]
needs("onnx", "onnxscript", "onnxruntime")


@pytest.fixture(scope="module")
def cache(engines_cache):
    """The cache of the tiny pair's engines, so that each is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXUS_RT_CACHE", str(engines_cache))
        yield folders.engines_root()


def generator(backend):
    """The large one has two blocks; where building is slow, the small one, which has one block."""
    return "large" if backend in ("torch", "onnx") else "small"


@pytest.fixture(scope="module")
def make(cache, tiny_pair):
    """backend name -> engine of a tiny generator; exported ones are opened from their folder."""

    def build(name):
        if name.startswith("torch"):
            model = load_transformer(tiny_pair / generator(name), torch.float32)
            for block in model.blocks if "compiled" in name else ():
                block.compile()
            return TorchEngine(model)
        backend, *rest = name.split()
        sizes = tuple(ClipSize.parse(s) for s in SIZES)
        target = Target(
            backend, "fp16" if "fp16" in rest else "fp32", sizes, CPU, 20 if "20" in rest else 23
        )
        part = GeneratorComponent(generator(name), tiny_pair / generator(name))
        return open_engine(export_component(part, target, "nexus-rt export").path, CPU)

    return build


@pytest.mark.parametrize("name", BACKENDS + ON_GPU)
def test_conformance(name, make, tiny_pair):
    """What the loop may ask of any backend: guided and plain steps, several samples, prompts of any
    length."""
    engine, model = make(name), load_transformer(tiny_pair / generator(name), torch.float32)
    reference = TorchEngine(model)
    assert engine.nbytes > 0.4 * reference.nbytes
    g = torch.Generator().manual_seed(0)
    allowed = 0.02 if "fp16" in name else 1e-5
    cases = ((1, True, 5, 16), (2, True, 9, 16), (1, False, 1, 40), (1, True, 12, 12))
    # a shape costs it a compilation
    for samples, guided, words, length in cases[:1] if "compiled" in name else cases:
        embeds = torch.zeros(samples * (1 + guided), length, 32)
        embeds[:, :words] = torch.randn(len(embeds), words, 32, generator=g)
        latents = torch.randn(samples, 16, *SIZE.latent, generator=g)
        kept = latents.clone()
        mine, theirs = engine.prepare(embeds), reference.prepare(embeds)
        for timestep in (987.0, 20.0):
            t = torch.tensor(timestep)
            got = engine.velocity(latents, t, mine)
            assert got.shape == (len(embeds), 16, *SIZE.latent) and got.dtype in (
                torch.float32,
                model.dtype,
            )
            assert distance(got, reference.velocity(latents, t, theirs))["relative_error"] < allowed
        assert torch.equal(latents, kept)
    first = engine.velocity(latents, t, mine).clone()
    engine.unload()
    engine.warmup(SIZE.latent)
    # contexts outlive a swap
    assert engine.resident and torch.allclose(engine.velocity(latents, t, mine), first, atol=1e-5)


def test_every_backend_has_a_builder():
    assert list(BUILDERS) == list(ENGINE_BACKENDS)
    assert all(find_spec(module) for module in BUILDERS.values())


def test_a_size_it_was_not_built_for_is_named(make):
    engine = make("onnx")
    with refuses("unsupported", "size", InputError) as caught:
        engine.velocity(torch.zeros(1, 16, 2, 4, 8), torch.tensor(1.0), None)
    assert "64x32x5" in str(caught.value) and "large" in str(caught.value)
    assert "32x32x5, 48x32x5" in str(caught.value)
    with refuses("mismatch", "context", InputError):
        engine.prepare(torch.zeros(1, 4, 31))


@pytest.mark.parametrize("text", ["832x480", "830x480x81", "832x480x80", "0x16x1", "axbxc"])
def test_a_size_that_is_none(text):
    with refuses("invalid_value", "size", InputError):
        ClipSize.parse(text)


@pytest.fixture
def own(make, tmp_path):
    """A copy of an engine folder that a test may damage."""
    return shutil.copytree(make("onnx").folder.path, tmp_path / "engine")


def edit(path, **change):
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


@pytest.mark.parametrize(
    "damage, code, words",
    [
        (lambda p: (p / "manifest.json").unlink(), "not_found", "manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "unreadable", "manifest.json"),
        (lambda p: (p / "manifest.json").write_text("[]"), "missing", "schema"),
        (lambda p: edit(p, schema=99), "unsupported", "schema 99"),
        (
            lambda p: (p / "velocity.onnx").write_bytes(b"short"),
            "damaged",
            "rebuild it: nexus-rt export",
        ),
        (lambda p: (p / "velocity.onnx.data").unlink(), "not_found", "velocity.onnx.data"),
        (
            lambda p: edit(p, device={"type": "cuda", "sm": "9.0", "name": "H200"}),
            "mismatch",
            "a GPU",
        ),
        (
            lambda p: edit(p, parity={"passed": False, "why": "cosine 0.3"}),
            "parity",
            "(cosine 0.3)",
        ),
        (lambda p: edit(p, parity={}), "parity", "never compared"),
    ],
)
def test_what_does_not_match_is_one_sentence(own, damage, code, words):
    damage(own)
    with refuses(code, kind=ModelError) as caught:
        open_engine(own, CPU)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_byte_is_found(own):
    file = own / "velocity.onnx.data"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with refuses("damaged", kind=ModelError) as caught:
        open_engine(own, CPU)
    assert "velocity.onnx.data" in str(caught.value) and "sha256" in str(caught.value)


def linked(source, folder, layout):
    """A copy of an engine folder made of links, as caches lay them out."""
    target = folder / "hub" / "models--x" / "snapshots" / "0a1b" / "engines" / "small"
    blobs = folder / "hub" / "models--x" / "blobs"
    target.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        large = file.name.endswith((".data", ".pt2"))
        place = blobs / f"{i:064x}"
        if layout == "each apart" or (layout == "large ones shared" and large):
            place = folder / "shared" / f"{i:02x}" / f"{i:064x}"
            place.parent.mkdir(parents=True)
        if layout == "large ones alone" and not large:
            place = target / file.name
        shutil.copyfile(file, place)
        if layout == "large ones shared" and large:  # the hub's blob is a link as well
            (blobs / f"{i:064x}").symlink_to(place)
            place = blobs / f"{i:064x}"
        if place.parent != target:
            (target / file.name).symlink_to(os.path.relpath(place, target))
    if layout == "a link to it":
        (folder / "small").symlink_to(target)
        return folder / "small"
    return target


@pytest.mark.parametrize("backend", ["onnx", pytest.param("aoti", marks=pytest.mark.export)])
@pytest.mark.parametrize(
    "layout",
    ["a hub's cache", "large ones shared", "each apart", "large ones alone", "a link to it"],
)
def test_folders_made_of_links_run(make, tmp_path, backend, layout):
    plain = make(backend)
    engine = open_engine(linked(plain.folder.path, tmp_path, layout), CPU)
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, *SIZE.latent, generator=g)
    embeds = torch.randn(1, 9, 32, generator=g)
    t = torch.tensor(500.0)
    made, expected = (e.velocity(latents, t, e.prepare(embeds)) for e in (engine, plain))
    assert torch.equal(made, expected) and expected.abs().max() > 0


@pytest.mark.parametrize("layout", ["a hub's cache", "large ones shared", "each apart"])
def test_a_link_to_another_file_is_found(make, tmp_path, layout):
    target = linked(make("onnx").folder.path, tmp_path, layout)
    file = target / "velocity.onnx.data"
    other = file.resolve().read_bytes()[:-1] + b"x"
    (tmp_path / "other").write_bytes(other)
    file.unlink()
    file.symlink_to(tmp_path / "other")
    with refuses("damaged", kind=ModelError) as caught:
        open_engine(target, CPU)
    assert "sha256" in str(caught.value)
    file.unlink()
    file.symlink_to(tmp_path / "absent")
    with refuses("not_found", kind=ModelError):
        open_engine(target, CPU)


@pytest.mark.export
def test_compiled_code_is_bound_to_its_version(make, tmp_path):
    path = shutil.copytree(make("aoti").folder.path, tmp_path / "engine")
    edit(path, backend_version="2.1.0")
    with refuses("mismatch", kind=ModelError) as caught:
        open_engine(path, CPU)
    assert "aoti 2.1.0" in str(caught.value) and torch.__version__ in str(caught.value)


def test_engines_of_a_gpu_say_so_before_they_are_read(own, monkeypatch):
    edit(own, backend="tensorrt", device={"type": "cuda", "sm": "9.0", "name": "H200"})
    folder = EngineFolder.read(own)
    there = {"type": "cuda", "sm": "8.9", "name": "L40"}
    with refuses("mismatch", kind=ModelError) as caught:
        folder.check_here({}, there)
    assert "9.0" in str(caught.value) and "8.9" in str(caught.value)
    with refuses("mismatch", kind=ModelError) as caught:
        folder.check_here({"tensorrt": "11.2"}, {**there, "sm": "9.0"})
    assert "tensorrt" in str(caught.value) and "11.2" in str(caught.value)
    with refuses("unsupported", "device", InputError):
        engine_of(folder, CPU)


def test_force_loads_what_failed(own):
    edit(own, parity={"passed": False, "why": "x"})
    assert open_engine(own, CPU, force=True).nbytes > 0


def export_whole(pair, target, output, names="small,large,vae,text_encoder"):
    """Every part of a pair as an engine."""
    found = find_pair(pair, {}, {})
    parts = chosen_components(found, names)
    export_components(
        parts,
        folders_beside(found, parts),
        pair / "model_index.json",
        target,
        output,
        "nexus-rt export -o engines",
    )
    return output


@pytest.fixture(scope="module")
def exported(cache, tiny_engines):
    """A folder of every tiny engine."""
    return tiny_engines


@pytest.mark.export
@pytest.mark.parametrize(
    "plan",
    [
        "small:1 bridge:2 large:1",
        "small:2/4 large:4@3/every=2/guidance-every=2",
        "small:2 renoise=0.7 large:3@2[0:2]/adaptive=0.3",
    ],
)
def test_a_pipeline_of_engines_makes_the_same_video(exported, tiny_pipe, plan):
    pipe = NexusPipeline.from_engines(exported)
    pipe.set_progress_bar_config(disable=True)
    steps = 4 if "bridge" in plan else None
    options = dict(num_frames=5, num_inference_steps=steps, plan=plan)
    got, wanted = (
        p(
            "a red circle",
            height=32,
            width=48,
            generator=torch.Generator().manual_seed(0),
            **options,
        ).frames
        for p in (pipe, tiny_pipe)
    )
    assert 10 * np.log10(1 / ((got - wanted) ** 2).mean()) > 80
    assert (pipe.defaults.width, pipe.defaults.height, pipe.defaults.num_frames) == SIZE
    with refuses("unsupported", "size", InputError):  # before anything is encoded
        pipe("a", height=32, width=64, num_frames=5)


@pytest.mark.slow
@pytest.mark.export
@pytest.mark.parametrize("backend", ["onnx", "aoti"])
def test_the_mini_pair_draws_the_same_frames(backend, cache, tmp_path):
    base = NexusPipeline.from_pretrained()
    size = ClipSize(base.defaults.width, base.defaults.height, base.defaults.num_frames)
    export_whole(MINI, Target(backend, "fp32", (size,), CPU), tmp_path / "e")
    prompt = (
        "the shape that rolls, in the colour of the sky, striped, moves left on a sand background"
    )
    frames = [
        p(prompt, generator=torch.Generator().manual_seed(0)).frames
        for p in (base, NexusPipeline.from_engines(tmp_path / "e"))
    ]
    assert 10 * np.log10(1 / ((frames[0] - frames[1]) ** 2).mean()) >= 45


@pytest.mark.export
def test_more_samples_than_a_run_takes_are_run_in_turn(exported, monkeypatch):
    def make():
        pipe = NexusPipeline.from_engines(exported)
        pipe.set_progress_bar_config(disable=True)
        for part in (*pipe.engines.values(), pipe.text):
            for_part = part.sessions.run
            monkeypatch.setattr(
                part.sessions,
                "run",
                lambda g, i, o, right=for_part: (sizes.append((g, i)), right(g, i, o)),
            )
        prompts = ["a red circle", "a blue square moves left", "", "a green star", "a star"]
        return pipe(
            prompts,
            height=32,
            width=48,
            num_frames=5,
            num_inference_steps=3,
            plan="small:1 bridge:1 large:1",
            guidance_scale_2=2.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    sizes = []
    wanted = make()
    assert max(len(t) for _, i in sizes for n, t in i.items() if n == "latents") >= 5
    sizes.clear()
    monkeypatch.setattr(Sessions, "most", 2)
    got = make()
    assert distance(got, wanted)["relative_error"] < 1e-5
    for graph, inputs in sizes:
        assert all(len(t) <= 2 for n, t in inputs.items() if n in ("latents", "embeds", "ids")), (
            graph
        )


@pytest.mark.export
def test_an_engine_that_is_not_finite_names_the_generator(exported):
    pipe = NexusPipeline.from_engines(exported)
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.zeros(1, 4, 32)
    with refuses("not_finite", kind=NumericsError) as caught:
        pipe(
            prompt_embeds=embeds * float("nan"),
            negative_prompt_embeds=embeds,
            plan="reference",
            num_inference_steps=2,
        )
    assert "small" in str(caught.value) and "step 0" in str(caught.value)


@pytest.mark.export
def test_a_clip_of_any_length_through_the_decoder(exported, tiny_pipe):
    decoder = NexusPipeline.from_engines(exported).vae
    for batch, frames in ((2, 1), (1, 2), (1, 4)):
        latents = torch.randn(
            batch, 16, frames, 4, 6, generator=torch.Generator().manual_seed(frames)
        )
        assert torch.allclose(decoder.decode(latents), tiny_pipe.vae.decode(latents), atol=1e-4)
    with refuses("decode_failed", kind=DecodeError) as caught:
        decoder.decode(torch.zeros(1, 16, 2, 4, 8))
    assert "64x32x5" in str(caught.value) and "vae" in str(caught.value)
    assert "32x32x5, 48x32x5" in str(caught.value)


@pytest.mark.export
def test_prompts_through_the_text_encoder(exported, tiny_pipe):
    encoder = NexusPipeline.from_engines(exported).text
    for prompts in (["a"], ["", "a red circle moves left on black background"], [""]):
        got, wanted = encoder.encode(prompts, 12), tiny_pipe.text.encode(prompts, 12)
        assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "text, code",
    [
        ("32x32x5..16x48x9", "out_of_range"),
        ("32x32x5..48x48x5,64x64x5", "conflict"),
        ("1..2..3", "conflict"),
    ],
)
def test_a_range_that_is_none(text, code):
    with refuses(code, "sizes", InputError):
        parse_sizes(text)


def test_a_folder_without_engines_says_what_makes_them(tmp_path):
    with refuses("not_found", kind=ModelError) as caught:
        NexusPipeline.from_engines(tmp_path)
    assert "`nexus-rt export`" in str(caught.value)


@pytest.mark.export
def test_engines_of_two_spaces_are_refused(exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "two")
    manifest = EngineFolder.read(path / "small").manifest
    edit(path / "small", architecture={**manifest.architecture, "text_dim": 64})
    with refuses("mismatch", "text_dim", ModelError):
        NexusPipeline.from_engines(path)


@pytest.mark.export
def test_engines_without_a_common_size_are_refused(exported, tmp_path):
    path = shutil.copytree(exported, tmp_path / "two")
    edit(path / "small", buckets=[[64, 64, 5]])
    with refuses("mismatch", kind=ModelError) as caught:
        NexusPipeline.from_engines(path)
    assert "small: 64x64x5; large: 32x32x5, 48x32x5" in str(caught.value)


def test_list_verify_and_prune(make, tmp_path, monkeypatch, capsys):
    built = make("onnx").folder.path
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path))
    cache = folders.engines_root()
    good = shutil.copytree(built, cache / built.name)
    bad, part, failed = (cache / n for n in ("0" * 16, "1" * 16 + ".part", "2" * 16 + ".failed"))
    shutil.copytree(good, bad)
    (bad / "velocity.onnx").write_bytes(b"short")
    part.mkdir()
    failed.mkdir()
    assert engines_command("list", []) == 0
    assert (
        f"{good.name}  large onnx" in (said := capsys.readouterr().out) and "parity passed" in said
    )
    assert engines_command("verify", []) == 1
    said = capsys.readouterr().out
    assert f"{good}: whole" in said and "has 5 bytes" in said
    assert engines_command("prune", []) == 0
    said = capsys.readouterr().out
    assert (
        all(f"removed {p.name}" in said and not p.exists() for p in (bad, part, failed))
        and good.exists()
    )
    with refuses("unknown_name", "action", InputError) as caught:
        engines_command("prun", [])
    assert "did you mean 'prune'" in str(caught.value)
