"""What a plan costs on a GPU that is not here: from its operations, its bytes and the card's
published rates. Predictions, not measurements; nothing is run.

    python -m nexus_rt.bench.roofline                     # a table: cards x plans, Wan 1.3B and 14B
    nexus-rt plan --gpu h100 --plan handoff=0.3           # one plan, step by step

A forward is linear layers (operations), self- and cross-attention (operations), and what is bound
by memory (bytes of the norms, RoPE and residuals); the VAE is convolutions in TF32. Each is divided
by the rate that the card is published with, times the share of it that such work sustains
(`Shares`). `bench/gpu/suite.py` puts these beside what it measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from nexus_rt.bench.architectures import SIZES, WAN
from nexus_rt.bench.work import Work, decode_flops, forward_work, weight_bytes
from nexus_rt.core.errors import choose
from nexus_rt.core.limits import Scale
from nexus_rt.core.size import ClipSize
from nexus_rt.method.plan import Plan, StepCosts
from nexus_rt.models.wan_config import WanConfig
from nexus_rt.parallel.layout import Layout, parse_layout
from nexus_rt.parallel.volume import step_volume

TERA = 1e12
PAIR = {name: WanConfig(**config) for name, config in WAN.items()}
_decode_flops = lru_cache(maxsize=8)(decode_flops)


@dataclass(frozen=True)
class Card:
    """Published rates, dense: TFLOP/s with float32 sums, bytes a second and bytes of memory.

    link: bytes a second to another card of the machine, one direction.
    """

    name: str
    bf16: float
    fp8: float
    tf32: float
    bandwidth: float
    memory: float
    link: float
    source: str


CARDS = {
    "h100": Card("NVIDIA H100 SXM", 989.4, 1978.9, 494.7, 3.35e12, 80e9, 450e9, "H100 datasheet"),
    "h200": Card("NVIDIA H200 SXM", 989.4, 1978.9, 494.7, 4.8e12, 141e9, 450e9, "H200 datasheet"),
    "b200": Card("NVIDIA B200 SXM", 2250, 4500, 1125, 7.7e12, 180e9, 900e9, "HGX B200 datasheet"),
    "rtx4090": Card(
        "NVIDIA GeForce RTX 4090", 165.2, 330.3, 82.6, 1.008e12, 24e9, 32e9, "Ada whitepaper"
    ),
    "rtx5090": Card(
        "NVIDIA GeForce RTX 5090", 209.5, 419, 104.8, 1.792e12, 32e9, 64e9, "Blackwell whitepaper"
    ),
    "l40s": Card("NVIDIA L40S", 362.05, 733, 183, 0.864e12, 48e9, 32e9, "L40S datasheet"),
}


@dataclass(frozen=True)
class Shares:
    """The share of a published rate that each kind of work sustains.

    linear: 8192^3 in bf16 reaches 0.81 of an H100's rate, which its power limits; Wan's layers 0.90
        of that. fp8: as linear, and a tenth for scaling rows. attention: 0.75 of a large product,
        FlashAttention 3's and cuDNN's (arXiv 2407.08608). memory: of a copy. vae: causal 3-D
        convolutions of 96 to 384 channels, chunk by chunk. Consumer cards, whose rate with float32
        sums is half of what their units can, sustain more of it than this.
    """

    linear: float = 0.73
    fp8: float = 0.66
    attention: float = 0.607
    fp8_attention: float = 0.45
    memory: float = 0.72
    vae: float = 0.25


SHARES = Shares()


@dataclass(frozen=True)
class Parts:
    """Milliseconds of a forward by kind."""

    linear: float
    attention: float
    memory: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.memory

    def row(self) -> dict[str, float]:
        """Rounded, with the sum."""
        return {k: round(v, 2) for k, v in {**asdict(self), "total": self.total}.items()}


def parts(work: Work, card: Card, shares: Shares = SHARES) -> Parts:
    """Milliseconds of some work on a card."""
    ms = lambda operations, rate, share: 1000 * operations / (rate * TERA * share)
    return Parts(
        ms(work.linear, card.bf16, shares.linear) + ms(work.linear_fp8, card.fp8, shares.fp8),
        ms(work.attention, card.bf16, shares.attention)
        + ms(work.attention_fp8, card.fp8, shares.fp8_attention),
        1000 * work.bytes / (card.bandwidth * shares.memory),
    )


def forward_parts(
    config: WanConfig,
    size: ClipSize,
    card: Card,
    samples: float,
    fp8: str | None = None,
    fp8_attention: bool = False,
) -> Parts:
    """Milliseconds of one forward of some samples on a card; arguments as of `forward_work`."""
    return parts(forward_work(config, size, fp8, fp8_attention) * samples, card)


def step_costs(
    configs: Mapping[str, WanConfig],
    size: ClipSize,
    card: Card,
    fp8: str | None = None,
    fp8_attention: bool = False,
    layout: Layout = Layout(),  # noqa: B008 (frozen)
) -> StepCosts:
    """Predicted prices of a step's parts, milliseconds, what several cards send included; a
    generator that is not there costs 0."""
    prices = {}
    for name, config in configs.items():
        for key, guided in ((name, False), (f"{name}_guided", True)):
            own, sent = shared_parts(config, size, card, layout, guided, fp8, fp8_attention)
            prices[key] = own.total + sent
    channels = next(iter(configs.values())).in_channels
    elements = channels * size.cells
    by = 1000 / (card.bandwidth * SHARES.memory)
    # both generators' predictions in bf16, guided; the latents, velocity and history in float32
    return StepCosts(**prices, blend=(4 * 2 + 4) * elements * by, solver=8 * 4 * elements * by)


def vae_ms(size: ClipSize, card: Card, shares: Shares = SHARES) -> float:
    """Milliseconds of decoding a clip."""
    return 1000 * _decode_flops(size) / (card.tf32 * TERA * shares.vae)


def card_of(name: str) -> Card:
    """The card of a name, such as "h100".

    Raises:
        InputError: there is none of that name.
    """
    return CARDS[choose("gpu", name.lower().replace(" ", "").replace("-", ""), CARDS)]


def card_named(device: str) -> Card | None:
    """The card that a driver's name means, such as "NVIDIA H100 80GB HBM3"; None of another."""
    name = device.upper().replace(" ", "")
    keys = [key for key in CARDS if key.upper() in name]
    return CARDS[keys[0]] if keys and "PCIE" not in name else None


