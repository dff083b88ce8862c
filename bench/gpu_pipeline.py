"""Whole clips at true size in the GPU suite: plans end to end, their prices, the swap, and
diffusers beside them."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

from nexus_rt.bench.measure import failure_in

STEPS, PEER_STEPS = 4, 2
# the paper's schedule, a handoff early, in the middle and late, the gate snapped, and the large one
# alone
PLANS = [
    "reference",
    "small:1 bridge:1 large:*",
    "small:2 bridge:1 large:*",
    "small:3 large:*",
    "auto=0.02",
    "large",
]
PEERS = ("diffusers", "switch", "naive")
PEER_WITHOUT_DIFFUSERS = ("naive-ours",)


def pipeline(suite: Any) -> dict:
    """480p and 81 frames, random weights, few steps: a step costs what it costs in fifty.

    Returns:
        A row for every plan, every peer, and "vae" (one decoding) where diffusers is installed;
        "costs" of a step.
    """
    from nexus_rt.bench.latency import Clip, Engine, quiet
    from nexus_rt.bench.latency import suite as measure
    from nexus_rt.bench.peers import Setting, measure_peers
    from nexus_rt.bench.presets import random_pipeline, random_prompt

    size, names = suite.size, list(suite.configs)
    configs = {"small": suite.configs[names[0]], "large": suite.configs[names[-1]]}
    decoder = dict(base_dim=4, num_res_blocks=1) if suite.dry else None
    pipe = quiet(random_pipeline(configs, suite.dtype, suite.device, size, decoder=decoder))
    vae, pipe.vae = pipe.vae, None
    embeds = random_prompt(pipe, suite.dtype)
    clip = Clip(size, STEPS, embeds=embeds)
    # the reference clip warms up
    measured = measure([Engine("torch", pipe)], PLANS, clip, runs=1, warmup=0, pictures=False)
    rows: dict[str, Any] = {"costs": measured["costs"]}
    kept = (
        "total_duration_ms",
        "denoise_ms",
        "predicted_ms",
        "prediction_error",
        "swap_ratio",
        "peak_device_bytes",
        "energy_joules",
    )
    for row in measured["rows"]:
        rows[row["plan"]] = {k: row[k] for k in kept} | {
            "latent_error": row["quality"]["latent_error"],
            "steps_ms": [s["duration_ms"] for s in row["denoise_steps_ms"]],
        }
    setting = Setting(size, PEER_STEPS, 0, None, embeds)
    peers = PEERS if find_spec("diffusers") else PEER_WITHOUT_DIFFUSERS
    for name in peers:
        if time.monotonic() > suite.deadline:
            rows[f"peer {name}"] = {"not_reached": "the time was over"}
            continue
        rows |= {f"peer {row['peer']}": row for row in measure_peers(pipe, (name,), setting, 1, 0)}
    if vae is not None:
        with failure_in(rows, "vae"):
            pipe.vae = vae
            latents = clip.noise(pipe)
            rows["vae"] = {"ms": suite.ms(lambda: pipe.decode(latents, "pt"), 1, 1)}
    return rows
