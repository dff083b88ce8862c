"""Attention backends: equal where they run, refused where they cannot, chosen by measurement and
for a reason."""

import json
import math
import re
import time

import pytest
import torch

from nexus_rt.core.errors import InputError
from nexus_rt.ops import attention
from tests.needs import needs
from tests.refusals import refuses
from tests.test_attention_kernel import inputs, oracle

CPU = torch.device("cpu")
SDPA = attention.ATTENTION_BACKENDS["sdpa"].run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attention.json"


def case(**change):
    values = dict(
        batch=1,
        queries=20,
        keys=33,
        heads=2,
        head_dim=32,
        dtype=torch.float32,
        device=CPU,
        biased=False,
    )
    return attention.Case(**{**values, **change})


def running(biased):
    return [
        n for n, b in attention.ATTENTION_BACKENDS.items() if b.why_not(case(biased=biased)) is None
    ]


@pytest.mark.parametrize("biased", [False, True])
def test_every_backend_that_runs_computes_the_same(biased):
    q, k, v = inputs(2, 20, 33, 2, 32, torch.float32)
    bias = torch.linspace(-2, 3, 66).reshape(2, 33) if biased else None
    wanted = oracle(q, k, v, bias)
    assert {"sdpa", "math", "flash"} <= set(running(biased))
    for name in (*running(biased), "auto"):
        got = attention.attend(q, k, v, bias, name)
        assert got.shape == q.shape and (got.double() - wanted).abs().max() <= 1e-5, name


def test_an_explicit_backend_is_never_replaced():
    q, k, v = inputs(1, 4, 4, 1, 32, torch.float32)
    for name, words in (
        ("cudnn", "CUDA"),
        ("fa3", "CUDA"),
        ("sage", "CUDA"),
        ("triton-fp8", "float32"),
    ):
        with refuses("unsupported", "attention", InputError) as caught:
            attention.attend(q, k, v, backend=name)
        assert repr(name) in str(caught.value) and words in str(caught.value)
    with refuses("unknown_name", "attention backend", InputError) as caught:
        attention.attend(q, k, v, backend="tritn")
    assert "did you mean 'triton'" in str(caught.value)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("flash", {"biased": True}, "no bias"),
        ("flash", {"dtype": torch.float32}, "float16 and bfloat16"),
        ("cudnn", {"dtype": torch.float32}, "float16 and bfloat16"),
        ("fa3", {}, "flash_attn_interface is not installed"),
        ("sage", {}, "sageattention is not installed"),
    ],
)
def test_reasons_on_a_gpu(name, change, words):
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, **change}
    assert words in attention.ATTENTION_BACKENDS[name].why_not(case(**gpu))
    assert (
        attention.ATTENTION_BACKENDS["cudnn"].why_not(
            case(**{**gpu, "dtype": torch.bfloat16, "biased": True})
        )
        is None
    )


def test_triton_says_which_head_sizes_it_takes():
    needs("triton")
    assert "16, 32, 64, 128, not 24" in attention.ATTENTION_BACKENDS["triton"].why_not(
        case(head_dim=24)
    )


def test_auto_on_a_cpu_does_not_measure(cache):
    q, k, v = inputs(1, 4, 4, 1, 32, torch.float32)
    assert attention.automatic(q, k, v, None) == "sdpa" and not cache.exists()


@pytest.mark.parametrize("biased", [False, True])
def test_the_fastest_right_one_is_chosen_and_the_reasons_kept(cache, monkeypatch, biased):
    def slow(q, k, v, bias):
        time.sleep(0.02)
        return SDPA(q, k, v, bias)

    def wrong(q, k, v, bias):
        return SDPA(q, k, v, bias) + 0.01

    def broken(q, k, v, bias):
        raise RuntimeError("no kernel for this shape\nmore")

    always = lambda case: None
    for name, run in (("slow", slow), ("wrong", wrong), ("broken", broken)):
        monkeypatch.setitem(attention.ATTENTION_BACKENDS, name, attention.Backend(run, always))
    names = ["slow", "wrong", "broken", "sdpa", "cudnn"]
    result = attention.decide(case(biased=biased), names)
    found = result["candidates"]
    assert result["chosen"] == "sdpa" and found["slow"]["ms"] > found["sdpa"]["ms"] > 0
    assert (
        found["wrong"]["why"].startswith("its error 1.0e-02 is above")
        and found["broken"]["why"] == "no kernel for this shape"
    )
    assert "needs a CUDA device" in found["cudnn"]["why"]
    assert json.loads(cache.read_text()) and len(list(cache.parent.iterdir())) == 1


