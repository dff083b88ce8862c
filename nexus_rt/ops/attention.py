"""Attention backends by name, and the choice between them by measurement.

Tensors are token-major, [B, L, heads, head_dim], as the fused projection has them. `bias` [B, Lk]
is added to every score of a key (the log-count that stands for Wan's zero padding).

`sdpa` lets PyTorch choose; `flash`, `cudnn` and `math` ask it for one of its own; `triton` is this
package's kernel and `triton-fp8` the same on 8-bit floats; `fa3` (FlashAttention 3) and `sage`
(SageAttention, 8-bit) run where they are installed. `auto` measures the exact ones that can run,
once per (GPU, shape, dtype, versions), and keeps the answer on disk; `auto-fp8` lets the
approximate ones take part too; on a CPU both are `sdpa`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, NexusError, choose
from nexus_rt.core.log import chose
from nexus_rt.core.part_files import part_file
from nexus_rt.core.paths import cache_root
from nexus_rt.core.timing import elapsed_ms, median_ms
from nexus_rt.ops.block_ops import cannot_run_triton

EDGE_ROWS = 16  # first queries, and last, that a candidate is compared with float32 on
ROWS_BETWEEN = 48  # more queries, evenly between
# of the output's RMS: what an approximate backend may be off on Gaussian inputs (e4m3 loses 0.055)
APPROXIMATE = 0.08
RUNS = 5
WIDE = 128  # head_dim from which float32 by our kernel is refused on GPUs
HOPELESS = 3.0  # times the best: a candidate so slow is not run again,
CHEAP_MS = 1.0  # unless its runs cost nothing
MOST_SCORES = 2 * 10**9  # bytes that `math` may hold to be tried


@dataclass(frozen=True)
class Case:
    """What a backend is asked for: shapes, dtype and device, not values."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    biased: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, bias: Tensor | None) -> Case:
        b, n, h, d = q.shape
        return cls(b, n, k.shape[1], h, d, q.dtype, q.device, bias is not None)


@dataclass(frozen=True)
class Backend:
    """run(q, k, v, bias) -> out; why_not(case) -> a reason, or None; exact: no lower precision than
    its inputs'."""

    run: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    why_not: Callable[[Case], str | None]
    exact: bool = True


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    # a row a query, all of them one in memory: ONNX's Attention takes no mask that is broadcast
    # over queries
    mask = (
        None if bias is None else bias[:, None, None, :].to(q.dtype).expand(-1, -1, q.shape[1], -1)
    )
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask
    ).transpose(1, 2)


def _torch_backend(name: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, name)):
            return _sdpa(q, k, v, bias)

    return run


