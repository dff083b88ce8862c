"""The parity gate: an exported engine against the torch engine in float32, before anybody may load it.

Velocities at three timesteps and at most two sizes, and the final latents of a short guided run. Two numbers each: the
cosine, and the norm of the difference over the norm of the reference. The thresholds are what rounding weights and
activations to a precision costs, with room: float32 engines differ in the order of sums alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus_rt.denoise import Prompt, denoise
from nexus_rt.engines.base import Engine
from nexus_rt.engines.exported import Bucket
from nexus_rt.plan import parse_plan
from nexus_rt.solver import time_grid

TIMESTEPS = (967.0, 500.0, 50.0)
STEPS = 4
# precision -> (cosine at least, relative error at most) of a velocity; a run's error may be twice that
THRESHOLDS = {"fp32": (0.999999, 1e-3), "fp16": (0.9995, 0.02), "bf16": (0.998, 0.06)}


def distance(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """Cosine and relative error, computed in float64; NaN where `got` is not finite."""
    a, b = got.double().flatten(), wanted.double().flatten()
    return {"cosine": float(a @ b / (a.norm() * b.norm())), "relative_error": float((a - b).norm() / b.norm())}


def prompt_like(text_dim: int, device: torch.device, tokens: int = 32) -> Prompt:
    """Embeddings with words and zero padding, and a shorter negative prompt."""
    g = torch.Generator().manual_seed(7)
    conditional, unconditional = torch.zeros(1, tokens, text_dim), torch.zeros(1, tokens, text_dim)
    conditional[:, :12] = torch.randn(1, 12, text_dim, generator=g) * 0.3
    unconditional[:, :3] = torch.randn(1, 3, text_dim, generator=g) * 0.3
    return Prompt(conditional.to(device), unconditional.to(device))


@torch.no_grad()
def gate(engine: Engine, reference: Engine, architecture: dict[str, Any], buckets: list[Bucket], precision: str,
         device: torch.device) -> dict[str, Any]:  # fmt: skip
    """Compare an engine with its reference.

    Returns:
        The manifest's "parity": passed, why not, thresholds, and every comparison made.
    """
    prompt = prompt_like(architecture["text_dim"], device)
    both = torch.cat([prompt.conditional, prompt.unconditional])
    cosine, error = THRESHOLDS[precision]
    rows: dict[str, dict] = {}
    thresholds = {"cosine": cosine, "relative_error": error}
    chosen = [buckets[0], *buckets[1:][-1:]]
    try:
        mine = engine.prepare(both)
        engine.velocity(torch.zeros(1, architecture["in_channels"], *buckets[0].latent, device=device), torch.tensor(1.0), mine)
    except RuntimeError as problem:
        said = (str(problem).strip() or "no message").splitlines()[0][:300]
        return {"passed": False, "why": f"it does not run: {said}", "thresholds": thresholds, "rows": {}}
    theirs = reference.prepare(both)
    for bucket in chosen:
        latents = torch.randn(1, architecture["in_channels"], *bucket.latent, generator=torch.Generator().manual_seed(1))
        latents = latents.to(device)
        for timestep in TIMESTEPS:
            t = torch.tensor(timestep, device=device)
            rows[f"velocity {bucket} t={timestep:g}"] = distance(
                engine.velocity(latents, t, mine), reference.velocity(latents, t, theirs)
            )
    plan = parse_plan("large", time_grid(STEPS))
    run = lambda e: denoise(latents, plan, {"large": e}, {"large": prompt}, guidance_scale=3.0)  # noqa: E731
    try:
        rows[f"latents {chosen[-1]} after {STEPS} steps"] = distance(run(engine), run(reference))
    except ArithmeticError:
        rows[f"latents {chosen[-1]} after {STEPS} steps"] = {"cosine": float("nan"), "relative_error": float("nan")}
        why = "its velocity is not finite"
    else:
        why = ""
    for name, row in rows.items():
        room = 2 if name.startswith("latents") else 1
        row["right"] = row["cosine"] >= 1 - room * (1 - cosine) and row["relative_error"] <= room * error
        if not row["right"] and not why:
            why = f"{name}: cosine {row['cosine']:.6f}, relative error {row['relative_error']:.2e}"
    passed = all(r["right"] for r in rows.values())
    return {"passed": passed, "why": "" if passed else why, "thresholds": thresholds, "rows": rows}
