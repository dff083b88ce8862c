"""Attention: against float64, at Wan's head sizes, odd lengths, biased keys, and tensors that lie
inside others."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt.kernels.attention import attention, attention_ref, check_attention
from nexus_rt.kernels.attention_launch import HEAD_DIMS, SHORT, TIMED, resolve_loads
from tests.more import more
from tests.needs import needs

needs("triton")
REST = sorted({*TIMED} - {"auto", "descriptors"})  # of the ways to load
CASES = [  # B, Lq, Lk, heads, head_dim, dtype
    (1, 130, 200, 2, 128, torch.float16),
    (2, 63, 77, 1, 64, torch.float16),
    (1, 128, 128, 1, 32, torch.float16),
    (1, 64, 64, 2, 128, torch.float32),
    (2, 5, 3, 3, 16, torch.float32),
    (1, 1, 1, 1, 32, torch.float32),
]


def inputs(batch, queries, keys, heads, head_dim, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, heads, head_dim, generator=g).to(dtype) for n in (queries, keys, keys)
    )
    return q * 2, k * 2, v


def oracle(q, k, v, bias=None):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    score = q @ k.mT / math.sqrt(q.shape[-1])
    score = score if bias is None else score + bias.double()[:, None, None]
    share = (score - score.amax(-1, keepdim=True)).exp()
    return (share / share.sum(-1, keepdim=True) @ v).transpose(1, 2)


def close(got, q, k, v, bias=None):
    """Within twice what eager PyTorch loses at the same precision."""
    wanted = oracle(q, k, v, bias)
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    eager = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
    )
    allowed = 2 * (eager.transpose(1, 2).double() - wanted).abs().max() + (
        1e-5 if q.dtype == torch.float32 else 5e-4
    )
    assert got.shape == q.shape and got.dtype == q.dtype and torch.isfinite(got).all()
    assert (got.double() - wanted).abs().max() <= allowed


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("loads", TIMED)
def test_it_is_the_formula(case, biased, loads):
    q, k, v = inputs(*case)
    bias = (
        torch.randn(case[0], case[2], generator=torch.Generator().manual_seed(1)) * 3
        if biased
        else None
    )
    if (loads in ("specialised", "ahead") and biased) or (
        loads in ("descriptors", "specialised", "ahead") and q.dtype == torch.float32
    ):
        with pytest.raises(ValueError, match="use 'auto'"):
            attention(q, k, v, bias, loads)
        return
    close(attention(q, k, v, bias, loads), q, k, v, bias)
    close(attention_ref(q, k, v, bias), q, k, v, bias)


def test_keys_of_no_count_are_left_out_even_whole_blocks():
    q, k, v = inputs(2, 20, 100, 1, 32, torch.float32)
    bias = torch.zeros(2, 100)
    bias[0, :64] = float("-inf")  # the first block of keys and more
    bias[1, 1:] = float("-inf")
    got = attention(q, k, v, bias)
    close(got[:1], q[:1], k[:1, 64:], v[:1, 64:])
    assert torch.allclose(got[1], v[1, :1].expand(20, -1, -1), atol=1e-6)


def test_a_key_that_stands_for_many():
    """Wan's zero padding: one key with the logarithm of its count is the same as all of them."""
    q, k, v = inputs(1, 7, 6, 2, 32, torch.float32)
    many = [torch.cat([t[:, :5], t[:, 5:].expand(-1, 500, -1, -1)], 1).contiguous() for t in (k, v)]
    bias = torch.tensor([[0.0] * 5 + [math.log(500)]])
    assert torch.allclose(attention(q, k, v, bias), attention(q, *many), atol=1e-5)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(1, 9, 40, 1, 64, torch.float32)
    close(attention(q * 30, k * 30, v), q * 30, k * 30, v)


def test_it_reads_a_fused_projection_where_it_lies():
    qkv = torch.randn(2, 33, 3 * 64, generator=torch.Generator().manual_seed(2))
    q, k, v = (t.unflatten(-1, (2, 32)) for t in qkv.chunk(3, -1))
    assert not v.is_contiguous()
    close(attention(q, k, v), q, k, v)


