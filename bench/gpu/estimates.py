"""Predicted seconds of the GPU suite's headline rows: the roofline's time on an H200 by `FACTOR`,
and what loading takes.

Loads are measured without a GPU, or are bytes over a rate; each constant says which.
"""

from __future__ import annotations

from typing import Any

FACTOR = 1.5  # over the roofline, which has not been held against a GPU
PEER_FACTOR = 2.0  # diffusers' eager norms and RoPE in float32 move several times the bytes
# a variant: attention_fp8, specialised, the longest of 75 ahead of time on one core (bench/aot.py)
COMPILE_S = 2.5
DIFFUSERS_S = 10.0  # diffusers' models imported on one core: 7.7
MP4_S = 9.0  # 81 frames of noise at 832x480 by one core: 8.7; a real clip takes less
# bytes of random weights a second: half of what PCIe 5 brings from a host, and less than they take
WEIGHTS_RATE = 25e9
# a roof, or a kernel compiled before: milliseconds, beside a library's first call and its memory
SHORT_S = 1.0
RUN = ("sdpa", "flash", "cudnn", "triton", "triton-fp8")  # backends of attention on a bare machine
TRIAL_RUNS = 7  # of a backend that `nexus_rt.ops.attention` tries
TIMED_RUNS = 6  # of one that the suite times
REFUSED_S = 0.2  # a backend that says no
CARD = "h200"


def compile_s(variants: int) -> float:
    """Of Triton's kernels that a row is the first to launch; their own time is far below."""
    return COMPILE_S * variants


def weights_s(*configs: dict[str, Any]) -> float:
    """Of making transformers of random weights."""
    from nexus_rt.bench.work import weight_bytes
    from nexus_rt.models.wan_config import WanConfig

    return sum(weight_bytes(WanConfig(**c)) for c in configs) / WEIGHTS_RATE


def forward_s(
    s: Any, config: dict[str, Any], samples: int, fp8: bool = False, fp8_attention: bool = False
) -> float:
    """Of a forward of so many samples, as the roofline has it."""
    from nexus_rt.bench.roofline import CARDS, forward_parts
    from nexus_rt.models.wan_config import WanConfig

    kind = "fp8-dynamic" if fp8 else None
    own = forward_parts(WanConfig(**config), s.size, CARDS[CARD], samples, kind, fp8_attention)
    return own.total / 1000


def timed_s(seconds: float, runs: int = 2, warmup: int = 1) -> float:
    """Of a call that is warmed up and timed as `Setting.ms` does: once where it is long."""
    from nexus_rt.bench.gpu.setting import LONG_MS

    return seconds * (warmup + (1 if 1000 * seconds > LONG_MS else runs))


def attention_s(s: Any, config: dict[str, Any], samples: int = 1) -> float:
    """Of one self-attention of a generator."""
    from nexus_rt.bench.roofline import CARDS, parts
    from nexus_rt.bench.work import Work, attention_flops

    dim = config["num_attention_heads"] * config["attention_head_dim"]
    work = Work(attention=samples * attention_flops(s.tokens, s.tokens, dim))
    return parts(work, CARDS[CARD]).total / 1000


def trial_s(s: Any, config: dict[str, Any], samples: int) -> float:
    """Of `auto` choosing a backend for a generator's self-attention."""
    return FACTOR * len(RUN) * TRIAL_RUNS * attention_s(s, config, samples)


def backend_s(s: Any, backend: str) -> float:
    """Of a backend's row on the large generator's self-attention."""
    if backend not in RUN:
        return REFUSED_S
    runs = TRIAL_RUNS + TIMED_RUNS
    return SHORT_S + FACTOR * runs * attention_s(s, s.configs[s.names[1]])


def step_s(
    s: Any,
    config: dict[str, Any],
    variants: int,
    fp8: bool = False,
    fp8_attention: bool = False,
) -> float:
    """Of a row of a guided step of ours, which is the first to launch so many variants."""
    call = forward_s(s, config, 2, fp8, fp8_attention)
    return compile_s(variants) + trial_s(s, config, 2) + FACTOR * timed_s(call)


def peer_step_s(s: Any, config: dict[str, Any]) -> float:
    """Of diffusers' guided step."""
    return DIFFUSERS_S + PEER_FACTOR * timed_s(forward_s(s, config, 2))


def decode_s(s: Any) -> float:
    """Of decoding a clip, in TF32; bfloat16 is taken to be no faster."""
    from nexus_rt.bench.roofline import CARDS, vae_ms

    return vae_ms(s.size, CARDS[CARD]) / 1000


def denoise_s(s: Any, small: int, large: int) -> float:
    """Of so many plain forwards of each generator."""
    own = (s.configs[name] for name in s.names)
    counts = zip((small, large), own, strict=True)
    return FACTOR * sum(count * forward_s(s, config, 1) for count, config in counts)


def clip_s(s: Any, small: int, large: int) -> float:
    """Of a clip of so many plain forwards of each generator, decoded and written."""
    return denoise_s(s, small, large) + FACTOR * decode_s(s) + MP4_S


def swap_s(s: Any, configs: list[dict[str, Any]], steps: int, walks: int) -> float:
    """Of walking a plan of so many plain steps of each generator, its weights leaving for pinned
    host memory and coming back at each walk."""
    each = steps * sum(forward_s(s, config, 1) for config in configs)
    return walks * (FACTOR * each + 2 * weights_s(*configs))


def predicted(s: Any, seconds: float) -> dict[str, float]:
    """The roofline's milliseconds for a row, where this is the card that they are of."""
    import torch

    from nexus_rt.bench.roofline import CARDS, card_named

    if s.device.type != "cuda" or card_named(torch.cuda.get_device_name()) is not CARDS[CARD]:
        return {}
    return {"predicted_ms": float(f"{1000 * seconds:.4g}")}
