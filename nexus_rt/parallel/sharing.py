"""A pipeline whose calls are shared by several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from nexus_rt.components.vae import VideoDecoder
from nexus_rt.core.errors import InputError
from nexus_rt.engines.cuda_graphs import ReplayedEngine
from nexus_rt.engines.experts import changed, engines_by_name
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.memory.offload import release
from nexus_rt.parallel.engines import GuidanceParallel, RemoteEngine, SharedGenerator
from nexus_rt.parallel.layout import Mesh
from nexus_rt.parallel.sequence import Sequence
from nexus_rt.parallel.strips import Strips
from nexus_rt.parallel.watch import Watch

Made = TypeVar("Made")
OWNERS = {"small": 0, "large": 1}  # places in the pair


class Parallel:
    """What the processes of a pipeline agree on."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        mesh.watch = mesh.watch or Watch.begin(mesh.rank, mesh.layout.size)
        self.watch = mesh.watch

    @property
    def first(self) -> bool:
        """Whether this process writes what is asked for."""
        return self.mesh.rank == 0

    def close(self) -> None:
        """This process has done its share."""
        self.watch.close()
        dist.destroy_process_group()

    def of_first(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, in all of them: answers of a service may differ."""
        held = [make() if self.first else None]
        dist.broadcast_object_list(held, 0)
        return cast(Made, held[0])

    def generator(self) -> torch.Generator:
        """One that draws the same numbers in every process, seeded afresh."""
        seed = self.mesh.same(int(torch.randint(2**62, ()).item()))
        return torch.Generator().manual_seed(seed)


def share(
    mesh: Mesh, engines: dict[str, Any], decoder: Any, channels: int, budget: int | None
) -> Parallel:
    """Let the calls of a pipeline be shared. Every process makes the same calls.

    Args:
        engines: by generator, "small" and "large"; changed in place.
        decoder: of the VAE; None where there is none. channels: of the latents.
        budget: bytes of memory within which engines come and go; None where they stay.

    Raises:
        InputError: something of it cannot be shared so; names it.
    """
    layout = mesh.layout
    if layout.ulysses > 1:
        for name, engine in engines_by_name(engines).items():
            _split_tokens(name, engine, mesh)
    if layout.pair > 1:
        _check_pair(engines, budget)
    for name, engine in engines.items():
        if layout.cfg > 1:
            engine = changed(engine, partial(GuidanceParallel, mesh=mesh))
        if layout.pair > 1:
            engine = changed(
                engine, partial(_shared, owner=OWNERS[name], mesh=mesh, channels=channels)
            )
        engines[name] = engine
    if layout.pair > 1:
        release(mesh.device)
    if isinstance(decoder, VideoDecoder):
        decoder.strips = Strips(mesh)
    return Parallel(mesh)


def _split_tokens(name: str, engine: Any, mesh: Mesh) -> None:
    if isinstance(engine, ReplayedEngine):
        raise InputError(
            "ulysses exchanges tokens inside of a step, which CUDA graphs do not record; leave"
            " cuda_graphs out, or share the step by cfg=2.",
            code="conflict",
            param="cuda_graphs",
        )
    if not isinstance(engine, TorchEngine):
        raise InputError(
            f"ulysses shares the tokens of generators in PyTorch, and the {name} one is an exported"
            " engine, which holds all of them; share it by cfg=2 or pair=2.",
            code="unsupported",
            param="parallel",
        )
    engine.model.share_tokens(Sequence(mesh, engine.model.config.num_attention_heads))


def _check_pair(engines: Mapping[str, Any], budget: int | None) -> None:
    missing = [name for name in OWNERS if name not in engines]
    if missing:
        raise InputError(
            f"pair=2 puts one generator on each half, and the {missing[0]} one is not loaded.",
            code="missing",
            param=missing[0],
        )
    if budget is not None:
        raise InputError(
            "pair=2 leaves each generator where it runs, and vram has them come and go; leave one"
            " of them out.",
            code="conflict",
            param="vram",
        )


def _shared(engine: Any, owner: int, mesh: Mesh, channels: int) -> SharedGenerator:
    """A generator where it is had; elsewhere its place, its weights freed."""
    if mesh.places["pair"] != owner:
        engine = RemoteEngine(engine.device)
    return SharedGenerator(engine, owner, mesh, channels)