def test_what_the_kernel_does_not_take_is_refused():
    q, k, v = inputs(1, 4, 6, 2, 32, torch.float32)
    for args, words in (
        ((q[0], k, v), r"expected \[B, Lq, heads, D\]"),
        ((q, k, v[:, :3]), r"have shapes"),
        (
            (q[..., :24], k[..., :24], v[..., :24]),
            r"head_dim is 24; the kernel takes 16, 32, 64, 128",
        ),
        ((q, k.half(), v), r"k is torch.float16"),
        ((q.double(), k.double(), v.double()), r"q is torch.float64"),
        ((q, k, v.transpose(-1, -2).contiguous().transpose(-1, -2)), r"v has strides"),
        ((q, k[:, :0], v[:, :0]), r"there are no keys"),
        ((q, k, v, torch.zeros(1, 5)), r"expected contiguous float32 \(1, 6\)"),
        ((torch.randn(1, 4, 2, 33)[..., 1:], k, v), r"q has strides"),
    ):
        with pytest.raises(ValueError, match=words):
            attention(*args)


def test_the_op_keeps_torchs_rules(monkeypatch):
    monkeypatch.undo()
    torch.library.opcheck(
        torch.ops.nexus_rt.attention.default,
        (*inputs(1, 4, 6, 2, 16, torch.float32), torch.zeros(1, 6)),
    )


def test_strides_past_32_bits():
    """Three tokens 2^30 elements apart: memory that is named, not touched, so it costs nothing."""
    q, k, v = inputs(1, 5, 3, 1, 16, torch.float16)
    room = torch.HalfTensor(2**31 + 64)  # not torch.empty: that is poisoned here
    far = room.as_strided((1, 3, 1, 16), (2**31, 2**30, 16, 1))
    far.copy_(k)
    assert torch.equal(attention(q, far, v), attention(q, k, v))


@pytest.mark.parametrize("shape", [(1, 2**31, 1, 16), (2, 4, 40000, 16)])
def test_what_is_beyond_the_grid_is_refused(shape):
    t = torch.zeros(16, dtype=torch.float16).as_strided(shape, (0, 0, 0, 1))
    with pytest.raises(
        ValueError, match="beyond the grid: up to 2.31 tokens in all and 65535 samples x heads"
    ):
        check_attention(t, t, t, None)


PADDED = [loads for loads in TIMED if loads not in ("auto", "pointers")]


@pytest.mark.parametrize("loads", PADDED)
@pytest.mark.parametrize("low", [-3.0, -12.0, -40.0, -90.0])
def test_what_lies_past_the_last_key_has_no_share_however_low_the_scores(loads, low):
    """Zeros past the last key score 0: beside scores that are all far below, taking their share out
    of the sum would cancel, and those rows are computed again."""
    q, k, v = inputs(2, 130, 140, 1, 64, torch.float16)
    k = k / 8
    # a direction that all keys share: row 0 has it against it, row 1 for it, the others not at all
    k[..., 0] = 8.0
    q[..., 0] = 0.0
    q[:, 0, :, 0], q[:, 1, :, 0] = low, -low
    close(attention(q, k, v, None, loads), q, k, v)


@pytest.mark.parametrize("loads", PADDED)
def test_rows_are_computed_again_only_where_they_must_be(loads, monkeypatch):
    from nexus_rt.kernels import attention as module

    seen = []
    launch = module.launch

    def watched(kernel, grid, like, *args, **options):
        if options["AGAIN"]:
            flags = args[7].clone()
            args[8].fill_(float("nan"))  # what the second launch does not write stays so
        launch(kernel, grid, like, *args, **options)
        if options["AGAIN"]:
            seen.append((flags, args[8].clone()))

    monkeypatch.setattr(module, "launch", watched)
    q, k, v = inputs(1, 300, 140, 1, 64, torch.float16)
    k[..., 0], q[..., 0] = 8.0, 0.0
    q[:, 200, :, 0] = -60.0
    attention(q, k, v, None, loads)
    ((flags, out),) = seen
    assert flags.nonzero().flatten().tolist() == [200]
    assert torch.isfinite(out[:, 128:256]).all()  # its block
    assert out[:, :128].isnan().all() and out[:, 256:].isnan().all()
    seen.clear()
    attention(q, k[:, :128].contiguous(), v[:, :128].contiguous(), None, loads)
    assert not seen  # whole blocks have nothing past the last key


@pytest.mark.parametrize("loads", PADDED)
def test_a_tile_does_not_reach_into_the_next_sample(loads):
    q, k, v = inputs(2, 60, 70, 2, 64, torch.float16)
    alone = attention(q[:1].contiguous(), k[:1].contiguous(), v[:1].contiguous(), None, loads)
    k[1], v[1] = float("nan"), float("nan")
    both = attention(q, k, v, None, loads)
    assert torch.equal(both[:1], alone) and both[1].isnan().all()


