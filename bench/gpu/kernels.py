"""Roofs, and the memory-bound kernels beside them, in the GPU suite: milliseconds, GB/s, percent
of the copy; eager PyTorch beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from nexus_rt.bench.gpu import estimates
from nexus_rt.bench.gpu.setting import figure
from nexus_rt.bench.gpu.units import Unit

Four = tuple[Any, Any, Any, Any]  # predictions: conditional and unconditional, of both generators


def roofs(s: Any) -> dict[str, Unit]:
    """The machine, copy bandwidth (read + write) of 1 GiB, and the rates of a large product
    in the setting's dtype, in TF32, which convolutions of float32 use, and in fp8: one scale for
    all and fast sums, exact ones, a scale a row."""
    products = {
        "fp8_matmul_tflops": (False, True),
        "fp8_exact_sums_tflops": (False, False),
        "fp8_by_row_tflops": (True, True),
        "fp8_by_row_exact_sums_tflops": (True, False),
    }
    calls = {
        "machine": partial(_machine, s),
        "copy_gbps": partial(_copy, s),
        "matmul_tflops": partial(_matmul, s),
        "tf32_matmul_tflops": partial(_tf32_matmul, s),
        **{name: partial(_fp8_matmul, s, *how) for name, how in products.items()},
    }
    return {name: Unit(call, 40.0, estimates.SHORT_S) for name, call in calls.items()}


def _machine(s: Any) -> dict:
    import torch

    if s.dry:
        return {"gpu": "none"}
    p = torch.cuda.get_device_properties(0)
    return {
        "gpu": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": torch.cuda.driver_version() if hasattr(torch.cuda, "driver_version") else None,
    }


def _copy(s: Any) -> dict:
    x = s.random(2**14 if s.dry else 2**29, dtype=s.half)
    y = x.clone()
    ms = s.ms(lambda: y.copy_(x), 20)
    return {"rate": figure(2 * x.nbytes / ms / 1e6), "ms": figure(ms)}


def _operands(s: Any) -> tuple[Any, Any]:
    n = 64 if s.dry else 8192
    return s.random(n, n), s.random(n, n)


def _product(s: Any, n: int, call: Callable[[], Any]) -> dict:
    """The rate of a product of n x n matrices, TFLOP/s."""
    ms = s.ms(call, 20)
    return {"rate": figure(2 * n**3 / ms / 1e9), "ms": figure(ms)}


def _matmul(s: Any) -> dict:
    a, b = _operands(s)
    return _product(s, len(a), lambda: a @ b)


def _tf32_matmul(s: Any) -> dict:
    import torch

    a, b = (t.float() for t in _operands(s))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _product(s, len(a), lambda: a @ b)
    finally:
        torch.set_float32_matmul_precision(before)


def _fp8_matmul(s: Any, by_row: bool, fast: bool) -> dict:
    import torch

    from nexus_rt.models.quantized_products import multiplies

    a, b = (t.to(torch.float8_e4m3fn) for t in _operands(s))
    n, b = len(a), b.T
    if by_row and not multiplies(a):
        return {"why": "this PyTorch multiplies 8-bit floats with a scale a row on GPUs alone"}
    rows = torch.rand(n, 1, device=s.device) + 0.5
    one = torch.ones((), device=s.device)
    scales = (rows, rows.T.contiguous()) if by_row else (one, one)
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
    return _product(s, n, lambda: torch._scaled_mm(a, b, *scales, **options))


def kernels(s: Any) -> dict[str, Unit]:
    """A row a kernel and size, timed where it is right. The sizes of the small and the large
    generator, and of 480p and 720p x 81 frames; those of 480p are headline rows."""
    out = {}
    for label, make in {**block_calls(s), **loop_calls(s)}.items():
        first = label.rpartition(" ")[2] in (str(s.tokens), "{1}x{2}".format(*s.size.latent))
        seconds = (estimates.compile_s(_new_variants(s, label)) or estimates.SHORT_S) * first
        out[label] = Unit(partial(_timed, s, label, make), 40.0, seconds)
    return out


def _new_variants(s: Any, label: str) -> int:
    """Variants of a row that neither correctness nor a step has compiled before."""
    small_rows = label.split()[0] in ("modulate_rows", "quantise_rows") and s.names[0] in label
    return int(small_rows or label.startswith("band_filter"))


def _timed(s: Any, label: str, make: Callable[[], tuple]) -> dict:
    """A kernel and eager PyTorch as graph replays and as calls, and a copy that moves as many
    bytes."""
    if label.split()[0] in s.wrong:
        return {"refused": "it is wrong: see correctness"}
    ours, eager, args, moved = make()
    call, peer = lambda: ours(*args), lambda: eager(*args)
    row = s.of_roof(s.ms(call, graph=True), bytes_=moved)
    like = s.random(moved // 4, dtype=s.half)
    target = like.clone()
    row["percent_of_like_copy"] = figure(
        100 * s.ms(lambda: target.copy_(like), graph=True) / row["ms"]
    )
    row["eager_ms"] = figure(s.ms(peer, graph=True))
    row["called_ms"], row["eager_called_ms"] = figure(s.ms(call)), figure(s.ms(peer))
    return {**row, "against_eager": figure(row["eager_ms"] / row["ms"])}


def block_calls(s: Any) -> dict[str, Callable[[], tuple]]:
    """Label -> what makes (kernel, eager PyTorch, arguments, bytes to move), for the norms of a Wan
    block."""
    calls: dict[str, Callable[[], tuple]] = {}
    for name, config in reversed(s.configs.items()):
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        for length in (s.tokens,) if s.dry else (s.tokens, 75600):
            size = f"{name} {length}"
            for kind in ("", "gated residual "):
                calls[f"modulate {kind}{size}"] = partial(
                    _modulate, s, heads * head_dim, length, bool(kind)
                )
            calls[f"qk_norm_rope {size}"] = partial(_qk_norm_rope, s, heads, head_dim, length)
            if not s.dry:  # the interpreter rounds to fp8 wrongly
                calls[f"modulate_rows {size}"] = partial(
                    _modulate_rows, s, heads * head_dim, length
                )
                inner = config["ffn_dim"]
                calls[f"quantise_rows GELU {size}"] = partial(_rows, s, inner, length)
    return calls


def _modulate(s: Any, dim: int, length: int, gated: bool) -> tuple:
    import torch

    from nexus_rt.kernels.modulate import modulate, modulate_ref

    x, y = s.random(1, length, dim), s.random(1, length, dim)
    scale, shift, gate = (s.random(1, dim, dtype=torch.float32) for _ in range(3))
    args = (x, scale, shift, 1e-6)
    if gated:
        return modulate, modulate_ref, (*args, y, gate), 4 * x.nbytes
    return modulate, modulate_ref, args, 2 * x.nbytes


def _modulate_rows(s: Any, dim: int, length: int) -> tuple:
    from nexus_rt.kernels.modulate import modulate_rows, modulate_rows_ref

    args, moved = _modulate(s, dim, length, True)[2:]
    return modulate_rows, modulate_rows_ref, args, moved * 7 // 8


def _rows(s: Any, inner: int, length: int) -> tuple:
    from nexus_rt.kernels.quantise_rows import quantise_rows, quantise_rows_ref

    x = s.random(1, length, inner)
    return quantise_rows, quantise_rows_ref, (x, True), x.nbytes * 3 // 2


def _qk_norm_rope(s: Any, heads: int, head_dim: int, length: int) -> tuple:
    import torch

    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

    dim = heads * head_dim
    angle = s.random(length, head_dim // 2, dtype=torch.float32)
    qkv = s.random(1, length, 3 * dim)
    args = (qkv, s.random(dim), s.random(dim), angle.cos(), angle.sin(), heads, 1e-6)
    return qk_norm_rope, qk_norm_rope_ref, args, 4 * qkv.nbytes // 3 + 2 * angle.nbytes


def loop_calls(s: Any) -> dict[str, Callable[[], tuple]]:
    """The same for the blend, both generators guided, and the solver step, at 480p and 720p x 81
    frames."""
    calls: dict[str, Callable[[], tuple]] = {}
    for height, width in ((6, 10),) if s.dry else ((60, 104), (90, 160)):
        size = f"{height}x{width}"
        four = cache(partial(_predictions, s, height, width))
        calls[f"band_blend {size}"] = partial(_band_blend, four)
        for label, lowpass in (("rank 1", "gaussian"), ("any rank", "butterworth")):
            calls[f"band_filter {label} {size}"] = partial(_band_filter, s, four, lowpass)
        calls[f"solver_step {size}"] = partial(_solver_step, s, four)
    return calls


def _predictions(s: Any, height: int, width: int) -> Four:
    small, small_u, large, large_u = (
        s.random(1, 16, 3 if s.dry else 21, height, width) for _ in range(4)
    )
    return small, small_u, large, large_u


def _moved(four: Four) -> int:
    return sum(t.nbytes for t in four) + 4 * four[0].numel()


def _band_blend(four: Callable[[], Four]) -> tuple:
    from nexus_rt.kernels.band_blend import band_blend, band_blend_ref

    args = (*four(), (5.0, 5.0), 0.4, 0.42, 0.18, 0.2)
    return band_blend, band_blend_ref, args, _moved(four())


def _band_filter(s: Any, four: Callable[[], Four], lowpass: str) -> tuple:
    from nexus_rt.kernels.band_filter import band_filter, band_filter_ref
    from nexus_rt.method.filters import split_filter

    f = split_filter(*four()[0].shape[-2:], "dct", lowpass, 2, 0.5, s.device)
    args = (*four(), (5.0, 5.0), 0.42, 0.18, f.left, f.right, f.gain)
    return band_filter, band_filter_ref, args, _moved(four())


def _solver_step(s: Any, four: Callable[[], Four]) -> tuple:
    import torch

    from nexus_rt.kernels.band_blend import band_blend
    from nexus_rt.kernels.solver_step import solver_step, solver_step_ref

    x, v, *history = (s.random(*four()[0].shape, dtype=torch.float32) for _ in range(5))
    sums = band_blend(*four(), (5.0, 5.0), 0.4, 0.42, 0.18, 0.2)[1]
    scalars = [0.9, 0.7, -0.2, 0.35, 0.11, 0.83, 0.4, -0.09]
    args = (x, v, None, 1.0, sums, "progressive", 0.6, scalars, history, 3, 2)
    return solver_step, solver_step_ref, args, 8 * x.nbytes
