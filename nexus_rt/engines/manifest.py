"""What an engine folder says of itself: `manifest.json`, its fields and their schema."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from nexus_rt.core import documents
from nexus_rt.core.errors import ModelError, shown

SCHEMA = 1
Side = Annotated[int, msgspec.Meta(ge=1, le=65536)]


@dataclass(frozen=True)
class Manifest:
    """What an engine folder says of itself.

    part: "small", "large", an expert of either such as "large-high" (options["boundary"] says
        where they change over), "vae" or "text_encoder". graphs: name -> inputs, in order.
    architecture: WanConfig's fields of a generator, else the part's own config.
    weights: sha256 of the source's weight files. buckets: [width, height, frames]; with
        options["range"], its two ends.
    device: {"type": "cpu" | "cuda", "sm": "9.0" or None, "name"}. parity: see
    `nexus_rt.export.parity`. files: name -> {"bytes", "sha256"}. contract: graph -> its inputs and
    outputs (`nexus_rt.export.contract`). command: what rebuilds the engine. lora: hash of what was
    merged into the weights, or None.
    """

    part: str
    backend: str
    backend_version: str
    precision: str
    architecture: dict[str, Any]
    weights: str
    buckets: list[list[int]]
    graphs: dict[str, list[str]]
    device: dict[str, Any]
    producer: str
    command: str
    opset: int | None = None
    lora: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def identity(self) -> str:
        """What decides that two engines are the same: everything but results, files and words. 16
        hex digits."""
        kept = {
            k: v
            for k, v in asdict(self).items()
            if k not in ("parity", "files", "command", "part", "contract")
        }
        kept["device"] = {k: v for k, v in self.device.items() if k != "name"}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


class _File(msgspec.Struct):
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Device(msgspec.Struct):
    type: Literal["cpu", "cuda"]
    sm: str | None
    name: str | None


class _Row(msgspec.Struct):
    relative_error: float | None = None


class _Parity(msgspec.Struct):
    passed: bool = False
    compared: bool = True
    why: str = ""
    rows: dict[str, _Row] = {}


class _Options(msgspec.Struct):
    """The options that the runtime reads; a backend keeps others for people."""

    range: bool = False
    refit: bool = False
    weight_streaming: bool = False
    boundary: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    instruction_sets: list[str] | None = None


class Stored(msgspec.Struct):
    """A manifest as it may stand in a file."""

    part: Literal[
        "small",
        "small-high",
        "small-low",
        "large",
        "large-high",
        "large-low",
        "vae",
        "text_encoder",
    ]
    backend: str
    backend_version: str
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    architecture: dict[str, Any]
    weights: str
    buckets: list[Annotated[list[Side], msgspec.Meta(min_length=3, max_length=3)]]
    graphs: dict[Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]{1,64}$")], list[str]]
    device: _Device
    producer: str
    command: str
    opset: int | None
    lora: str | None
    options: dict[str, Any]
    parity: _Parity
    files: dict[str, _File]
    contract: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def check(self, where: str) -> None:
        """Raise where a file would lie outside the folder, or the parts of the manifest contradict
        each other."""
        for name in self.files:
            pieces = name.split("/")
            if (
                name.startswith("/")
                or "\\" in name
                or "\0" in name
                or any(p in ("", ".", "..") for p in pieces)
            ):
                raise ModelError(
                    f"{where} lists {shown(name, 120)}; expected names of files in its folder.",
                    code="unsafe",
                    param="files",
                )
        if not self.graphs or not self.files:
            raise ModelError(
                f"{where} lists no graphs or no files; export the engine again.",
                code="missing",
                param="files" if self.graphs else "graphs",
            )
        generates = self.part.partition("-")[0] in ("small", "large")
        if generates and not self.buckets:
            raise ModelError(
                f"{where} lists no sizes; export the engine again.", code="missing", param="buckets"
            )
        documents.check(self.options, _Options, f"{where}'s options")
        if self.options.get("range") and len(self.buckets) != 2:
            raise ModelError(
                f"{where} is of a range and lists {len(self.buckets)} sizes; expected its two"
                " ends.",
                code="mismatch",
                param="buckets",
            )
        if self.part == "vae":
            from nexus_rt.models.wan_vae import check_space

            documents.check(
                self.options.get("states"),
                list[Annotated[list[Side], msgspec.Meta(min_length=2, max_length=2)]],
                where,
            )
            check_space(self.architecture, where)
        if generates:
            from nexus_rt.models.wan_config import WanConfig

            try:
                WanConfig.from_dict(self.architecture)
            except ModelError as error:
                raise ModelError(
                    f"{where}: its architecture is none: {error}",
                    code=error.code,
                    param=error.param,
                ) from error