def assumptions(card: Card, shares: Shares = SHARES) -> list[str]:
    """What a prediction rests on, a line each."""
    percent = lambda share: f"{100 * share:.0f}%"
    return [
        f"predicted for {card.name} from operations, bytes and published rates ({card.source}):"
        " not measured",
        f"  linear {percent(shares.linear)} of {card.bf16:g} TFLOP/s in bf16,"
        f" {percent(shares.fp8)} of {card.fp8:g} in fp8",
        f"  attention {percent(shares.attention)} in bf16, {percent(shares.fp8_attention)} in fp8",
        f"  memory-bound {percent(shares.memory)} of {card.bandwidth / 1e12:g} TB/s;"
        f" VAE {percent(shares.vae)} of {card.tf32:g} TFLOP/s in TF32",
    ]


def predicted_row(
    config: Mapping[str, Any],
    size: ClipSize,
    device: str,
    samples: int,
    fp8: bool = False,
    fp8_attention: bool = False,
) -> dict[str, float] | None:
    """The prediction that stands beside a measured forward; None for a card that is not known."""
    card = card_named(device)
    if card is None:
        return None
    kind = "fp8-dynamic" if fp8 else None
    return forward_parts(WanConfig(**config), size, card, samples, kind, fp8_attention).row()


def memory_line(configs: Mapping[str, WanConfig], size: ClipSize, card: Card) -> str:
    """Bytes of the generators in bf16 and of their working memory, beside the card's."""
    from nexus_rt.core.amounts import amount
    from nexus_rt.pipeline.memory_use import activation_bytes

    weights = {name: weight_bytes(config) for name, config in configs.items()}
    working = max(activation_bytes(asdict(config), size) for config in configs.values())
    needed = sum(weights.values()) + working
    each = " + ".join(f"{name} {amount(n)}" for name, n in weights.items())
    return (
        f"memory: {each} + working {amount(working)} = {amount(needed)} of"
        f" {card.memory / 1e9:g} GB"
        + ("" if needed <= card.memory else ": with --vram, generators come and go")
    )


def shared_parts(
    config: WanConfig,
    size: ClipSize,
    card: Card,
    layout: Layout,
    guided: bool = True,
    fp8: str | None = None,
    fp8_attention: bool = False,
) -> tuple[Parts, float]:
    """A step of one generator on several cards: a card's own milliseconds, and those of what it
    sends, none of it hidden behind the other."""
    samples = 2 if guided else 1
    own = (1 if layout.cfg == 2 and guided else samples) / layout.ulysses
    sent = step_volume(layout, config, size, guided).total
    computed = forward_parts(config, size, card, own, fp8, fp8_attention)
    return computed, 1000 * sent / card.link


