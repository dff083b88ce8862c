"""Steps recorded once as CUDA graphs and replayed: no launch is paid again, which is what small
steps wait for.

One graph for every shape of latents and context. Contexts are padded to a multiple of 64 tokens, so
that most prompts share a graph; padding has a bias of minus infinity and counts for nothing. All
graphs work in one pool of memory, as they never run at once, and a velocity leaves it by a copy.

A graph holds addresses. Whatever it reads is held beside it and ends with it: inputs, weights, and
what `nexus_rt.core.devices.hold` is told of while it is recorded, such as RoPE tables out of a
cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_rt.core.devices import on_device, recording
from nexus_rt.core.errors import InputError
from nexus_rt.engines.tensorrt import TensorRTSessions
from nexus_rt.engines.torch import TorchEngine
from nexus_rt.memory.offload import release
from nexus_rt.method.engine import Wrapper

TOKENS = 64  # contexts have a multiple of as many
KEPT = 4  # graphs an engine

Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Callable[[], None], Tensor]]


class _Pool:
    """The memory that the graphs of a device share. It ends with the last of them: PyTorch refuses
    to record into a pool that no graph holds."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


_pools: WeakValueDictionary[torch.device, _Pool] = WeakValueDictionary()


class Recorded:
    """A graph and the pool it holds; a call replays it."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: _Pool, device: torch.device) -> None:
        self.graph, self.pool, self.device = graph, pool, device

    def __call__(self) -> None:
        with on_device(self.device):
            self.graph.replay()


def capture(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record a call; returns what replays it and where its result will lie.

    Only this thread's launches are watched while it records: another thread may copy weights to the
    device beside it.
    """
    with on_device(device):
        pool = _pools.get(device)
        if pool is None:
            pool = _pools[device] = _Pool()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        # what a first call decides, compiles and allocates is not recorded
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # on a stream of this device: PyTorch's own is of the device it first recorded on
        with torch.cuda.graph(
            graph, pool=pool.handle, stream=side, capture_error_mode="thread_local"
        ):
            result = call()
        return Recorded(graph, pool, device), result


