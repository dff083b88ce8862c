"""Weights that stay in fewer bits: the numbers of what they stand for, what they take, and which
layers are quantised."""

import pytest
import torch
import torch.nn.functional as F

from nexus_rt import InputError, ModelError, NexusPipeline
from nexus_rt.cli import main
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.kernels.quantise_rows import quantise_rows_ref
from nexus_rt.loading.packing import formats_of, pack_model
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.models.encodings import GGUF_BLOCKS, Scaled
from nexus_rt.models.layers import Linear
from nexus_rt.models.quantized import QuantizedLinear, Rows, joined, quantise, takes_rows
from nexus_rt.models.quantized_products import Rows8, multiplies
from nexus_rt.models.wan import WanTransformer
from nexus_rt.models.wan_config import WanConfig
from tests import published
from tests.refusals import refuses
from tests.test_single_files import run


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bytes_of(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_gguf_blocks_are_what_the_gguf_package_makes_of_them(kind):
    import gguf
    import numpy as np

    raw = published.gguf_blocks(kind, 6, 512, np.random.default_rng(2))
    want = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, kind))
    got = GGUF_BLOCKS[kind].decode(torch.from_numpy(raw), (6, 512))
    assert np.array_equal(got.numpy(), want)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantising_is_within_half_a_step(kind):
    weight = torch.randn(24, 96, generator=seeded()) * torch.logspace(-3, 1, 24)[:, None]
    rows = quantise(weight, kind)
    back = rows.encoding.decode(rows.raw, (24, 96))
    step = rows.encoding.scale if kind == "int8" else weight.abs() / 8 + rows.encoding.scale
    assert ((back - weight).abs() <= step / 2 * 1.001).all()
    zeros = quantise(torch.zeros(2, 8), kind)
    assert torch.equal(zeros.encoding.decode(zeros.raw, (2, 8)), torch.zeros(2, 8))


def layers():
    """Layers of every way of keeping rows, and the float32 matrix each stands for."""
    import numpy as np

    rng, out = np.random.default_rng(1), {}
    for name, kinds in (("Q8_0", ("Q8_0",)), ("mixed", ("Q4_K", "Q4_K", "Q6_K"))):
        rows, dense = [], []
        for kind in kinds:
            raw = torch.from_numpy(published.gguf_blocks(kind, 8, 256, rng))
            rows.append(Rows(raw, GGUF_BLOCKS[kind], 8))
            dense.append(GGUF_BLOCKS[kind].decode(raw, (8, 256)))
        out[name] = rows, torch.cat(dense)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        for form in ("tensor", "row", "block"):
            rows, dense = [], []
            for i in range(2):
                raw = torch.randint(-100, 100, (128, 256), generator=seeded(i)).to(dtype)
                shape = {"tensor": (), "row": (128, 1), "block": (2, 2)}[form]
                block = (64, 128) if form == "block" else None
                encoding = Scaled("x", torch.rand(shape, generator=seeded(i)) + 0.01, block)
                rows.append(Rows(raw, encoding, 128))
                dense.append(encoding.decode(raw, (128, 256)))
            out[f"{dtype} {form}"] = rows, torch.cat(dense)
    return out


@pytest.mark.parametrize("name, made", layers().items(), ids=layers())
def test_a_layer_computes_what_its_rows_stand_for(name, made):
    rows, dense = made
    bias = torch.randn(len(dense), generator=seeded(5))
    layer = QuantizedLinear(rows, 256, bias)
    assert torch.equal(layer.weight, dense)
    x = torch.randn(2, 3, 256, generator=seeded(6))
    want = F.linear(x.double(), dense.double(), bias.double())
    scale = float(want.abs().max())
    assert (layer(x) - want).abs().max() <= 1e-5 * scale
    low = QuantizedLinear(rows, 256, bias.bfloat16())
    assert (low(x.bfloat16()) - want).abs().max() <= 0.02 * scale
    assert len(joined(rows)) == (2 if name == "mixed" else 1)
    assert layer.out_features == len(dense)


def test_wide_layers_are_widened_in_pieces(monkeypatch):
    from nexus_rt.models import quantized

    for rows, dense in layers().values():
        monkeypatch.setattr(quantized, "PIECE", 256 * 5)
        assert torch.equal(QuantizedLinear(rows, 256, torch.zeros(len(dense))).weight, dense)


