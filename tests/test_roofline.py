"""Prices of cards that are not here: the operations against a count, the sums by hand, and what the
command says."""

from dataclasses import asdict

import pytest
import torch

from nexus_rt import InputError
from nexus_rt.bench import roofline
from nexus_rt.bench.architectures import SIZES, WAN_1_3B, WAN_14B
from nexus_rt.bench.gpu.tables import targets
from nexus_rt.bench.roofline import CARDS, SHARES, Shares, card_named, parts
from nexus_rt.bench.work import forward_flops, forward_work
from nexus_rt.cli import main
from nexus_rt.models.wan_config import WanConfig
from tests.refusals import refuses

H100, SIZE = CARDS["h100"], SIZES["480p"]
LARGE = WanConfig(**WAN_14B)


@pytest.mark.parametrize("config", [WAN_1_3B, WAN_14B], ids=["1.3B", "14B"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_operations_are_those_that_are_counted(config, size):
    """Operation by operation on the meta device, 512 tokens of text."""
    work = forward_work(WanConfig(**config), size, text=512)
    assert work.linear + work.attention == pytest.approx(forward_flops(config, size), rel=1e-5)


def test_a_guided_step_of_the_14b_on_an_h100():
    """By hand: 32,760 tokens, 40 blocks of width 5120 and 13824, two samples."""
    length, dim, inner = 32760, 5120, 13824
    linear = 2 * 40 * 2 * length * (6 * dim**2 + 2 * dim * inner)
    attention = 2 * 40 * 4 * length**2 * dim
    moved = 2 * 40 * 18 * length * dim * 2
    p = parts(forward_work(LARGE, SIZE) * 2, H100)
    assert p.linear == pytest.approx(1000 * linear / (0.73 * 989.4e12), rel=1e-3)
    assert p.attention == pytest.approx(1000 * attention / (0.607 * 989.4e12), rel=2e-3)
    assert p.memory == pytest.approx(1000 * moved / (0.72 * 3.35e12))
    assert p.total == pytest.approx(5300, rel=0.005)  # 2.17 + 2.93 + 0.20 s


def test_fp8_layers_and_attention_change_what_multiplies_and_not_how_much():
    dense = forward_work(LARGE, SIZE)
    small = forward_work(LARGE, SIZE, "fp8-dynamic", True)
    everything = forward_work(LARGE, SIZE, "fp8-dynamic-all")
    assert small.linear + small.linear_fp8 == pytest.approx(dense.linear)
    assert small.attention + small.attention_fp8 == pytest.approx(dense.attention)
    ends = dense.linear - everything.linear_fp8  # patch embedding and head
    assert everything.linear == ends and small.linear - ends == pytest.approx(
        everything.linear_fp8 / 20
    )
    assert parts(small, H100).linear < 0.6 * parts(dense, H100).linear
    tiny = WanConfig(num_layers=2)
    assert forward_work(tiny, SIZE, "fp8-dynamic") == forward_work(tiny, SIZE, "fp8-dynamic-all")


def test_a_card_that_is_twice_as_fast_takes_half_as_long():
    from dataclasses import replace

    twice = replace(H100, bf16=2 * H100.bf16, fp8=2 * H100.fp8, bandwidth=2 * H100.bandwidth)
    work = forward_work(LARGE, SIZE, "fp8-dynamic", True)
    assert parts(work, twice).total == pytest.approx(parts(work, H100).total / 2)
    half = Shares(**{k: v / 2 for k, v in asdict(SHARES).items()})
    assert parts(work, H100, half).total == pytest.approx(2 * parts(work, H100).total)


@pytest.mark.parametrize(
    ("said", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_a_driver_s_name_is_a_card_or_none(said, card):
    assert card_named(said) is (CARDS[card] if card else None)


def test_rates_are_of_dense_products():
    """fp8 is twice bf16, and TF32 half of it; none has the doubled rate of sparse operands."""
    for card in CARDS.values():
        assert card.fp8 / card.bf16 == pytest.approx(2, rel=0.03)
        assert card.bf16 / card.tf32 == pytest.approx(2, rel=0.03)


def test_plan_prices_a_card_without_models_and_says_what_it_rests_on(capsys):
    assert main(["plan", "--gpu", "h100", "--plan", "large", "--steps", "10"]) == 0
    said = capsys.readouterr().out
    assert "step costs (predicted)" in said and "not measured" in said
    assert "large, a guided step: linear 2168" in said and "attention 2931.5" in said
    assert "73% of 989.4 TFLOP/s" in said and "0.72" not in said and "VAE: " in said
    assert "memory: small 2.84 GB + large 28.58 GB" in said and "of 80 GB" in said
    total = next(line for line in said.splitlines() if line.startswith("large: 0 small and 20"))
    assert 52_900 < float(total.split()[-2]) < 53_100
    assert main(["plan", "--gpu", "RTX 4090", "--plan", "large"]) == 0
    assert "generators come and go" in capsys.readouterr().out


def test_plan_prices_a_card_s_fp8(capsys):
    line = ["plan", "--gpu", "h200", "--plan", "large", "--quantize", "fp8-dynamic"]
    assert main([*line, "--attention", "auto-fp8"]) == 0
    assert "large, a guided step: linear 1247.9 ms, attention 19" in capsys.readouterr().out


def test_plan_prices_a_pair_s_own_architecture(tiny_pair, capsys):
    assert main(["plan", "--gpu", "b200", "--pair", str(tiny_pair), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "small, a guided step: linear 0.0 ms" in said and "memory: small 0.1 MB" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "a100"], "unknown gpu 'a100'"),
        (["--gpu", "h100", "--costs", "1,2"], "pass one of them"),
        (["--gpu", "h100", "--quantize", "int8"], "does not price --quantize int8"),
    ],
)
def test_what_cannot_be_priced_is_said(options, words, capsys):
    assert main(["plan", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_name_is_checked():
    with refuses("unknown_name", "gpu", InputError) as caught:
        roofline.card_of("h10")
    assert "did you mean" in str(caught.value)
    assert roofline.card_of("RTX-4090") is CARDS["rtx4090"]


def test_predictions_stand_beside_measurements():
    row = roofline.predicted_row(WAN_14B, SIZE, "NVIDIA H100 80GB HBM3", 2)
    assert row["total"] == pytest.approx(5300, rel=0.005) and row["attention"] == pytest.approx(
        2931.5
    )
    assert roofline.predicted_row(WAN_14B, SIZE, "NVIDIA A100", 2) is None
    results = {"run": {}, "step large": {"guided": {"ms": 5000.0, "predicted_ms": row}}}
    found = {name: (value, met) for name, _, value, met in targets(results)}
    value, met = found["step large, guided: roofline off its time, percent"]
    assert value == pytest.approx(6, abs=0.1) and met
    late = {"run": {}, "step large": {"guided": {"predicted_ms": row, "failed": "late"}}}
    found = {name: value for name, _, value, _ in targets(late)}
    assert found["step large, guided: roofline off its time, percent"] is None


def test_the_table_of_the_documents_is_what_the_command_prints():
    from pathlib import Path

    text = (Path(__file__).parent.parent / "bench" / "README.md").read_text()
    assert roofline.table() in text and roofline.scaling_table() in text


def test_nothing_is_allocated(monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *a, **k: pytest.fail("allocated"))
    assert roofline.predict(H100, SIZE)["large_guided"]["total"] > 0