@pytest.mark.parametrize("loads", PADDED)
def test_samples_may_lie_apart(loads):
    """Descriptors are made a sample: only heads must follow each other."""
    room = torch.randn(2, 90, 3, 64, generator=torch.Generator().manual_seed(3)).half()
    q, k, v = (room[:, a : a + 20, :2] for a in (0, 20, 50))
    with pytest.raises(ValueError, match="heads lie end to end"):
        attention(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, None, loads)
    close(attention(q, k, v, None, loads), q, k, v)


def test_few_keys_and_biased_ones_come_by_pointers(monkeypatch):
    class Gpu:
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, keys):
            self.shape = (1, keys, 2, 128)

        def element_size(self):
            return 2

        def stride(self, i):
            return (self.shape[1] * 256, 256, 128, 1)[i]

    asked = {}
    for major in (8, 9, 10, 12):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, m=major: (m, 0))
        q = Gpu(32760)
        asked[major] = [
            resolve_loads("auto", q, k, k, biased, fp8)
            for k, biased, fp8 in (
                (Gpu(32760), False, False),
                (Gpu(SHORT), False, False),
                (Gpu(32760), True, False),
                (Gpu(32760), False, True),
            )
        ]
    assert asked[8] == ["pointers"] * 4
    assert asked[9] == ["specialised", "pointers", "pointers", "specialised"]
    assert asked[10] == ["specialised", "pointers", "pointers", "descriptors"]
    assert asked[12] == ["descriptors", "pointers", "pointers", "descriptors"]


@st.composite
def extreme(draw, head_dims=HEAD_DIMS, dtypes=(torch.float16, torch.float32)):
    """Queries and keys that are +-m or 0 in every component, m a power of two of any size: scores
    are exact, and far apart, far below 0, far above it, or all alike."""
    dtype, head_dim = draw(st.sampled_from(dtypes)), draw(st.sampled_from(head_dims))
    high = 15 if dtype == torch.float16 else 55  # 2^15 is float16's last; scores stay finite
    power = lambda: 2.0 ** draw(st.integers(-14 if dtype == torch.float16 else -60, high))
    keys = draw(st.sampled_from([1, 32, 63, 64, 100, 128, 140, 195, 256]))
    queries, sides = (
        draw(st.sampled_from([1, 5, 130])),
        draw(st.sampled_from([(-1.0,), (1.0,), (-1.0, 1.0), (-1.0, 0.0), (-1.0, 0.0, 1.0)])),
    )
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    side = torch.tensor(sides)[torch.randint(len(sides), (1, keys, 2, 1), generator=g)]
    q = torch.full((1, queries, 2, head_dim), power())
    k = side.expand(-1, -1, -1, head_dim) * power()
    v = torch.randn(1, keys, 2, head_dim, generator=g)
    return q.to(dtype), k.to(dtype).contiguous(), v.to(dtype)


@pytest.mark.parametrize("loads", ["auto", "descriptors", *more(*REST)])
@given(case=extreme())
@settings(max_examples=15, deadline=None)
def test_finite_inputs_of_any_size_give_the_formula(loads, case):
    q, k, v = case
    if q.dtype == torch.float32 and loads not in ("auto", "pointers"):
        loads = "auto"
    got, wanted = attention(q, k, v, None, loads), oracle(q, k, v)
    assert torch.isfinite(got).all()
    assert (got.double() - wanted).abs().max() <= (4e-3 if q.dtype == torch.float16 else 1e-4)
    if loads in ("auto", "pointers", "descriptors"):
        biased = attention(q, k, v, torch.zeros(1, k.shape[1]), loads)
        assert (biased.double() - wanted).abs().max() <= 4e-3


@pytest.mark.parametrize("loads", ["descriptors", "specialised", "ahead"])
def test_rows_of_far_scores_are_computed_again_in_two_roundings(loads, monkeypatch):
    """Beside padding: a GPU's fused product and difference would be off by whole powers of two."""
    from nexus_rt.kernels import attention as module

    flags = []
    launch = module.launch

    def watched(kernel, grid, like, *args, **options):
        if options["AGAIN"]:
            flags.append(args[7].clone())
        launch(kernel, grid, like, *args, **options)

    monkeypatch.setattr(module, "launch", watched)
    q, k, v = inputs(1, 130, 140, 1, 64, torch.float16)
    q[:, 7], k[:, :] = 4096.0, 4096.0  # row 7 scores 2^27 in powers of two of e; the others less
    q[:, 8:], q[:, :7] = 0.5, 0.5
    got = attention(q, k, v, None, loads)
    assert flags[0].nonzero().flatten().tolist() == [7]
    close(got, q, k, v)