def test_activations_in_8_bits_on_a_cpu():
    """int8 is multiplied as int8, and fp8 as fp8, sums in float32."""
    weight, bias = torch.randn(32, 64, generator=seeded()), torch.randn(32, generator=seeded(1))
    x = torch.randn(5, 7, 64, generator=seeded(2))
    rows = quantise(weight, "int8")
    layer = QuantizedLinear([rows], 64, bias, activations=True)
    own = x.abs().amax(-1, keepdim=True) / 127
    small = (x / own).round()
    want = (small.double() @ rows.raw.double().T) * own * rows.encoding.scale.T + bias
    torch.testing.assert_close(layer(x).double(), want, atol=1e-4, rtol=1e-5)
    assert (layer(x) - F.linear(x, weight, bias)).abs().max() < 0.5
    rows = quantise(weight, "fp8")
    layer = QuantizedLinear([rows], 64, bias, activations=True)
    own = x.abs().amax(-1, keepdim=True) / 448
    small = (x / own).to(torch.float8_e4m3fn)
    want = (small.double() @ rows.raw.double().T) * own * rows.encoding.scale.T + bias
    torch.testing.assert_close(layer(x).double(), want, atol=1e-4, rtol=1e-5)
    low = QuantizedLinear([rows], 64, bias.bfloat16(), activations=True)(x.bfloat16())
    assert low.dtype == torch.bfloat16 and (low - want).norm() < 0.03 * want.norm()
    one = quantise(weight, "int8")
    scalar = Rows(one.raw, Scaled("int8", torch.tensor(0.01)), 32)
    assert QuantizedLinear([scalar], 64, bias, activations=True)(x).isfinite().all()


@pytest.mark.parametrize("kind", ["Q8_0", "mixed", "fp8", "rows", "plain"])
def test_small_weights_compute_what_dense_ones_do(tmp_path, kind):
    state = published.wan_state()
    if kind in ("Q8_0", "mixed"):
        file = tmp_path / "wan.gguf"
        published.save_gguf(state, file, ("Q8_0",) if kind == "Q8_0" else ("Q4_K", "Q5_K", "Q6_K"))
    else:
        if kind == "plain":
            state = {
                k: v.to(torch.float8_e4m3fn) if published.is_quantised(k) else v
                for k, v in state.items()
            }
        else:
            style = "comfy" if kind == "fp8" else "rows"
            state = published.fp8_scaled(state, style)[0]
        file = published.save(state, tmp_path / "wan.safetensors")
    dense = load_transformer(file, torch.float32)
    small = load_transformer(file, torch.float32, weights="small")
    torch.testing.assert_close(run(small), run(dense), atol=1e-5, rtol=1e-4)
    assert bytes_of(small.blocks) < 0.32 * bytes_of(dense.blocks)
    formats = formats_of(small)
    quantised = {k: n for k, n in formats.items() if "float32" not in k}
    assert sum(quantised.values()) == 2 * 7  # every matrix of both blocks
    assert formats["float32 outside the blocks"] == 6


@pytest.mark.parametrize("kind", ["int8", "fp8", "int8-dynamic", "fp8-dynamic"])
def test_our_own_quantisation(tmp_path, kind):
    file = published.save(published.wan_state(), tmp_path / "wan.safetensors")
    dense = load_transformer(file, torch.float32)
    small = load_transformer(file, torch.float32, weights=kind)
    want, got = run(dense), run(small)
    error = (got - want).norm() / want.norm()
    assert 0 < error < (0.06 if kind.startswith("fp8") else 0.02)
    assert bytes_of(small.blocks) < 0.32 * bytes_of(dense.blocks)
    assert set(formats_of(small)) == {
        f"{kind.removesuffix('-dynamic')} by row",
        "float32 outside the blocks",
    }


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_fp8_leaves_the_first_and_the_last_block_as_they_are(layers):
    """Where there are three or more; what is applied is counted."""
    config = WanConfig(
        num_attention_heads=2,
        attention_head_dim=32,
        ffn_dim=64,
        num_layers=layers,
        text_dim=32,
        freq_dim=32,
    )

    def counts(kind):
        model = WanTransformer(config).eval().requires_grad_(False)
        pack_model(model, kind)
        kept = [i for i, b in enumerate(model.blocks) if isinstance(b.attn1.to_qkv, Linear)]
        return kept, formats_of(model)

    kept, formats = counts("fp8-dynamic")
    assert kept == ([0, layers - 1] if layers > 2 else [])
    assert formats["fp8 by row"] == 7 * (layers - len(kept))
    assert formats.get("float32", 0) == 7 * len(kept) and formats["float32 outside the blocks"] == 6
    for kind in ("fp8-dynamic-all", "fp8", "int8-dynamic"):
        assert counts(kind)[0] == []


def test_which_layers_take_rows():
    weight, bias = torch.randn(32, 64, generator=seeded()), torch.zeros(32)
    layer = lambda kind, activations=True: QuantizedLinear(
        [quantise(weight, kind)], 64, bias, activations
    )
    assert takes_rows(layer("fp8")) and multiplies(layer("fp8").raw[0])
    assert not takes_rows(layer("fp8", False)) and not takes_rows(layer("int8"))
    assert not takes_rows(Linear(64, 32))
    beside = layer("fp8")
    x = torch.randn(3, 64, generator=seeded(1))
    plain = beside(x)
    values, scales = quantise_rows_ref(x)
    assert torch.equal(beside(Rows8(values, scales, x.shape)), plain)
    from nexus_rt.models.quantized import Adapter

    beside.adapters.append(Adapter(0, 8, torch.ones(2, 64), torch.ones(8, 2), 1.0))
    assert not takes_rows(beside)  # its low-rank product reads the activations as they were
    assert not torch.equal(beside(x)[:, :8], plain[:, :8])