def test_a_decision_is_made_once_and_read_from_disk(cache, monkeypatch):
    runs = []
    counted = attention.Backend(lambda *args: (runs.append(1), SDPA(*args))[1], lambda case: None)
    monkeypatch.setitem(attention.ATTENTION_BACKENDS, "sdpa", counted)

    def runs_of(case):
        before = len(runs)
        decision = attention.decide(case, ["sdpa", "math"])
        return len(runs) - before, decision

    measured, first = runs_of(case())
    assert measured and runs_of(case()) == (0, first)
    # another case is another question
    for other in (case(queries=21), case(biased=True), case(dtype=torch.float16)):
        assert runs_of(other)[0]
    version = f"torch {torch.__version__}"
    assert all(version in json.loads(key) for key in json.loads(cache.read_text()))
    cache.write_text(cache.read_text().replace(version, "torch 0"))
    assert runs_of(case())[0]  # and so are other versions


def test_a_damaged_or_forbidden_cache_costs_a_measurement_only(cache, monkeypatch):
    cache.parent.mkdir()
    cache.write_text("{not json")
    assert attention.decide(case(), ["sdpa"])["chosen"] == "sdpa"
    assert json.loads(cache.read_text())
    monkeypatch.setenv("NEXUS_RT_CACHE", str(cache / "below a file"))
    assert attention.decide(case(), ["math"])["chosen"] == "math"


def test_nothing_that_runs_is_an_error():
    with refuses("unsupported", "attention", InputError):
        attention.decide(case(), ["cudnn"])


def test_approximate_backends_are_not_in_auto():
    assert {n for n, b in attention.ATTENTION_BACKENDS.items() if not b.exact} == {
        "triton-fp8",
        "sage",
    }
    assert not {"triton-fp8", "sage"} & attention.decide(case())["candidates"].keys()


@pytest.mark.parametrize("share, taken", [(0.05, True), (0.3, False), (float("nan"), False)])
@pytest.mark.parametrize("exact", [False, True])
def test_an_approximate_backend_is_held_to_its_stated_error(
    cache, monkeypatch, share, taken, exact
):
    ran = []

    def near(q, k, v, bias):
        ran.append("near")
        out = SDPA(q, k, v, bias)
        return out + share * out.square().mean().sqrt() * torch.randn(
            out.shape, generator=torch.Generator().manual_seed(0)
        )

    monkeypatch.setitem(
        attention.ATTENTION_BACKENDS, "near", attention.Backend(near, lambda case: None, exact)
    )

    def milliseconds(call, *rest):
        ran.clear()
        call()
        return 1.0 if ran else 2.0

    monkeypatch.setattr(attention, "median_ms", milliseconds)
    monkeypatch.setattr(attention, "elapsed_ms", milliseconds)  # compared with the best median
    result = attention.decide(case(), ["sdpa", "near"])
    if taken and not exact:
        assert result["chosen"] == "near" and result["candidates"]["near"][
            "relative"
        ] == pytest.approx(share, rel=0.1)
    else:
        limit = "is above [0-9.e-]+$" if exact else "above 0.08 of the output's RMS"
        assert result["chosen"] == "sdpa" and re.search(limit, result["candidates"]["near"]["why"])


def test_auto_fp8_asks_for_all_and_is_kept_apart_from_auto(monkeypatch):
    asked = []

    def decide(case, names=None):
        asked.append(names)
        return {"chosen": "sdpa" if names is None else "triton-fp8"}

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    monkeypatch.setattr(attention, "decide", decide)
    q = torch.zeros(1, 4, 1, 64).as_subclass(OnGpu)
    for _ in range(2):
        assert attention.automatic(q, q, q, None) == "sdpa"
        assert attention.automatic(q, q, q, None, approximate=True) == "triton-fp8"
    assert asked == [None, list(attention.ATTENTION_BACKENDS)]
    assert (
        attention.automatic(*inputs(1, 4, 4, 1, 64, torch.float32), None, approximate=True)
        == "sdpa"
    )


