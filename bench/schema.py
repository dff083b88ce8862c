"""What results files hold, as far as it is shown or compared: one schema for every reader."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from nexus_rt.core import documents

T = TypeVar("T")
Figure = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]
Some = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
MAX_RUNS = 10_000  # of a row: the interval of a ratio draws them 2,000 times


class Quality(msgspec.Struct, frozen=True):
    """What a speed costs, of a row or a peer."""

    identical: bool | None = None
    psnr_db: Figure | None = None
    ssim: Figure | None = None
    latent_error: Figure | None = None
    accuracy: Figure | None = None
    right: Some | None = None
    count: Some | None = None

    def __post_init__(self) -> None:
        if self.accuracy is not None and None in (self.right, self.count):
            raise ValueError("an accuracy has neither how many were right nor of how many")


NO_QUALITY = Quality()


class Step(msgspec.Struct):
    step: Some
    duration_ms: Milliseconds
    runs: str


class Row(msgspec.Struct):
    """A plan on an engine: its failure, or its times and their quality."""

    plan: str
    engine: str
    size: list[int] = []
    steps: Some = 0
    failed: str | None = None
    total_duration_ms: Positive = 0.0
    total_p95_ms: Positive = 0.0
    total_runs_ms: Annotated[list[Positive], msgspec.Meta(max_length=MAX_RUNS)] = []
    denoise_ms: Positive = 0.0
    denoise_steps_ms: list[Step] = []
    components_ms: dict[str, Milliseconds] = {}
    quality: Quality = NO_QUALITY
    cold_ms: Milliseconds | None = None
    first_preview_ms: Milliseconds | None = None
    swap_ratio: Figure | None = None
    prediction_error: Figure | None = None
    peak_host_bytes: Figure | None = None
    peak_device_bytes: Figure | None = None
    thumbnail: str | None = None

    def __post_init__(self) -> None:
        times = (self.total_duration_ms, self.total_p95_ms, self.denoise_ms, self.total_runs_ms)
        whole = all(times) and self.size and self.quality is not NO_QUALITY
        if self.failed is None and not whole:
            raise ValueError(f"row {self.plan} on {self.engine} has neither times nor a failure")


class Median(msgspec.Struct, frozen=True):
    p50: Milliseconds


NO_TIME = Median(0.0)


class Peer(Quality, frozen=True, kw_only=True):
    """A peer beside a plan of ours: its failure, or the times of both."""

    peer: str
    plan: str = ""
    failed: str | None = None
    same_mathematics: bool | None = None
    ours_ms: Median = NO_TIME
    theirs_ms: Median = NO_TIME
    ratio: Figure = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        timed = NO_TIME not in (self.ours_ms, self.theirs_ms) and self.ratio
        whole = timed and self.plan and self.same_mathematics is not None
        if self.failed is None and not whole:
            raise ValueError(f"peer {self.peer} has neither times nor a failure")


class Fit(msgspec.Struct):
    coefficients: list[Figure]
    powers: list[Annotated[int, msgspec.Meta(ge=0, le=2)]]
    r2: Figure

    def __post_init__(self) -> None:
        if len(self.coefficients) != len(self.powers):
            raise ValueError("a fit has other numbers of coefficients and powers")


class Point(msgspec.Struct):
    ms: Milliseconds
    steps: Positive | None = None
    tokens: Positive | None = None

    def at(self, unit: str) -> float | None:
        """Its place over "steps" or "tokens"."""
        return self.steps if unit == "steps" else self.tokens


class Curve(msgspec.Struct):
    points: list[Point]
    fit: Fit | None = None


class EstimateRow(msgspec.Struct):
    plan: str
    steps: Some
    denoise_ms_at_least: Milliseconds | None = None


class Estimate(msgspec.Struct):
    rows: list[EstimateRow]
    tflops: Figure | None = None
    tflop: dict[str, Figure] = {}


class Hardware(msgspec.Struct):
    threads: Some
    processor: str = ""
    gpu: str | None = None
    cores: int | None = None
    system: str | None = None


class Fingerprint(msgspec.Struct):
    hardware: Hardware
    when: str
    command: str
    versions: dict[str, str] = {}
    weights: dict[str, Any] = {}
    device: str = ""


def unit_of(axis: str) -> str:
    """What a scaling runs over: "steps" or "tokens"."""
    return "steps" if axis == "steps" else "tokens"


class Report(msgspec.Struct):
    """What `nexus-rt bench` wrote."""

    fingerprint: Fingerprint
    rows: list[Row] = []
    preset: str = ""
    prompt: str | None = None
    notes: list[str] = []
    peers: list[Peer] = []
    scaling: dict[str, dict[str, Curve]] = {}
    estimate: Estimate | None = None

    def __post_init__(self) -> None:
        for axis, curves in self.scaling.items():
            unit = unit_of(axis)
            for name, curve in curves.items():
                if any(p.at(unit) is None for p in curve.points):
                    raise ValueError(f"scaling over {axis} of {name} has a point without {unit}")


class Times(msgspec.Struct):
    p50: Milliseconds
    p95: Milliseconds
    p99: Milliseconds


class Churn(msgspec.Struct):
    jobs: Some
    jobs_per_second: Figure
    get_ms: Times
    rss_mb: list[Figure]
    slope_kb_per_job: Figure


class Held(msgspec.Struct):
    open: Some
    get_ms: Times
    rss_mb: list[Figure]


class Lost(msgspec.Struct):
    submitted: Figure
    ended: Figure
    lost: Figure


class Parts(msgspec.Struct):
    batch_ms_a_clip: dict[str, Milliseconds]
    preview_ms: dict[str, Milliseconds]


class Load(msgspec.Struct):
    """What `nexus_rt.bench.serve` wrote, as its table shows it."""

    fingerprint: Fingerprint
    quiet_get_ms: Times
    churn: Churn
    connections: Held
    malformed: dict[str, Some]
    lost: Lost
    parts: Parts | None = None


class Run(msgspec.Struct):
    torch: str
    date: str
    commit: str | None
    command: str
    triton: str | None = None
    gpu: str | None = None


class Suite(msgspec.Struct):
    """What the GPU suite wrote: `run`, and rows by label under every part."""

    run: Run


def read_as(document: Any, kind: type[T], where: str) -> T:
    """A document as one of the kinds above.

    Raises:
        ModelError: a field of it is not of its type.
    """
    return documents.check(document, kind, where, remedy="measure again")


def report_of(document: Any, where: str = "the report") -> Report:
    """The results of `nexus-rt bench`; errors as `read_as`."""
    return read_as(document, Report, where)