@pytest.mark.parametrize("side", [(32, 64), (24, 64), (32, 72)])
def test_a_gpu_multiplies_what_its_units_take(monkeypatch, side):
    """Both sides multiples of 16, and compute capability 8.9."""
    from nexus_rt.models.quantized_products import product_of

    class Gpu:
        dtype, is_cuda, shape, device = torch.float8_e4m3fn, True, side, torch.device("cuda")

    for capability, new in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert (product_of(Gpu()) is not None) == (new and side == (32, 64))


def test_a_lora_is_merged_before_quantising_and_added_beside_what_is_kept(tmp_path):
    state = published.wan_state()
    key = "diffusion_model.blocks.1.self_attn.v"
    lora = {
        f"{key}.lora_down.weight": torch.randn(4, 256, generator=seeded()),
        f"{key}.lora_up.weight": torch.randn(256, 4, generator=seeded(1)),
    }
    from nexus_rt.loading.lora import parse_loras

    loras = parse_loras(published.save(lora, tmp_path / "a.safetensors"))
    file = published.save(state, tmp_path / "wan.safetensors")
    exact = run(load_transformer(file, torch.float32, loras=loras))
    got = run(load_transformer(file, torch.float32, loras=loras, weights="int8"))
    assert (got - exact).norm() / exact.norm() < 0.02
    assert (got - run(load_transformer(file, torch.float32))).norm() / exact.norm() > 0.05
    published.save_gguf(state, tmp_path / "wan.gguf", ("Q8_0",))
    want = run(load_transformer(tmp_path / "wan.gguf", torch.float32, loras=loras))
    beside = load_transformer(tmp_path / "wan.gguf", torch.float32, loras=loras, weights="small")
    torch.testing.assert_close(run(beside), want, atol=2e-5, rtol=1e-4)
    whole = {f"{key}.diff": torch.ones(256, 256)}
    loras = parse_loras(published.save(whole, tmp_path / "b.safetensors"))
    with refuses("unsupported", "weights", ModelError) as error:
        load_transformer(tmp_path / "wan.gguf", torch.float32, loras=loras, weights="small")
    assert "to_v" in str(error.value)


def test_what_cannot_be_kept_small_is_refused(tmp_path, tiny_pair):
    file = published.save(published.wan_state(), tmp_path / "wan.safetensors")
    with refuses("unsupported", "weights", ModelError):
        load_transformer(file, weights="small")
    with refuses("unknown_name", "weights", InputError) as error:
        load_transformer(file, weights="int4")
    assert "int4" in str(error.value)
    with refuses("unknown_name", "weights", InputError) as error:
        NexusPipeline.from_pretrained(tiny_pair, weights="int9")
    assert "int9" in str(error.value)


def test_quantised_blocks_are_streamed(tmp_path):
    """Blocks of mixed types are of different sizes."""
    published.save_gguf(
        published.wan_state(num_layers=3), tmp_path / "wan.gguf", ("Q4_K", "Q8_0", "Q6_K")
    )
    model = load_transformer(tmp_path / "wan.gguf", torch.float32, weights="small")
    want, engine = run(model), TorchEngine(model)
    sizes = {sum(p.numel() * p.element_size() for p in b.parameters()) for b in model.blocks}
    assert len(sizes) > 1
    engine.load(streamed=True)
    assert torch.equal(run(model), want)
    engine.unload()
    assert torch.equal(run(model), want) and engine.not_finite() == []


@pytest.mark.parametrize("options", [["--quantize", "int8"], ["--quantize", "fp8-dynamic"]])
def test_the_command_line_quantises(tiny_pair, tmp_path, options, capsys):
    command = ["generate", "a red circle", "--pair", str(tiny_pair), "--steps", "2", "--quiet"]
    assert main([*command, *options, "-o", str(tmp_path / "a.png")]) == 0
    both = [*command, "--quantize", "int8", "--weights", "small", "-o", str(tmp_path / "b.png")]
    assert main(both) != 0
    assert main(["plan", "--pair", str(tiny_pair), "--plan", "large", *options]) == 0
    out = capsys.readouterr().out
    assert "weights of large: " in out and "by row; not quantised: condition_embedder." in out
    pipe = NexusPipeline.from_pretrained(tiny_pair, weights="int8")
    assert pipe.formats()["large"]["int8 by row"] == 14
    plain = NexusPipeline.from_pretrained(tiny_pair)
    assert "weights=int8" in pipe.identity["large"] and pipe.identity != plain.identity
