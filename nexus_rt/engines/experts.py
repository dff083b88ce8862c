"""A generator of two experts, an engine each: which runs is a matter of the timestep.

Behind the engine protocol it is one generator; the loop runs the expert that a step of the plan
names. `engines_by_name` has the engines one by one, for what moves them between memories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError, NexusError
from nexus_rt.core.size import BuiltSizes
from nexus_rt.loading.lora import Lora, loras_of
from nexus_rt.method.engine import (
    Changeable,
    Diagnosable,
    PublishedNumerics,
    Sized,
    Warmable,
    supports,
)
from nexus_rt.method.step import EXPERTS, engine_name, expert_at


@dataclass
class ExpertsContext:
    """A prompt, prepared for each expert when it first runs."""

    embeddings: Tensor
    prepared: dict[str, Any] = field(default_factory=dict)


class ExpertsEngine:
    """Engines "high" and "low" of one generator.

    boundary: the share of the training timesteps from which up "high" runs, diffusers'
        `boundary_ratio`.
    """

    def __init__(self, experts: Mapping[str, Any], boundary: float) -> None:
        self.experts = {name: experts[name] for name in EXPERTS}
        self.boundary = boundary

    def expert(self, timestep: float) -> str:
        """The expert of a timestep."""
        return expert_at(timestep, self.boundary)

    def each(self, change: Callable[[Any], Any]) -> ExpertsEngine:
        """The same generator of changed engines."""
        return ExpertsEngine({n: change(e) for n, e in self.experts.items()}, self.boundary)

    @property
    def device(self) -> torch.device:
        return self.experts["high"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.experts["high"].dtype

    @property
    def model(self) -> Any:
        """The transformer of the first expert: both are of one architecture."""
        return self.experts["high"].model

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of both."""
        return sum(e.nbytes for e in self.experts.values())

    @property
    def resident(self) -> bool:
        """Whether the weights of both are where they run."""
        return all(e.resident for e in self.experts.values())

    def load(self, **options: Any) -> None:
        """Bring the weights of both to the device."""
        for engine in self.experts.values():
            engine.load(**options)

    def unload(self) -> None:
        """Give the device's memory back."""
        for engine in self.experts.values():
            engine.unload()

    def prepare(self, context: Tensor) -> ExpertsContext:
        """The context of both experts; each is prepared when it first runs."""
        return ExpertsContext(context)

    def velocity(self, latents: Tensor, timestep: Tensor, context: ExpertsContext) -> Tensor:
        """The velocity of the timestep's expert. A timestep on a GPU is waited for: keep it on the
        CPU."""
        expert = self.expert(float(timestep))
        engine = self.experts[expert]
        if expert not in context.prepared:
            context.prepared[expert] = engine.prepare(context.embeddings)
        return engine.velocity(latents, timestep, context.prepared[expert])

    @property
    def built_sizes(self) -> tuple[BuiltSizes, ...]:
        """What both were built for."""
        sized = [e.built_sizes for e in self.experts.values() if supports(e, Sized)]
        return tuple(sizes for one in sized for sizes in one)

    def warmup(self, latent: tuple[int, int, int]) -> None:
        """One step of each on noise."""
        for engine in self.experts.values():
            if supports(engine, Warmable):
                engine.warmup(latent)

    def published_numerics(self, on: bool) -> None:
        """Float32 where the published code has it, or not."""
        for engine in self.experts.values():
            if supports(engine, PublishedNumerics):
                engine.published_numerics(on)

    def not_finite(self) -> list[str]:
        """Names of the parameters that hold NaN or infinity, by expert."""
        return [
            f"{name}:{parameter}"
            for name, engine in self.experts.items()
            if supports(engine, Diagnosable)
            for parameter in engine.not_finite()
        ]


def engines_by_name(engines: Mapping[str, Any]) -> dict[str, Any]:
    """Every engine of a pipeline by its name: experts one by one, as in "large:high"."""
    named: dict[str, Any] = {}
    for generator, engine in engines.items():
        if isinstance(engine, ExpertsEngine):
            named |= {engine_name(generator, e): one for e, one in engine.experts.items()}
        else:
            named[generator] = engine
    return named


def changed(engine: Any, change: Callable[[Any], Any]) -> Any:
    """A generator of changed engines, one or two."""
    return engine.each(change) if isinstance(engine, ExpertsEngine) else change(engine)


def boundaries(engines: Mapping[str, Any]) -> dict[str, float]:
    """The boundary of every generator that has experts."""
    return {n: e.boundary for n, e in engines.items() if isinstance(e, ExpertsEngine)}


def joined(engines: Mapping[str, Any]) -> dict[str, Any]:
    """Generators of exported engines by part: "large-high" and "large-low" become one."""
    generators: dict[str, Any] = {}
    for part, engine in engines.items():
        name, _, expert = part.partition("-")
        if not expert:
            generators[name] = engine
        elif name not in generators:
            experts = {e: engines[f"{name}-{e}"] for e in EXPERTS}
            boundary = engine.folder.manifest.options.get("boundary", 0)
            generators[name] = ExpertsEngine(experts, boundary)
    return generators


def change_loras(engines: Mapping[str, Any], asked: Mapping[str, Sequence[Lora]]) -> None:
    """Make these the LoRAs of generators "small" and "large", those of an expert its own.

    Raises:
        InputError: a generator that is not there or whose engine cannot change its weights; or a
            LoRA for an expert of a generator that has none.
        ModelError: a LoRA that does not fit; what was changed before it has its own again.
    """
    todo: list[tuple[Any, list[Lora]]] = []
    for name, loras in asked.items():
        if name not in engines:
            raise InputError(
                f"the {name} generator is not loaded; pass {name}= when loading.",
                code="missing",
                param=name,
            )
        engine = engines[name]
        experts = engine.experts if isinstance(engine, ExpertsEngine) else {"": engine}
        for one in experts.values():
            if not supports(one, Changeable):
                raise InputError(
                    f"the {name} generator is an exported engine, whose weights are inside its"
                    f" artefact; export it again with --{name}-lora, or run the generator in"
                    " PyTorch.",
                    code="unsupported",
                    param=f"{name}_lora",
                )
        own = loras_of(name, experts, loras)
        todo += [(one, own[expert]) for expert, one in experts.items()]
    done: list[tuple[Any, Sequence[Lora]]] = []
    try:
        for engine, loras in todo:
            before = engine.loaded.loras if engine.loaded else ()
            engine.set_loras(loras)
            done.append((engine, before))
    except NexusError:
        for engine, before in done:
            engine.set_loras(before)
        raise
