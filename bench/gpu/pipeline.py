"""Whole clips at true size in the GPU suite: plans end to end beside their prices, and what users
would run instead."""

from __future__ import annotations

from functools import cache, cached_property, partial
from typing import Any

from nexus_rt.bench.gpu.units import NOT_REACHED, Unit
from nexus_rt.bench.gpu.wheels import absent, present

STEPS, PEER_STEPS = 4, 2
# the paper's schedule, a handoff, and the large one alone; then the gate snapped, and handoffs
# early and late
PLANS = [
    "reference",
    "small:2 bridge:1 large:*",
    "large",
    "auto=0.02",
    "small:1 bridge:1 large:*",
    "small:3 large:*",
]
PEERS = ("diffusers", "switch", "naive")
PEER_WITHOUT_DIFFUSERS = ("naive-ours",)
KEPT = (
    "total_duration_ms",
    "denoise_ms",
    "denoise_steps_ms",
    "swap_ratio",
    "peak_device_bytes",
    "energy_joules",
)


class Clip:
    """480p and 81 frames, random weights, few steps: a step costs what it costs in fifty."""

    def __init__(self, s: Any) -> None:
        from nexus_rt.bench import latency
        from nexus_rt.bench.presets import random_pipeline, random_prompt

        self.s = s
        configs = dict(zip(("small", "large"), map(s.configs.get, s.names), strict=True))
        made = random_pipeline(
            configs, s.dtype, s.device, s.size, s.kernels, s.attention, decoder=s.decoder
        )
        self.pipe = latency.quiet(made)
        self.vae, self.pipe.vae = self.pipe.vae, None
        self.embeds = random_prompt(self.pipe, s.dtype)
        self.clip = latency.Clip(s.size, STEPS, embeds=self.embeds)

    @cached_property
    def costs(self) -> Any:
        """What a step costs: of this process, or of the one that measured it."""
        from nexus_rt.method.plan import StepCosts

        known = self.s.results.get("pipeline", {}).get("costs", {})
        return StepCosts(**known) if "failed" not in known and known else self.measure_costs()

    def measure_costs(self) -> Any:
        from nexus_rt.bench.latency import cost_calls
        from nexus_rt.pipeline.costs import measure_step_costs

        return measure_step_costs(cost_calls(self.pipe, self.clip), 2, 1, self.s.device)


def units(s: Any) -> dict[str, Unit]:
    """A row for what a step costs, every plan and every peer."""
    made = cache(partial(Clip, s))
    rows = {"costs": Unit(partial(_costs, made), 90.0)}
    rows |= {plan: Unit(partial(_plan, made, plan), 90.0) for plan in PLANS}
    peers = PEERS if present("diffusers") else PEER_WITHOUT_DIFFUSERS
    rows |= {f"peer {name}": Unit(partial(_peer, made, name), 120.0) for name in peers}
    return rows


def _costs(made: Any) -> dict:
    return vars(made().measure_costs())


def _plan(made: Any, plan: str) -> dict:
    """One run: the costs have warmed the process up."""
    from nexus_rt.bench.latency import generate, prediction, row_of, scales_of
    from nexus_rt.bench.measure import measured

    own = made()
    costs = own.costs
    run = measured(lambda: generate(own.pipe, plan, own.clip, None), own.s.device)
    walked = own.pipe.make_plan(plan, own.clip.steps_of(plan))
    row = row_of(plan, walked, "torch", own.clip, [run])
    priced = prediction(walked, costs, scales_of(own.pipe), row["denoise_ms"])
    return {k: row[k] for k in KEPT} | priced


def _peer(made: Any, name: str) -> dict:
    from nexus_rt.bench.latency import Clip
    from nexus_rt.bench.peers import measure_peers

    if name not in PEER_WITHOUT_DIFFUSERS and (why := absent("diffusers")):
        return {NOT_REACHED: why}
    own = made()
    clip = Clip(own.s.size, PEER_STEPS, embeds=own.embeds)
    (row,) = measure_peers(own.pipe, (name,), clip, 1, 0)
    return row