def test_a_backend_without_a_bias_keeps_the_padding(monkeypatch):
    """flash on a GPU cannot count a key many times: its contexts keep every padded token instead of
    failing."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None: (9, 0))
    gpu = torch.device("cuda")
    assert not attention.takes_bias("flash", gpu) and attention.takes_bias("flash", CPU)
    assert all(
        attention.takes_bias(n, gpu)
        for n in ("auto", "auto-fp8", "sdpa", "cudnn", "math", "triton")
    )
    assert attention.takes_bias("fa3", CPU)  # it cannot run at all: that is said when it is run


def test_a_candidate_that_is_hopeless_runs_once(monkeypatch, tmp_path):
    """Beside the run that checks it; one that is not is the median of `RUNS` more."""
    monkeypatch.setenv("NEXUS_RT_CACHE", str(tmp_path))
    runs = {"math": 0, "flash": 0}
    plain = attention.ATTENTION_BACKENDS["sdpa"].run

    def counted(name, seconds):
        def run(*args):
            runs[name] += args[0].shape[2] > 1  # not the reference, a head at a time
            time.sleep(seconds)
            return plain(*args)

        return attention.Backend(run, lambda case: None)

    monkeypatch.setitem(attention.ATTENTION_BACKENDS, "flash", counted("flash", 0.002))
    monkeypatch.setitem(attention.ATTENTION_BACKENDS, "math", counted("math", 0.1))
    asked = attention.Case(1, 8, 8, 2, 16, torch.float32, torch.device("cpu"), False)
    found = attention.decide(asked, ["flash", "math"])
    assert found["chosen"] == "flash" and found["candidates"]["math"]["ms"] > 90
    assert runs == {"math": 2, "flash": 2 + attention.RUNS}


def damage(where):
    """Attention that is wrong in one place: a fraction of heads, samples or rows, or one value."""

    def run(q, k, v, bias):
        out = SDPA(q, k, v, bias).clone()
        rows, heads = out.shape[1:3]
        if where == "last head":
            out[:, :, -1] = out[:, :, 0]
        elif where == "middle head":
            out[:, :, heads // 2] *= 0.5
        elif where == "last sample":
            out[-1] = out[0]
        elif where == "last rows":
            out[:, -3:] = 0
        elif where == "a block of rows":
            out[:, rows // 2 : rows // 2 + 128] = 0
        elif where == "one NaN":
            out[-1, rows // 3 + 1, heads // 2, 3] = math.nan
        elif where == "infinity":
            out[0, 5, 0, 0] = math.inf
        elif where == "another shape":
            out = out[:, :1]
        elif where == "another dtype":
            out = out.double()
        return out

    return run


@pytest.mark.parametrize(
    "where",
    "last head|middle head|last sample|last rows|a block of rows|one NaN|infinity|another shape"
    "|another dtype".split("|"),
)
@pytest.mark.parametrize("biased", [False, True])
def test_a_backend_that_is_wrong_anywhere_is_not_chosen(cache, monkeypatch, where, biased):
    always = lambda case: None
    monkeypatch.setitem(
        attention.ATTENTION_BACKENDS, "bad", attention.Backend(damage(where), always)
    )
    asked = attention.Case(2, 1400, 200, 4, 32, torch.float32, torch.device("cpu"), biased)
    trial = attention.Trial.of(asked)
    assert "why" in trial.measure("bad") and "ms" in trial.measure("sdpa")
    loose = attention.Backend(damage(where), always, exact=False)
    monkeypatch.setitem(attention.ATTENTION_BACKENDS, "bad", loose)
    assert "why" in trial.measure("bad")


@pytest.mark.parametrize(
    "cudnn, cuda, queries, taken",
    [
        (91500, "13.0", 32760, False),
        (91501, "13.0", 32760, True),
        (91501, "12.8", 32760, False),
        (91002, "12.8", 24960, True),
        (91501, None, 77, True),
        (90100, "12.9", 1, False),
    ],
)
def test_cudnn_takes_odd_lengths_from_its_9_15_1(monkeypatch, cudnn, cuda, queries, taken):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    gpu = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "queries": queries}
    why = attention.ATTENTION_BACKENDS["cudnn"].why_not(case(**gpu))
    assert why is None if taken else f"takes {queries} queries, no multiple of 128" in why


def test_math_is_not_tried_where_its_scores_are_large():
    asked = attention.Case(1, 32760, 32760, 40, 128, torch.bfloat16, torch.device("cpu"), False)
    trial = attention.Trial(asked, (None,) * 4, None, None, 0.0)  # refused before it is run
    assert "171.7 GB" in trial.measure("math")["why"]
    assert "171.7 GB" not in trial.measure("cudnn")["why"]
    small = attention.Case(1, 64, 64, 40, 128, torch.bfloat16, torch.device("cpu"), False)
    assert "ms" in attention.Trial.of(small).measure("math")


def test_our_kernel_is_refused_in_float32_on_a_gpu(monkeypatch):
    monkeypatch.setattr(attention, "cannot_run_triton", lambda device: None)
    asked = lambda dim, kind, where: attention.Case(
        1, 8, 8, 2, dim, kind, torch.device(where), False
    )
    why = attention.ATTENTION_BACKENDS["triton"].why_not
    assert "minutes" in why(asked(128, torch.float32, "cuda"))
    assert (
        why(asked(128, torch.bfloat16, "cuda")) is None
        and why(asked(128, torch.float32, "cpu")) is None
    )
    assert why(asked(64, torch.float32, "cuda")) is None
