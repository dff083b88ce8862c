"""LoRAs changed between calls: the very weights of a fresh load, whatever keeps them."""

import shutil

import pytest
import torch

from nexus_rt import InputError, ModelError, NexusPipeline
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.loading.lora import parse_loras
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.memory.pinned import ARENA, Arena, pinned_bytes, power_of_two
from tests import published
from tests.refusals import refuses
from tests.test_single_files import run

CALL = dict(width=48, height=32, num_frames=5, num_inference_steps=2, output_type="latent")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, plain and as GGUF, and LoRAs of products, of a bias and a modulation table."""
    folder = tmp_path_factory.mktemp("swap")
    state = published.wan_state()
    published.save(state, folder / "wan.safetensors")
    published.save_gguf(state, folder / "wan.gguf", ("Q8_0",))
    key = "diffusion_model.blocks.{}.{}"
    for i, name in enumerate(("a", "b")):
        lora = {}
        for module, rows, columns in (
            ("self_attn.v", 256, 256),
            ("cross_attn.o", 256, 256),
            ("ffn.0", 512, 256),
        )[: 2 + i]:
            own = key.format(i, module)
            lora[f"{own}.lora_down.weight"] = torch.randn(4, columns, generator=seeded(i))
            lora[f"{own}.lora_up.weight"] = torch.randn(rows, 4, generator=seeded(9 + i)) / 4
        lora[key.format(0, "ffn.2.diff_b")] = torch.randn(256, generator=seeded(3)) / 10
        lora[key.format(1, "diff_m")] = torch.randn(1, 6, 256, generator=seeded(4)) / 10
        published.save(lora, folder / f"{name}.safetensors")
    return folder


def equal(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["dense", "int8", "fp8", "small"])
def test_every_change_is_a_fresh_load_to_the_bit(files, weights, dtype):
    file = files / ("wan.gguf" if weights == "small" else "wan.safetensors")
    a, b = (str(files / f"{n}.safetensors") for n in "ab")
    fresh = lambda loras: load_transformer(file, dtype, loras=parse_loras(loras), weights=weights)
    engine = TorchEngine(load_transformer(file, dtype, weights=weights))
    plain = fresh(())
    for loras in ((a,), (a, b), (f"{b}@0.5",), (f"{b}@0.25", a), (), (b,), (f"{b}@-1",), ()):
        engine.set_loras(parse_loras(loras))
        assert equal(engine.model, fresh(loras)), loras
        assert engine.loaded.loras == parse_loras(loras)
    assert equal(engine.model, plain)
    # one that was merged as it was loaded comes out as well
    merged = TorchEngine(fresh((a,)))
    merged.set_loras(())
    assert equal(merged.model, plain)


def test_one_that_does_not_fit_changes_nothing(files, tmp_path):
    engine = TorchEngine(
        load_transformer(files / "wan.safetensors", loras=parse_loras(files / "a.safetensors"))
    )
    before = {k: v.clone() for k, v in engine.model.state_dict().items()}
    odd = {"diffusion_model.blocks.7.ffn.0.lora_down.weight": torch.ones(1, 256)}
    odd["diffusion_model.blocks.7.ffn.0.lora_up.weight"] = torch.ones(512, 1)
    published.save(odd, tmp_path / "odd.safetensors")
    with refuses("mismatch", kind=ModelError) as error:
        engine.set_loras(parse_loras(tmp_path / "odd.safetensors"))
    assert "blocks.7" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in engine.model.state_dict().items())
    whole = published.save(
        {"diffusion_model.blocks.0.ffn.0.diff": torch.ones(512, 256)}, tmp_path / "w.safetensors"
    )
    small = TorchEngine(load_transformer(files / "wan.gguf", torch.float32, weights="small"))
    small.set_loras(parse_loras(files / "a.safetensors"))
    want = run(small.model)
    with refuses("unsupported", "weights", ModelError):
        small.set_loras(parse_loras(whole))
    assert torch.equal(run(small.model), want)


def test_a_streamed_model_is_changed_where_it_waits(files):
    a = parse_loras(files / "a.safetensors")
    engine = TorchEngine(load_transformer(files / "wan.safetensors", torch.float32))
    engine.load(streamed=True)
    run(engine.model)
    engine.set_loras(a)
    engine.load(streamed=True)
    want = run(load_transformer(files / "wan.safetensors", torch.float32, loras=a))
    assert torch.equal(run(engine.model), want)


def test_a_checkpoint_that_is_gone_is_said(files, tmp_path):
    shutil.copy(files / "wan.safetensors", tmp_path / "wan.safetensors")
    engine = TorchEngine(load_transformer(tmp_path / "wan.safetensors"))
    (tmp_path / "wan.safetensors").unlink()
    with refuses("not_found", kind=ModelError) as error:
        engine.set_loras(parse_loras(files / "a.safetensors"))
    assert "wan.safetensors" in str(error.value)


def test_a_pipeline_changes_its_loras(tiny_pair, tmp_path):
    key = "transformer.blocks.0.attn1.to_v"
    width = {"small": 32, "large": 48}
    loras = {}
    for name, dim in width.items():
        state = {f"{key}.lora_A.weight": torch.randn(2, dim, generator=seeded())}
        state[f"{key}.lora_B.weight"] = torch.randn(dim, 2, generator=seeded(1))
        loras[name] = published.save(state, tmp_path / f"{name}.safetensors")
    options = dict(plan="handoff=0.5,bridge=0", **CALL)
    clip = lambda pipe: pipe("a red circle", generator=seeded(), **options).frames
    pipe = NexusPipeline.from_pretrained(tiny_pair)
    pipe.set_progress_bar_config(disable=True)
    plain, identity = clip(pipe), dict(pipe.identity)
    pipe.set_loras(small=f"{loras['small']}@2", large=loras["large"])
    fresh = NexusPipeline.from_pretrained(
        tiny_pair, small_lora=f"{loras['small']}@2", large_lora=loras["large"]
    )
    fresh.set_progress_bar_config(disable=True)
    assert torch.equal(clip(pipe), clip(fresh)) and not torch.equal(clip(pipe), plain)
    assert pipe.identity == fresh.identity != identity
    assert pipe.loras["small"][0].scale == 2
    pipe.set_loras(large=())
    assert pipe.loras == {"small": parse_loras(f"{loras['small']}@2"), "large": ()}
    pipe.set_loras(small=())
    assert torch.equal(clip(pipe), plain) and pipe.identity == identity
    # a wrong one of the two leaves both as they were
    with pytest.raises(ModelError):
        pipe.set_loras(small=loras["small"], large=loras["small"])
    assert torch.equal(clip(pipe), plain)
    with refuses("unsupported", "expert", InputError):
        pipe.set_loras(small=f"{loras['small']}@1:high")
    only = NexusPipeline.from_pretrained(small=tiny_pair / "small")
    with refuses("missing", "large", InputError):
        only.set_loras(large=loras["large"])


@pytest.mark.export
def test_exported_engines_say_why_not(tiny_pair, tiny_engines, tmp_path):
    key = "transformer.blocks.0.attn1.to_v"
    state = {f"{key}.lora_A.weight": torch.ones(2, 32), f"{key}.lora_B.weight": torch.ones(32, 2)}
    lora = published.save(state, tmp_path / "a.safetensors")
    pipe = NexusPipeline.from_engines(tiny_engines)
    with refuses("unsupported", "small_lora", InputError):
        pipe.set_loras(small=lora)


def test_pinned_memory_is_packed_into_arenas():
    """A 14B model's tensors, as PyTorch's own allocator would round them and as arenas do."""
    from nexus_rt.models.wan import WanTransformer
    from nexus_rt.models.wan_config import WanConfig

    with torch.device("meta"):
        model = WanTransformer(WanConfig())
    sizes = [p.numel() * 2 for p in model.parameters()]
    rounded, packed = sum(map(power_of_two, sizes)), pinned_bytes(sizes)
    assert rounded > 1.4 * sum(sizes) and packed < 1.06 * sum(sizes)
    taken = []
    arena = Arena(lambda n: (taken.append(n), torch.empty(n, dtype=torch.uint8))[1])
    shapes = [(3, 5), (1,), (64, 64), (0, 4)]
    tensors = [torch.randn(s) for s in shapes]
    copies = [arena.like(t).copy_(t) for t in tensors]
    assert taken == [ARENA] and all(map(torch.equal, copies, tensors))
    assert pinned_bytes(t.numel() * 4 for t in tensors) == ARENA
    assert pinned_bytes([ARENA + 1]) == 2 * ARENA and pinned_bytes([]) == 0
