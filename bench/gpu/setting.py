"""What a part of the GPU suite knows: the device and the sizes of the run, what has been measured
so far, and how a call is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from nexus_rt.bench.architectures import DRY, WAN_1_3B, WAN_14B
from nexus_rt.bench.gpu.wheels import WHEELS, absent
from nexus_rt.core.devices import synchronize
from nexus_rt.core.size import ClipSize
from nexus_rt.core.timing import elapsed_ms
from nexus_rt.kernels.attention_launch import TIMED

CONFIGS = {"1.3B": WAN_1_3B, "14B": WAN_14B}
GRID = (21, 30, 52)  # tokens of 480p x 81 frames: 32,760
CORRECTNESS = ("correctness", "correctness elsewhere")
# from numpy 2.4 on, of the array of one element that Triton 3.6's interpreter takes for a number
NO_LOOPS = "only 0-dimensional arrays can be converted to Python scalars"
LONG_MS = 2000.0  # a timed run above which there is no second one
# without them a step cannot be fused
STEP_KERNELS = {"modulate", "qk_norm_rope", "linear_gelu", "band_blend", "solver_step"}


def figure(value: float) -> float:
    """Four digits of a measurement."""
    return float(f"{value:.4g}")


@dataclass
class Setting:
    """dry: a CPU, tiny sizes, kernels interpreted. results: of the parts before, rows by label."""

    dry: bool
    results: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        import torch

        self.device = torch.device("cpu" if self.dry else "cuda")
        # the interpreter computes bfloat16 wrongly
        self.dtype = torch.float32 if self.dry else torch.bfloat16
        self.half = torch.bfloat16  # moves bytes, computes nothing
        self.grid = (1, 3, 4) if self.dry else GRID
        self.configs = {"tiny": DRY} if self.dry else CONFIGS
        # of the VAE; None: Wan's own
        self.decoder = dict(base_dim=4, num_res_blocks=1) if self.dry else None

    @property
    def size(self) -> ClipSize:
        """The clip's size in pixels and frames."""
        t, h, w = self.grid
        return ClipSize(16 * w, 16 * h, 4 * t - 3)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def names(self) -> tuple[str, str]:
        """Of the small and the large configuration."""
        return next(iter(self.configs)), list(self.configs)[-1]

    @property
    def faults(self) -> set[str]:
        """Labels of what was found wrong, hung or crashed."""
        return {
            label
            for part in CORRECTNESS
            for label, row in self.results.get(part, {}).items()
            if isinstance(row, dict) and not row.get("right", "not_reached" in row)
        }

    @property
    def wrong(self) -> set[str]:
        """Kernels that get no speed: those that are at fault as the runtime launches them."""
        forced = tuple(f", {how}" for how in TIMED if how != "auto")
        return {label.split()[0] for label in self.faults if not label.endswith(forced)}

    @property
    def kernels(self) -> str:
        """What models run with: "auto", or "torch" where a kernel that they launch is wrong."""
        return "torch" if STEP_KERNELS & self.wrong else "auto"

    @property
    def attention(self) -> str:
        """What models attend with: "auto", or PyTorch's choice where a candidate of "auto" did not
        survive being tried, as it would not survive in the model either."""
        candidates = ("triton", "flash", "cudnn", "fa3")
        bad = [
            label
            for label, row in self.results.get("attention", {}).items()
            if "failed" in row and label.rpartition(": ")[2] in candidates
        ]
        return "sdpa" if bad or "attention" in self.wrong else "auto"

    def random(self, *shape: int, dtype: Any = None) -> Any:
        """Gaussian numbers, others at every call."""
        import torch

        self.seed += 1
        g = torch.Generator(self.device).manual_seed(self.seed)
        return torch.randn(*shape, generator=g, device=self.device).to(dtype or self.dtype)

    def lacking(self, error: BaseException) -> str | None:
        """What is lacking here that a row's error comes of: a package to carry, or Triton's
        interpreter beside this numpy; None of any other error."""
        if isinstance(error, ImportError) and error.name in WHEELS:
            return absent(error.name)
        seen: list[BaseException] = []
        behind: BaseException | None = error
        while self.dry and behind is not None and behind not in seen:
            if NO_LOOPS in str(behind):
                return (
                    "the interpreter of this Triton cannot run loops with run-time bounds beside"
                    " this numpy; Triton 3.7, or numpy below 2.4, can"
                )
            seen.append(behind)
            behind = behind.__cause__ or behind.__context__
        return None

    def synchronize(self) -> None:
        """Wait for the device; raises what a kernel has done wrong."""
        synchronize(self.device)

    def works(self) -> bool:
        """Whether the device still answers this process."""
        import torch

        try:
            self.synchronize()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception:
            return False
        return True

    def peak(self) -> Callable[[], dict[str, float]]:
        """Begin to watch memory; the call says the peak since, in GiB, where there is a GPU."""
        import torch

        if self.device.type != "cuda":
            return dict
        torch.cuda.reset_peak_memory_stats()
        return lambda: {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}

    def ms(
        self, call: Callable[[], Any], runs: int = 10, warmup: int = 3, graph: bool = False
    ) -> float:
        """Median milliseconds, the second-level cache swept between runs on a GPU; those of the
        first run alone where it takes more than `LONG_MS`.

        graph: of a replay, without the launches' own time; a call that waits for the GPU cannot be
            captured and fails.
        """
        import torch

        if self.dry:
            runs, warmup = 1, 0
        for _ in range(warmup):
            call()
        if self.device.type != "cuda":
            times: list[float] = []
            while len(times) < runs and not (times and times[0] > LONG_MS):
                times.append(elapsed_ms(call))
            return median(times)
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                call()
            call = captured.replay
        sweep = torch.ones(64 * 2**20, dtype=torch.int32, device=self.device)
        events: list[tuple[Any, Any]] = []
        for _ in range(runs):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # read, not written: dirty lines would be written back at the expense of what is timed
            sweep.amax()
            start.record()
            call()
            stop.record()
            events.append((start, stop))
            if len(events) == 1:
                stop.synchronize()
                if start.elapsed_time(stop) > LONG_MS:
                    break
        torch.cuda.synchronize()
        return median(a.elapsed_time(b) for a, b in events)

    def of_roof(
        self, ms: float, bytes_: float = 0, flops: float = 0, matmul: str = "matmul_tflops"
    ) -> dict[str, Any]:
        """A figure with its rate and its share of the roof."""
        roofs = self.results.get("roofs", {})
        row: dict[str, Any] = {"ms": figure(ms)}
        for kind, amount, unit in (("copy_gbps", bytes_, 1e6), (matmul, flops, 1e9)):
            if amount:
                rate = amount / ms / unit
                row["gbps" if bytes_ else "tflops"] = figure(rate)
                roof = roofs.get(kind, {}).get("rate")
                row["percent_of_roof"] = figure(100 * rate / roof) if roof else None
        return row
