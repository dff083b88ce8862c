"""What tables and pages show of documents: their schemas, and a check before anything is drawn."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec

from nexus_rt.core import documents

T = TypeVar("T")
Figure = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Some = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class _Quality(msgspec.Struct):
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


class _Step(msgspec.Struct):
    step: Some
    duration_ms: Milliseconds
    runs: str


class _Row(msgspec.Struct):
    plan: str
    engine: str
    failed: str | None = None
    total_duration_ms: Annotated[float, msgspec.Meta(gt=0, le=1e15)] | None = None
    total_p95_ms: Milliseconds | None = None
    denoise_ms: Milliseconds | None = None
    denoise_steps_ms: list[_Step] = []
    components_ms: dict[str, Milliseconds] = {}
    quality: _Quality | None = None
    cold_ms: Milliseconds | None = None
    first_preview_ms: Milliseconds | None = None
    swap_ratio: Figure | None = None
    prediction_error: Figure | None = None
    peak_host_bytes: Figure | None = None
    peak_device_bytes: Figure | None = None
    thumbnail: str | None = None

    def __post_init__(self) -> None:
        needed = (self.total_duration_ms, self.total_p95_ms, self.denoise_ms, self.quality)
        if self.failed is None and None in needed:
            raise ValueError(f"row {self.plan} on {self.engine} has neither times nor a failure")


class _P50(msgspec.Struct):
    p50: Milliseconds


class _Peer(msgspec.Struct):
    peer: str
    plan: str | None = None
    failed: str | None = None
    same_mathematics: bool | None = None
    ours_ms: _P50 | None = None
    theirs_ms: _P50 | None = None
    ratio: Figure | None = None
    identical: bool | None = None
    psnr_db: Figure | None = None
    ssim: Figure | None = None
    latent_error: Figure | None = None

    def __post_init__(self) -> None:
        needed = (self.plan, self.same_mathematics, self.ours_ms, self.theirs_ms, self.ratio)
        if self.failed is None and None in needed:
            raise ValueError(f"peer {self.peer} has neither times nor a failure")


class _Fit(msgspec.Struct):
    coefficients: list[Figure]
    powers: list[Annotated[int, msgspec.Meta(ge=0, le=2)]]
    r2: Figure

    def __post_init__(self) -> None:
        if len(self.coefficients) != len(self.powers):
            raise ValueError("a fit has other numbers of coefficients and powers")


class _Point(msgspec.Struct):
    ms: Milliseconds
    steps: Annotated[float, msgspec.Meta(gt=0, le=1e15)] | None = None
    tokens: Annotated[float, msgspec.Meta(gt=0, le=1e15)] | None = None


class _Curve(msgspec.Struct):
    points: list[_Point]
    fit: _Fit | None = None


class _EstimateRow(msgspec.Struct):
    plan: str
    steps: Some
    denoise_ms_at_least: Milliseconds | None = None


class _Estimate(msgspec.Struct):
    rows: list[_EstimateRow]


class _Hardware(msgspec.Struct):
    threads: Some
    processor: str = ""
    gpu: str | None = None


class _Fingerprint(msgspec.Struct):
    hardware: _Hardware
    when: str
    command: str
    versions: dict[str, str] = {}
    weights: dict[str, Any] | None = None


class Report(msgspec.Struct):
    """A results file, as tables and pages show it."""

    fingerprint: _Fingerprint
    rows: list[_Row] = []
    preset: str = ""
    prompt: str | None = None
    notes: list[str] = []
    peers: list[_Peer] = []
    scaling: dict[str, dict[str, _Curve]] = {}
    estimate: _Estimate | None = None

    def __post_init__(self) -> None:
        for axis, curves in self.scaling.items():
            unit = "steps" if axis == "steps" else "tokens"
            for name, curve in curves.items():
                if any(getattr(p, unit) is None for p in curve.points):
                    raise ValueError(f"scaling over {axis} of {name} has a point without {unit}")


class _Times(msgspec.Struct):
    p50: Milliseconds
    p95: Milliseconds
    p99: Milliseconds


class _Churn(msgspec.Struct):
    jobs: Some
    jobs_per_second: Figure
    get_ms: _Times
    rss_mb: list[Figure]
    slope_kb_per_job: Figure


class _Held(msgspec.Struct):
    open: Some
    get_ms: _Times
    rss_mb: list[Figure]


class _Lost(msgspec.Struct):
    submitted: Figure
    ended: Figure
    lost: Figure


class _Parts(msgspec.Struct):
    batch_ms_a_clip: dict[str, Milliseconds]
    preview_ms: dict[str, Milliseconds]


class Load(msgspec.Struct):
    """What `nexus_rt.bench.serve` wrote, as its table shows it."""

    fingerprint: _Fingerprint
    quiet_get_ms: _Times
    churn: _Churn
    connections: _Held
    malformed: dict[str, Some]
    lost: _Lost
    parts: _Parts | None = None


class _Run(msgspec.Struct):
    torch: str
    date: str
    commit: str | None
    command: str
    triton: str | None = None
    gpu: str | None = None


class Suite(msgspec.Struct):
    """What the GPU suite wrote: `run`, and rows by label under every part."""

    run: _Run


def checked(document: Any, kind: type[T], where: str) -> Any:
    """The document, as it is.

    Raises:
        ModelError: a field of it is not of the type that is shown.
    """
    documents.check(document, kind, where, remedy="measure again")
    return document