def _triton(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from nexus_rt.kernels.attention import attention

    return attention(q, k, v, None if bias is None else bias.float().contiguous())


def _triton_fp8(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from nexus_rt.kernels.attention_fp8 import attention_fp8

    return attention_fp8(q, k, v, None if bias is None else bias.float().contiguous())


def _fa3(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def _sage(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD")


def _half(case: Case) -> str | None:
    return (
        None
        if case.dtype in (torch.float16, torch.bfloat16)
        else f"takes float16 and bfloat16, not {str(case.dtype)[6:]}"
    )


def _on_gpu(case: Case) -> str | None:
    return (
        None
        if case.device.type == "cuda"
        else f"needs a CUDA device, and this is {case.device.type}"
    )


def _unbiased(case: Case) -> str | None:
    return "takes no bias on its keys" if case.biased else None


def _installed(package: str) -> Callable[[Case], str | None]:
    return lambda case: None if find_spec(package) else f"{package} is not installed"


def _flash(case: Case) -> str | None:
    if case.device.type == "cpu":
        return None
    return _on_gpu(case) or _half(case) or _unbiased(case)


def _triton_why(case: Case) -> str | None:
    if why := cannot_run_triton(case.device):
        return why
    from nexus_rt.kernels.attention_launch import HEAD_DIMS

    if case.device.type == "cuda" and case.dtype == torch.float32 and case.head_dim >= WIDE:
        return (
            f"takes minutes a step in float32 at head_dim {case.head_dim}, as its products are then"
            " computed without matrix units"
        )
    return (
        None
        if case.head_dim in HEAD_DIMS
        else f"takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {case.head_dim}"
    )


def _fp8_why(case: Case) -> str | None:
    if why := _triton_why(case) or _half(case):
        return why
    from nexus_rt.kernels.attention_fp8 import OLDEST
    from nexus_rt.kernels.attention_launch import FP8_HEAD_DIMS

    if (
        case.device.type == "cuda"
        and (have := torch.cuda.get_device_capability(case.device)) < OLDEST
    ):
        return f"needs compute capability {OLDEST[0]}.{OLDEST[1]}, and this is {have[0]}.{have[1]}"
    dims = ", ".join(map(str, FP8_HEAD_DIMS))
    return None if case.head_dim in FP8_HEAD_DIMS else f"takes head_dim {dims}, not {case.head_dim}"


CUDNN_ANY_LENGTH = 91501  # 9.15.1, the first that takes lengths that are no multiple of 128
CUDA_ANY_LENGTH = (12, 9)


def _cudnn_length(case: Case) -> str | None:
    """PyTorch's own rule (its pull requests 167101 and 171627): older releases read and write
    beyond tensors whose query length is no multiple of 128."""
    if case.queries % 128 == 0:
        return None
    have, cuda = torch.backends.cudnn.version(), torch.version.cuda
    takes = f"takes {case.queries} queries, no multiple of 128, from"
    if have is not None and have < CUDNN_ANY_LENGTH:
        release = f"{have // 10000}.{have % 10000 // 100}.{have % 100}"
        return f"{takes} cuDNN 9.15.1 on, and this is {release}"
    if cuda is not None and tuple(map(int, cuda.split(".")[:2])) < CUDA_ANY_LENGTH:
        return f"{takes} CUDA 12.9 on, and this is {cuda}"
    return None


def _first(*reasons: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    return lambda case: next((why for r in reasons if (why := r(case))), None)


ATTENTION_BACKENDS = {
    "sdpa": Backend(_sdpa, lambda case: None),
    "math": Backend(_torch_backend("MATH"), lambda case: None),
    "flash": Backend(_torch_backend("FLASH_ATTENTION"), _flash),
    "cudnn": Backend(_torch_backend("CUDNN_ATTENTION"), _first(_on_gpu, _half, _cudnn_length)),
    "triton": Backend(_triton, _triton_why),
    "triton-fp8": Backend(_triton_fp8, _fp8_why, exact=False),
    "fa3": Backend(_fa3, _first(_on_gpu, _half, _unbiased, _installed("flash_attn_interface"))),
    "sage": Backend(
        _sage, _first(_on_gpu, _half, _unbiased, _installed("sageattention")), exact=False
    ),
}
AUTOMATIC = ("auto", "auto-fp8")
ATTENTION_NAMES = (*AUTOMATIC, *ATTENTION_BACKENDS)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Softmax attention of every head.

    Args:
        q: [B, Lq, heads, head_dim]; k, v: [B, Lk, heads, head_dim]; bias: [B, Lk] float, or None.
        backend: a name of `ATTENTION_BACKENDS`, "auto", or "auto-fp8".

    Returns:
        [B, Lq, heads, head_dim] in q's dtype.

    Raises:
        InputError: an unknown backend, or one that cannot run on these tensors: it is never
            replaced in silence.
    """
    if backend in AUTOMATIC:
        backend = automatic(q, k, v, bias, approximate=backend == "auto-fp8")
    elif (
        not torch.compiler.is_compiling()
    ):  # sizes may be symbols there; an unfit backend says so when it is run
        case = Case.of(q, k, bias)
        if (backend, case) not in _fit:
            choose("attention backend", backend, ATTENTION_NAMES)
            if why := ATTENTION_BACKENDS[backend].why_not(case):
                raise InputError(
                    f"attention backend {backend!r} cannot run here: it {why}; use 'auto' or"
                    " 'sdpa'.",
                    code="unsupported",
                    param="attention",
                )
            _fit.add((backend, case))
    return ATTENTION_BACKENDS[backend].run(q, k, v, bias)


_chosen: dict[tuple[Case, bool], str] = {}  # what auto and auto-fp8 stand for
# explicit backends found able: asked once a case, not at every layer
_fit: set[tuple[str, Case]] = set()


def takes_bias(backend: str, device: torch.device) -> bool:
    """Whether a backend takes a bias on its keys on a device; a context for one that does not keeps
    all its padding."""
    if backend in AUTOMATIC:
        return True
    case = Case(
        1,
        128,
        128,
        1,
        128,
        torch.bfloat16 if device.type == "cuda" else torch.float32,
        device,
        False,
    )
    run = ATTENTION_BACKENDS[backend]
    return run.why_not(replace(case, biased=True)) is None or run.why_not(case) is not None


def automatic(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, approximate: bool = False
) -> str:
    """The backend `auto` stands for: measured on a GPU the first time a case is met, `sdpa` on a
    CPU.

    approximate: 8-bit backends take part.
    """
    if torch.compiler.is_compiling():
        return "sdpa"
    if q.device.type != "cuda":
        chose("attention", "sdpa", f"the device is {q.device}", once=True)
        return "sdpa"
    case = Case.of(q, k, bias)
    if (case, approximate) not in _chosen:
        result = decide(case, list(ATTENTION_BACKENDS) if approximate else None)
        _chosen[case, approximate] = result["chosen"]
        timed = {
            n: f"{c['ms']:.2f} ms" if "ms" in c else c["why"]
            for n, c in result.get("candidates", {}).items()
        }
        chose(
            f"attention of {case}",
            result["chosen"],
            ", ".join(f"{n} {t}" for n, t in timed.items()),
        )
    return _chosen[case, approximate]


def decide(case: Case, candidates: Iterable[str] | None = None, remeasure: bool = False) -> dict:
    """Measure the candidates for a case, or read what was measured before.

    Args:
        candidates: names; by default every exact backend.

    Returns:
        {"chosen": name, "candidates": {name: {"ms", "error", "relative"} or {"why"}}}: the fastest
        of those within their error against float32: an exact one's largest is at most twice that of
        `math` in the case's own dtype, an approximate one's RMS at most `APPROXIMATE` of the
        output's.
    """
    names = (
        [n for n in ATTENTION_BACKENDS if ATTENTION_BACKENDS[n].exact]
        if candidates is None
        else list(candidates)
    )
    known, key = _read_cache(), _key(case, names)
    if not remeasure and key in known:
        return known[key]
    trial = Trial.of(case)
    results = {name: trial.measure(name) for name in names}
    timed = {n: f["ms"] for n, f in results.items() if "ms" in f}
    if not timed:
        raise InputError(
            f"no attention backend of {', '.join(names)} can run {case}: {results}",
            code="unsupported",
            param="attention",
        )
    result = {"chosen": min(timed, key=timed.__getitem__), "candidates": results}
    _write_cache({**_read_cache(), key: result})
    return result


@dataclass
class Trial:
    """A case's tensors, Gaussian, and float32's result on rows of every head and sample: the first,
    the last and some between.

    allowed: largest error of an exact backend. best: milliseconds of the fastest backend so far.
    """

    case: Case
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]
    rows: Tensor
    wanted: Tensor
    allowed: float
    best: float = math.inf

    @classmethod
    def of(cls, case: Case) -> Trial:
        """Tensors, float32's result, and what `math` loses in the case's own dtype."""
        g = torch.Generator(case.device).manual_seed(0)
        make = lambda *shape: torch.randn(*shape, generator=g, device=case.device).to(case.dtype)
        q = make(case.batch, case.queries, case.heads, case.head_dim)
        k, v = (make(case.batch, case.keys, case.heads, case.head_dim) for _ in range(2))
        bias = make(case.batch, case.keys).float() if case.biased else None
        rows = _checked_rows(case.queries).to(case.device)
        wanted = _by_head(_float32, q[:, rows], k, v, bias)
        plain = _by_head(ATTENTION_BACKENDS["math"].run, q[:, rows], k, v, bias)
        off = float((plain - wanted).abs().max())
        return cls(case, (q, k, v, bias), rows, wanted, 2 * off + 1e-6)

    def measure(self, name: str) -> dict:
        """{"ms", "error", "relative"} of a backend, or {"why"} it has none."""
        backend = ATTENTION_BACKENDS[name]
        if why := backend.why_not(self.case) or _scores_why(name, self.case):
            return {"why": why}
        try:
            out = backend.run(*self.tensors)
            if out.shape != self.tensors[0].shape or out.dtype != self.case.dtype:
                return {"why": f"its result is {out.dtype} {tuple(out.shape)}"}
            difference = out[:, self.rows].float() - self.wanted
            wrong, share = float(difference.abs().max()), _share(difference, self.wanted)
            worst = _share(difference, self.wanted, (1, 3))  # of one head, which 40 would hide
            # NaN is wrong too
            if not (wrong <= self.allowed if backend.exact else worst <= APPROXIMATE):
                limit = (
                    f"{self.allowed:.1e}"
                    if backend.exact
                    else f"{APPROXIMATE} of the output's RMS ({worst:.2f})"
                )
                return {"why": f"its error {wrong:.1e} is above {limit}"}
            if not math.isfinite(float(out.sum(dtype=torch.float32))):
                return {"why": "its result holds NaN or infinity"}
            call = lambda n=name: ATTENTION_BACKENDS[n].run(*self.tensors)  # type: ignore[misc]
            ms = elapsed_ms(call, self.case.device)
            if ms < CHEAP_MS or ms <= HOPELESS * self.best:
                ms = _milliseconds(call, self.case.device)
        except (RuntimeError, ValueError) as problem:  # a library that says no only when it is run
            return {"why": (str(problem).strip() or type(problem).__name__).splitlines()[0]}
        self.best = min(self.best, ms)
        return {"ms": ms, "error": wrong, "relative": share}


def _scores_why(name: str, case: Case) -> str | None:
    """Why `math` is not tried: it holds every score at once, in float32."""
    scores = 4 * case.batch * case.heads * case.queries * case.keys
    if name == "math" and scores > MOST_SCORES:
        return f"holds {scores / 1e9:.1f} GB of scores: not tried above {MOST_SCORES / 1e9:.0f} GB"
    return None


def _checked_rows(queries: int) -> Tensor:
    """Indices of the queries that are compared."""
    edge, last = min(EDGE_ROWS, queries), queries - 1
    between = torch.linspace(0, last, ROWS_BETWEEN).round().long()
    return torch.cat([torch.arange(edge), between, last - torch.arange(edge)]).unique()


def _by_head(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> Tensor:
    """Attention in float32, a sample and head at a time, which holds few scores at once."""
    heads = [
        run(
            *(t[b : b + 1, :, h : h + 1] for t in (q, k, v)),
            None if bias is None else bias[b : b + 1],
        )
        for b in range(q.shape[0])
        for h in range(q.shape[2])
    ]
    return torch.cat(heads, 2).unflatten(2, (q.shape[0], q.shape[2]))[0].transpose(0, 1)


def _share(difference: Tensor, wanted: Tensor, dims: tuple[int, ...] | None = None) -> float:
    """The largest error over these dimensions, as a share of the result's RMS there."""
    size = lambda t: torch.linalg.vector_norm(t, dim=dims)
    return float((size(difference) / size(wanted)).max())


def _float32(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The formula in float32: [B, L, heads, D]."""
    score = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / q.shape[-1] ** 0.5
    if bias is not None:
        score = score + bias[:, None, None]
    return torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v.float())


def _milliseconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Median of `RUNS` runs."""
    return round(median_ms(call, RUNS, 0, device), 4)


def cache_file() -> Path:
    """Where decisions are kept."""
    return cache_root() / "attention.json"


def _read_cache() -> dict:
    try:
        known = documents.read_object(cache_file())
    except NexusError:
        return {}
    return {
        k: v for k, v in known.items() if isinstance(v, dict) and isinstance(v.get("chosen"), str)
    }


def _write_cache(known: dict) -> None:
    """Keep decisions; a cache that cannot be written costs a measurement next time and nothing
    else."""
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with part_file(path) as part:
            part.write_text(json.dumps(known, indent=1))
            os.replace(part, path)


@lru_cache(maxsize=4)
def _machine(device: torch.device) -> list[str]:
    """What a decision holds for: the device, and the versions of whatever may run."""
    parts = []
    for package in ("torch", "triton", "flash-attn-3", "sageattention", "nexus-rt"):
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        parts += [
            torch.cuda.get_device_name(device),
            f"cuda {torch.version.cuda}",
            f"cudnn {torch.backends.cudnn.version()}",
        ]
    return [*parts, str(device.type)]


def _key(case: Case, names: list[str]) -> str:
    shape = [case.batch, case.queries, case.keys, case.heads, case.head_dim]
    return json.dumps([*_machine(case.device), *shape, str(case.dtype), case.biased, names])
