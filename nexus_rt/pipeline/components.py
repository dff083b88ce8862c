"""What a call runs on: a pair's engines, encoders and VAE, and how they share memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nexus_rt.core.size import ClipSize
from nexus_rt.engines.experts import boundaries, engines_by_name
from nexus_rt.method.engine import Engine, Sized, supports
from nexus_rt.method.latents import LatentGrid
from nexus_rt.method.plan import Plan
from nexus_rt.pipeline.memory_use import MemoryUse, call_parts
from nexus_rt.pipeline.request import GenerationRequest, PairProfile
from nexus_rt.pipeline.residency import ResidencyPlan, plan_residency
from nexus_rt.pipeline.rewriting import Cache
from nexus_rt.pipeline.settings import Defaults

if TYPE_CHECKING:
    import torch

    from nexus_rt.components.context import ContextEncoder
    from nexus_rt.components.text import TextEncoder
    from nexus_rt.components.vae import VideoDecoder
    from nexus_rt.engines.text_vae import EngineDecoder, EngineTextEncoder
    from nexus_rt.parallel.sharing import Parallel


@dataclass(frozen=True)
class Components:
    """What a call runs on.

    engines: "small" and "large", those that are loaded. text, vae: None where a pair has none.
    context: understanding model and connector; None where both generators read the text. grid,
        channels: of the latents. vram: bytes of the budget; None where nothing moves.
    keep_encoders: whether the encoders stay loaded after a call. answers: those of rewriters.
    progress: tqdm's options.
    """

    engines: Mapping[str, Engine]
    text: TextEncoder | EngineTextEncoder | None
    context: ContextEncoder | None
    vae: VideoDecoder | EngineDecoder | None
    defaults: Defaults
    grid: LatentGrid
    channels: int
    device: torch.device
    kernels: str = "auto"
    keep_encoders: bool = True
    vram: int | None = None
    parallel: Parallel | None = None
    answers: Cache = field(default_factory=Cache)
    progress: dict[str, Any] = field(default_factory=dict)
    _residencies: dict[Any, ResidencyPlan] = field(default_factory=dict, compare=False)

    @property
    def profile(self) -> PairProfile:
        """What requests are checked against."""
        sized = (*self.engines.values(), self.vae)
        return PairProfile(
            self.defaults,
            self.grid,
            tuple(self.engines),
            dict(boundaries(self.engines)),
            tuple(sizes for e in sized if supports(e, Sized) for sizes in e.built_sizes),
            self.context is not None,
        )

    def memory(self, size: ClipSize, batch: int) -> dict[str, MemoryUse]:
        """What a call holds in memory by part; batch: samples of a step, unconditional twins
        counted."""
        others: dict[str, Any] = {"text encoder": self.text, "vae": self.vae}
        if self.context:
            others |= {"understanding": self.context.understanding, "connector": self.context}
        there = {name: other for name, other in others.items() if other is not None}
        return call_parts(engines_by_name(self.engines), there, size, batch)

    def residency(
        self, plan: Plan, size: ClipSize, videos: int, guided: bool = True, vram: int | None = None
    ) -> ResidencyPlan:
        """What is in memory when, under the budget (or another)."""
        budget = self.vram if vram is None else vram
        key = plan, size, videos, guided, budget
        if key not in self._residencies:  # the stages of a call ask alike
            parts = self.memory(size, videos * (1 + guided))
            self._residencies[key] = plan_residency(plan, parts, budget)
        return self._residencies[key]

    def tight(self, request: GenerationRequest, videos: int) -> bool:
        """Whether memory is budgeted so that parts come and go."""
        if self.vram is None:
            return False
        return self.residency(request.plan, request.size, videos).mode != "resident"

    def unload_engines(self) -> None:
        """Leave the device's memory to encoders or the decoder."""
        for engine in self.engines.values():
            engine.unload()  # type: ignore[attr-defined]
