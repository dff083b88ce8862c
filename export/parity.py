"""The parity gate: an exported engine against PyTorch in float32, before anybody may load it.

Both are asked the same questions, one after the other so that only one is in memory: a generator
for velocities at three timesteps and at most two sizes and the final latents of a short guided run,
a decoder for frames, a text encoder for embeddings. Two numbers each: the cosine, and the norm of
the difference over the norm of the reference. The thresholds are what rounding weights and
activations to a precision costs, with room: float32 engines differ in the order of sums alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.size import ClipSize
from nexus_rt.memory.offload import release
from nexus_rt.method.engine import Engine
from nexus_rt.method.generator import Prompt
from nexus_rt.method.guidance import Guidance
from nexus_rt.method.loop import sample
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.time_grid import time_grid

TIMESTEPS = (967.0, 500.0, 50.0)
STEPS = 4
# precision -> (cosine at least, relative error at most) of one call; a run's error may be twice
# that
THRESHOLDS = {"fp32": (0.999999, 1e-3), "fp16": (0.9995, 0.02), "bf16": (0.998, 0.06)}
THRESHOLDS["int8"] = (0.998, 0.06)  # weights and activations of eight bits: bfloat16's

Answers = dict[str, Tensor]


def distance(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """Cosine and relative error, computed in float64; NaN where `got` is not finite."""
    a, b = got.double().flatten(), wanted.double().flatten()
    return {
        "cosine": float(a @ b / (a.norm() * b.norm())),
        "relative_error": float((a - b).norm() / b.norm()),
    }


def prompt_like(text_dim: int, device: torch.device, tokens: int = 32) -> Prompt:
    """Embeddings with words and zero padding, and a shorter negative prompt."""
    g = torch.Generator().manual_seed(7)
    conditional, unconditional = torch.zeros(1, tokens, text_dim), torch.zeros(1, tokens, text_dim)
    conditional[:, :12] = torch.randn(1, 12, text_dim, generator=g) * 0.3
    unconditional[:, :3] = torch.randn(1, 3, text_dim, generator=g) * 0.3
    return Prompt(conditional.to(device), unconditional.to(device))


def noise(
    channels: int, bucket: ClipSize, device: torch.device, frames: int | None = None
) -> Tensor:
    """Latents [1, C, T, H, W] of a size (or of fewer latent frames)."""
    t, h, w = bucket.latent
    g = torch.Generator().manual_seed(1)
    return torch.randn(1, channels, min(t, frames or t), h, w, generator=g).to(device)


def two_of(buckets: list[ClipSize]) -> list[ClipSize]:
    """The first size and the last."""
    return [buckets[0], *buckets[1:][-1:]]


def _after_steps(run: Callable[[], Tensor], channels: int, bucket: ClipSize) -> Answers:
    """Latents after a short run; NaN where a velocity is not finite."""
    try:
        latents = run().cpu()
    except ArithmeticError:
        latents = torch.full((1, channels, *bucket.latent), float("nan"))
    return {f"latents {bucket} after {STEPS} steps": latents}


def generator_answers(
    engine: Engine, architecture: dict[str, Any], buckets: list[ClipSize], device: torch.device
) -> Answers:
    """Velocities, and the latents of a guided run."""
    prompt = prompt_like(architecture["text_dim"], device)
    context = engine.prepare(prompt.batch(guided=True))
    channels, answers = architecture["in_channels"], {}
    for bucket in two_of(buckets):
        latents = noise(channels, bucket, device)
        for timestep in TIMESTEPS:
            velocity = engine.velocity(latents, torch.tensor(timestep, device=device), context)
            answers[f"velocity {bucket} t={timestep:g}"] = velocity.float().cpu()
    plan = parse_plan("large", time_grid(STEPS))
    guidance = Guidance.of(3.0)
    run = lambda: sample(latents, plan, {"large": engine}, {"large": prompt}, guidance)
    return answers | _after_steps(run, channels, bucket)


def decoder_answers(decoder: Any, buckets: list[ClipSize]) -> Answers:
    """Frames of short clips: the first latent frame, the second, and one after it."""
    decoder.load()
    z = decoder.space["z_dim"]
    return {
        f"frames {b}": (
            decoder.decode_video(noise(z, b, decoder.device, 3).to(decoder.dtype)).float().cpu()
        )
        for b in two_of(buckets)
    }


def text_answers(encoder: Any, vocabulary: int) -> Answers:
    """Hidden states of token ids, batches with and without padding."""
    encoder.load()
    answers = {}
    for count, words in ((1, 7), (3, 40)):
        g = torch.Generator().manual_seed(words)
        ids = torch.randint(0, vocabulary, (count, words), generator=g).to(encoder.device)
        mask = torch.ones_like(ids)
        mask[1:, words // 2 :] = 0
        answers[f"embeddings {count}x{words}"] = (
            (encoder._states(ids, mask) * mask[..., None]).float().cpu()
        )
    return answers


def judge(got: Answers, wanted: Answers, precision: str) -> dict[str, Any]:
    """The manifest's "parity": passed, why not, thresholds, and every comparison made."""
    cosine, error = THRESHOLDS[precision]
    rows: dict[str, dict[str, Any]] = {}
    why = ""
    for name, reference in wanted.items():
        row = rows[name] = distance(got[name], reference)
        room = 2 if " steps" in name else 1
        row["right"] = (
            row["cosine"] >= 1 - room * (1 - cosine) and row["relative_error"] <= room * error
        )
        if not row["right"] and not why:
            why = f"{name}: cosine {row['cosine']:.6f}, relative error {row['relative_error']:.2e}"
            if not torch.isfinite(got[name]).all():
                why = f"{name}: it is not finite"
    return _verdict(why, precision, rows)


def _verdict(why: str, precision: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The manifest's "parity"; why: an engine is not the model, "" where it is."""
    thresholds = dict(zip(("cosine", "relative_error"), THRESHOLDS[precision], strict=True))
    return {"passed": not why, "why": why, "thresholds": thresholds, "rows": rows}


def gate(
    part: Any, engine: Any, buckets: list[ClipSize], precision: str, device: torch.device
) -> dict[str, Any]:
    """Compare a component's engine (`nexus_rt.export.components`) with PyTorch; returns as
    `judge`."""
    with torch.no_grad():
        wanted = part.answers(None, buckets, device)
        release(device)
        try:
            got = part.answers(engine, buckets, device)
        except RuntimeError as problem:
            message = (str(problem).strip() or "no message").splitlines()[0][:300]
            return _verdict(f"it does not run: {message}", precision, {})
    return judge(got, wanted, precision)
