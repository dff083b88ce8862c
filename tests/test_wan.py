"""The DiT against diffusers' `WanTransformer3DModel`, the same weights in both."""

import math

import pytest
import torch

from nexus_rt.core.errors import InputError, ModelError
from nexus_rt.loading import layouts
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.models import wan
from nexus_rt.models.wan_config import WanConfig
from tests.needs import needs
from tests.refusals import refuses

GRIDS = [(1, 6, 10), (5, 8, 14), (3, 2, 2), (2, 4, 6)]  # T, H, W in latent cells
CONFIGS = [
    dict(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        ffn_dim=80,
        text_dim=40,
        freq_dim=32,
    ),
    dict(
        num_attention_heads=3,
        attention_head_dim=16,
        num_layers=3,
        ffn_dim=64,
        text_dim=24,
        freq_dim=64,
    ),
    dict(
        num_attention_heads=1,
        attention_head_dim=128,
        num_layers=1,
        ffn_dim=96,
        text_dim=32,
        freq_dim=256,
    ),
]


def reference(config: dict, seed: int = 0):
    import diffusers

    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(**config).eval()
    # every parameter away from its neutral start (norm weights are ones, biases small)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def padded_context(batch: int, dim: int, length: int = 32) -> torch.Tensor:
    context = torch.zeros(batch, length, dim)
    for i in range(batch):
        context[i, : 3 + 4 * i] = torch.randn(3 + 4 * i, dim)
    return context


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("grid", GRIDS)
def test_parity_with_diffusers(config, grid, tmp_path):
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path, dtype=torch.float32)
    latents, timestep = torch.randn(2, 16, *grid), torch.tensor([987, 987])
    context = padded_context(2, config["text_dim"])
    with torch.no_grad():
        expected = theirs(latents, timestep, context, return_dict=False)[0]
        for collapse in (True, False):
            got = ours(latents, timestep[0], ours.prepare_context(context, collapse))
            assert (got - expected).abs().max() <= 2e-5
        each = ours(latents, timestep, ours.prepare_context(context, collapse))
        assert (each - got).abs().max() <= 1e-5


def test_samples_may_have_their_own_timesteps(tmp_path):
    theirs = reference(CONFIGS[0])
    theirs.save_pretrained(tmp_path)
    ours = load_transformer(tmp_path, dtype=torch.float32)
    latents, context, timestep = (
        torch.randn(2, 16, 3, 4, 4),
        padded_context(2, 40),
        torch.tensor([3, 850]),
    )
    with torch.no_grad():
        expected = theirs(latents, timestep, context, return_dict=False)[0]
        assert (
            ours(latents, timestep, ours.prepare_context(context)) - expected
        ).abs().max() <= 2e-5


def test_low_precision_loses_no_more_than_diffusers(tmp_path):
    import diffusers

    theirs = reference(CONFIGS[2])
    theirs.save_pretrained(tmp_path)
    exact = load_transformer(tmp_path, dtype=torch.float32)
    low = load_transformer(tmp_path, dtype=torch.bfloat16)
    theirs_low = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16
    )
    latents, context, timestep = (
        torch.randn(2, 16, 5, 8, 14),
        padded_context(2, 32),
        torch.tensor([500, 500]),
    )
    with torch.no_grad():
        expected = exact(latents, timestep, exact.prepare_context(context))
        ours_error = (
            low(latents, timestep[0], low.prepare_context(context)).float() - expected
        ).norm()
        theirs_error = (
            theirs_low(latents.bfloat16(), timestep, context.bfloat16())[0].float() - expected
        ).norm()
    assert ours_error <= 1.5 * theirs_error
    assert low.blocks[0].scale_shift_table.dtype == torch.float32  # as diffusers keeps it


def test_collapsed_padding_counts_what_it_stands_for():
    context = padded_context(3, 8, length=20)
    short, bias = wan.collapse_padding(context)
    assert short.shape == (3, 12, 8)
    assert torch.allclose(bias.exp().sum(-1).flatten(), torch.tensor([20.0, 20.0, 20.0]))
    assert wan.collapse_padding(torch.ones(2, 5, 8))[1] is None
    whole, _ = wan.collapse_padding(torch.zeros(1, 6, 8))
    assert whole.shape == (1, 1, 8)