def shared_price(plan: Plan, costs: StepCosts, layout: Layout, small: Scale, large: Scale) -> float:
    """Milliseconds of a plan's denoising; with pair=2, both generators of a bridge at once."""
    price = plan.price(costs, small, large)
    if layout.pair == 1:
        return price
    for step in plan.steps:
        if step.small and step.large:
            each = [plan.generator_price(step, g, costs, small, large) for g in ("small", "large")]
            price -= min(each)
    return price


LAYOUTS = ("cfg=1", "cfg=2", "cfg=2,ulysses=2", "cfg=2,ulysses=4", "pair=2,cfg=2,ulysses=2")


def scaling_table(key: str = "h200") -> str:
    """Markdown: one clip on one to eight cards, predicted from bytes: a guided step of the 14B, and
    the published schedule, where pair=2 has both generators run at once."""
    from nexus_rt.core.limits import GUIDANCE_SCALE
    from nexus_rt.method.plan_text import parse_plan
    from nexus_rt.method.time_grid import time_grid

    card, size = CARDS[key], SIZES["480p"]
    plan = parse_plan("reference", time_grid(50))
    lines = [
        "| cards | layout | 14B guided step, s: computing + sending | sent a card and step |"
        " of one card's speed | `reference`, s |",
        "|---|---|---|---|---|---|",
    ]
    one = forward_parts(PAIR["large"], size, card, 2).total
    for text in LAYOUTS:
        layout = parse_layout(text)
        own, sent = shared_parts(PAIR["large"], size, card, layout)
        volume = step_volume(layout, PAIR["large"], size, True).total
        costs = step_costs(PAIR, size, card, layout=layout)
        whole = shared_price(plan, costs, layout, GUIDANCE_SCALE, GUIDANCE_SCALE)
        lines.append(
            f"| {layout.size} | {text if layout.size > 1 else 'one'} |"
            f" **{(own.total + sent) / 1000:.2f}**: {own.total / 1000:.2f} + {sent / 1000:.3f} |"
            f" {volume / 1e9:.2f} GB | {one / (own.total + sent):.2f}x | {whole / 1000:.0f} |"
        )
    return "\n".join(lines)


PLANS = ("reference", "handoff=0.3", "large", "small:4/10 large:4")


def predict(card: Card, size: ClipSize, fp8: bool = False) -> dict[str, Any]:
    """Wan's 1.3B and 14B on a card: a guided step of the large one by kind, and the plans' seconds,
    denoising and decoding."""
    from nexus_rt.core.limits import GUIDANCE_SCALE
    from nexus_rt.method.plan_options import has_clocks
    from nexus_rt.method.plan_text import parse_plan
    from nexus_rt.method.time_grid import time_grid

    kind = "fp8-dynamic" if fp8 else None
    costs = step_costs(PAIR, size, card, kind, fp8)
    decode = vae_ms(size, card)
    seconds = {}
    for name in PLANS:
        plan = parse_plan(name, time_grid(50)) if not has_clocks(name) else _clocked(name)
        ms = plan.price(costs, GUIDANCE_SCALE, GUIDANCE_SCALE)
        seconds[name] = round(ms / 1000, 1)
    return {
        "large_guided": forward_parts(PAIR["large"], size, card, 2, kind, fp8).row(),
        "vae_s": round(decode / 1000, 1),
        "denoise_s": seconds,
    }


def _clocked(name: str) -> Plan:
    from nexus_rt.pipeline.request import make_plan
    from nexus_rt.pipeline.settings import CallSettings, Defaults

    return make_plan(CallSettings(plan=name), Defaults())


def table() -> str:
    """Markdown: every card, at both sizes, in bf16 and with fp8 linear layers and attention."""
    lines = [
        "| card | clip | 14B guided step, s: linear + attention + memory | with fp8, s |"
        + "".join(f" `{p}`, s; with fp8 |" for p in PLANS)
        + " VAE, s |",
        "|---|---|---|---|" + "---|" * (len(PLANS) + 1),
    ]
    for card in CARDS.values():
        for label, size in SIZES.items():
            own, small = predict(card, size), predict(card, size, fp8=True)
            p, fp8 = own["large_guided"], small["large_guided"]["total"] / 1000
            split = " + ".join(f"{p[k] / 1000:.2f}" for k in ("linear", "attention", "memory"))
            plans = "".join(
                f" {own['denoise_s'][n]:.0f}; {small['denoise_s'][n]:.0f} |" for n in PLANS
            )
            lines.append(
                f"| {card.name.removeprefix('NVIDIA ')} | {label} x 81 |"
                f" **{p['total'] / 1000:.2f}**: {split} | {fp8:.2f} |{plans}"
                f" {own['vae_s']:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(table())
    print()
    print(scaling_table())


if __name__ == "__main__":
    main()