def mapped(context: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A context (a dataclass of tensors, lists of them and of contexts, and None) with every tensor
    changed."""
    new: dict[str, Any] = {}
    for f in fields(context):
        value = getattr(context, f.name)
        if isinstance(value, list):
            new[f.name] = [change(t) if isinstance(t, Tensor) else mapped(t, change) for t in value]
        elif isinstance(value, Tensor):
            new[f.name] = change(value)
    return replace(context, **new)


def padded(context: Any) -> Any:
    """A context with keys to the next multiple of `TOKENS`; one whose keys carry no bias is left
    alone, it is of Wan's one length."""
    if context.bias is None:
        return context
    short = -context.bias.shape[1] % TOKENS
    if not short:
        return context
    long = mapped(context, lambda t: F.pad(t, (0, 0, 0, 0, 0, short)) if t.ndim >= 4 else t)
    return replace(long, bias=F.pad(context.bias, (0, short), value=float("-inf")))


def tensors_of(context: Any) -> list[Tensor]:
    outputs: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        outputs.append(tensor)
        return tensor

    mapped(context, note)
    return outputs


@dataclass
class Recording:
    """A graph, the tensors it reads and writes, and the context whose values are in `static`."""

    replay: Callable[[], None]
    result: Tensor
    latents: Tensor
    timestep: Tensor
    static: Any
    context: Any
    held: list[Any]


class ReplayedEngine(Wrapper):
    """An engine whose velocities are replayed. What is not a velocity goes to the engine itself.

    Raises:
        InputError: an engine whose launches cannot be recorded.
    """

    def __init__(self, engine: Any, record: Capture = capture) -> None:
        if record is capture:
            why = cannot_replay(engine)
            if why:
                raise InputError(
                    f"CUDA graphs cannot be recorded here: {why}.",
                    code="unsupported",
                    param="cuda_graphs",
                )
        super().__init__(engine)
        self.record = record
        self.graphs: OrderedDict[tuple, Recording] = OrderedDict()

    def prepare(self, context: Tensor) -> Any:
        return padded(self.engine.prepare(context))

    def _forget(self) -> None:
        """Let go of the graphs and, with the last of a device's, of their memory."""
        if self.graphs:
            self.graphs.clear()
            release(self.engine.device)

    def published_numerics(self, on: bool) -> None:
        self._forget()  # they compute as they were recorded
        self.engine.published_numerics(on)

    def set_loras(self, loras: Any) -> None:
        self._forget()  # products beside quantised layers are other launches
        self.engine.set_loras(loras)

    def unload(self) -> None:
        self._forget()  # they hold the addresses of the weights
        self.engine.unload()

    def velocity(self, latents: Tensor, timestep: Tensor, context: Any) -> Tensor:
        model = getattr(self.engine, "model", None)
        if model is not None and model.stream is not None:  # streamed weights have no one address
            return self.engine.velocity(latents, timestep, context)
        self.engine.load()
        shapes = (tuple(t.shape) for t in tensors_of(context))
        # LoRAs beside quantised layers are other launches, whoever changed them
        key = (tuple(latents.shape), *shapes, getattr(self._loaded(), "loras", ()))
        if key not in self.graphs:
            self.graphs[key], velocity = self._record(latents, timestep, context)
            if len(self.graphs) > KEPT:
                self.graphs.popitem(last=False)
            if velocity is not None:
                return velocity
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        graph.latents.copy_(latents)
        graph.timestep.copy_(timestep.reshape(()))
        if graph.context is not context:
            pairs = zip(tensors_of(graph.static), tensors_of(context), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)
            graph.context = context
        graph.replay()
        return graph.result.clone()

    def warmup(self, latent: tuple[int, int, int], batch: int = 2, tokens: int = 24) -> None:
        """The engine's own warm-up, its step recorded."""
        type(self.wrapped).warmup(self, latent, batch, tokens)

    def _loaded(self) -> Any:
        return getattr(self.engine, "loaded", None)

    def _record(
        self, latents: Tensor, timestep: Tensor, context: Any
    ) -> tuple[Recording, Tensor | None]:
        """A graph of this step, and the velocity of the call that warmed it up; None where none was
        computed."""
        x, t = latents.clone(), timestep.reshape(()).float().clone()
        static = mapped(context, Tensor.clone)
        velocities: list[Tensor] = []
        calls = 0

        def call() -> Tensor:
            nonlocal calls
            calls += 1
            velocity = self.engine.velocity(x, t, static)
            if calls == 1:  # the graph's own result is never kept: its memory is the pool's
                velocities.append(velocity)
            return velocity

        # the storages of today: a parameter that moves points to another
        held: list[Any] = [w.detach() for w in self._weights()]
        with recording(held):
            replay, result = self.record(call, self.engine.device)
        graph = Recording(replay, result, x, t, static, context, held)
        return graph, velocities[0] if calls > 1 else None

    def _weights(self) -> Iterator[Tensor]:
        model = getattr(self.engine, "model", None)
        return iter(()) if model is None else chain(model.parameters(), model.buffers())


def cannot_replay(engine: Any) -> str | None:
    """Why an engine's velocities cannot be recorded; None where they can."""
    if engine.device.type != "cuda":
        return f"they are of a CUDA device, and the engine runs on {engine.device.type}"
    sessions = getattr(engine, "sessions", None)
    if not isinstance(engine, TorchEngine) and not isinstance(sessions, TensorRTSessions):
        backend = sessions.folder.manifest.backend if sessions else type(engine).__name__
        return (
            f"{backend} engines launch on streams of their own; torch, tensorrt and tensorrt-rtx"
            " engines can be"
        )
    return None