@pytest.mark.parametrize(
    "config",
    [
        dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30),
        dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40),
    ],
    ids=["1.3B", "14B"],
)
def test_published_sizes_have_diffusers_names_and_shapes(config):
    import diffusers

    with torch.device("meta"):
        theirs, ours = (
            diffusers.WanTransformer3DModel(**config),
            wan.WanTransformer(WanConfig(**config)),
        )
    assert layouts.diffusers_shapes(ours) == {
        k: tuple(p.shape) for k, p in theirs.named_parameters()
    }
    split = layouts.to_diffusers(ours.state_dict())
    assert {k: tuple(v.shape) for k, v in split.items()} == layouts.diffusers_shapes(ours)


@pytest.mark.parametrize("index", range(len(CONFIGS)))
def test_triton_kernels_compute_the_same(index):
    """The whole forward by Triton's interpreter, scalar and per-sample timesteps, with and without
    the affine norm."""
    needs("triton")
    torch.manual_seed(4)
    model = wan.WanTransformer(WanConfig.from_dict(CONFIGS[index])).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    latents = torch.randn(2, model.config.in_channels, 2, 2, 4)
    context = torch.randn(2, 5, model.config.text_dim)
    with torch.no_grad():
        for timestep in (torch.tensor(600.0), torch.tensor([600.0, 30.0])):
            prepared = model.use_kernels("torch").prepare_context(context)
            wanted = model(latents, timestep, prepared)
            got = model.use_kernels("triton")(latents, timestep, prepared)
            assert (got - wanted).abs().max() <= 2e-5 * max(1, wanted.abs().max())
    assert model.blocks[0].ops.name == model.blocks[0].attn1.ops.name == "triton"


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    model = wan.WanTransformer(WanConfig.from_dict(CONFIGS[0]))
    assert model.use_kernels("torch").ops.name == model.use_kernels("auto").ops.name == "torch"
    with refuses("unknown_name", "attention backend", InputError) as error:
        model.use_kernels("auto", attention="flsh")
    assert "'flash'" in str(error.value)
    with refuses("unknown_name", "kernels", InputError) as error:
        model.use_kernels("tritn")
    assert "'triton'" in str(error.value)
    needs("triton")
    monkeypatch.setattr("nexus_rt.kernels.triton_op.INTERPRETED", False)
    assert model.use_kernels("auto").ops.name == "torch"
    with refuses("unsupported", "kernels", InputError) as error:
        model.use_kernels("triton")
    assert "CUDA" in str(error.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refuses("unsupported", "kernels", InputError) as error:
        model.use_kernels("triton")
    assert "not installed" in str(error.value)


def test_context_of_another_width_is_refused():
    model = wan.WanTransformer(WanConfig.from_dict(CONFIGS[0]))
    with refuses("mismatch", "context", InputError) as error:
        model.prepare_context(torch.zeros(1, 4, 41))
    assert "40" in str(error.value)


@pytest.mark.parametrize(
    "field, value, code, param",
    [
        ("image_dim", 1280, "unsupported", "image_dim"),
        ("qk_norm", "layer", "unsupported", "qk_norm"),
        ("ffn_dim", None, "missing", "ffn_dim"),
    ],
)
def test_other_architectures_are_refused(field, value, code, param):
    config = {**CONFIGS[0], field: value}
    if value is None:
        del config[field]
    with refuses(code, param, ModelError):
        WanConfig.from_dict(config)


@pytest.mark.parametrize("name", ["auto-fp8", "triton-fp8", "sage"])
def test_approximate_attention_is_for_self_attention_only(name):
    model = wan.WanTransformer(WanConfig.from_dict(CONFIGS[0])).use_kernels("auto", attention=name)
    assert {b.attn1.backend for b in model.blocks} == {name} and {
        b.attn2.backend for b in model.blocks
    } == {"auto"}
    model.use_kernels("auto", attention="math")
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"math"}


def test_the_feed_forwards_gelu_is_the_tanh_form_whoever_computes_it():
    from nexus_rt.ops import block_ops

    x, weight, bias = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16)
    y = (x.double() @ weight.double().T) + bias.double()
    wanted = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    for gelu in (block_ops.linear_gelu, block_ops.linear_gelu_epilogue):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert (gelu(x, weight, bias) - wanted).abs().max() < 1e-5
