"""Tensors that cross between a host and a GPU without either waiting, the current GPU, and the
objects that a recorded graph reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from nexus_rt.core.errors import InputError, shorten, shown

T = TypeVar("T")
PLACES = 64  # numbers on their way at a time


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which a GPU is the current one; nothing where it is already, or on a CPU.

    Launches, events and streams go to the current device, wherever the tensors lie.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_held: ContextVar[list[Any] | None] = ContextVar("_held", default=None)


@contextlib.contextmanager
def recording(held: list[Any]) -> Iterator[None]:
    """In this thread a call is recorded as a graph, which holds addresses and no tensors: what
    `hold` is told of is added to `held`, to live as long as the graph."""
    token = _held.set(held)
    try:
        yield
    finally:
        _held.reset(token)


def hold(thing: T) -> T:
    """The same tensor, tensors or object, kept by the graph that is being recorded, if any.

    Whatever a step reads and a cache may drop goes through here.
    """
    if torch.compiler.is_compiling():  # a compiler does not trace context variables
        return thing
    held = _held.get()
    if held is not None and not any(kept is thing for kept in held):
        held.append(thing)
    return thing


def held_by_recording() -> list[Any] | None:
    """What the graph that this thread records, or warms up, holds; None where there is none."""
    return _held.get()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for what the device still does.

    A copy from pageable memory would wait; pinned memory is not given out again before it is read.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Arrival:
    """A tensor that a device is still computing. host: where it will lie in host memory."""

    def __init__(self, host: Tensor, done: torch.cuda.Event | None) -> None:
        self.host, self.done = host, done

    @property
    def ready(self) -> bool:
        """Whether it can be had without waiting."""
        return self.done is None or self.done.query()

    def tensor(self) -> Tensor:
        """The tensor on the host, waited for where it is not ready."""
        if self.done is not None:
            self.done.synchronize()
        return self.host


class Reading(Arrival):
    """An arriving tensor of one element."""

    def value(self) -> float:
        """The number, waited for where it is not ready."""
        return float(self.tensor())


def fetch(tensor: Tensor) -> Arrival:
    """Begin to copy a tensor to pinned memory, behind the work that makes it."""
    if not tensor.is_cuda:
        return Arrival(tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return Arrival(host, _event(tensor.device))


def _event(device: torch.device) -> torch.cuda.Event:
    """An event behind what a device's current stream has been given."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    return done


class Readings:
    """Numbers read from a device a while after they were asked for: each is copied to pinned memory
    behind the work that makes it, and an event says when it is there."""

    def __init__(self) -> None:
        self.pinned: Tensor | None = None
        self.taken: list[Reading | None] = [None] * PLACES
        self.next = 0

    def start(self, number: Tensor) -> Reading:
        """Begin to read a tensor of one element, float32."""
        if not number.is_cuda:
            return Reading(number, None)
        if self.pinned is None:
            self.pinned = torch.empty(PLACES, dtype=torch.float32, pin_memory=True)
        at, self.next = self.next, (self.next + 1) % PLACES
        before = self.taken[at]
        if before is not None and before.done is not None:
            before.done.synchronize()  # its reader is too late; the place is used again
        place = self.pinned[at]
        place.copy_(number.reshape(()), non_blocking=True)
        reading = self.taken[at] = Reading(place, _event(number.device))
        return reading


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def as_device(name: str, value: Any) -> torch.device:
    """A device that tensors can be on here. No memory of a GPU is touched.

    Raises:
        InputError: no device's name, or one that this machine or PyTorch does not have.
    """
    why = "expected a name such as 'cpu', 'cuda' or 'cuda:1'"
    if isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
        try:
            device = torch.device(value)
            why = _no_device(device)
        except Exception as error:  # torch's backends raise nearly everything
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not why:
            return torch.device("cpu") if device.type == "cpu" else device
    raise InputError(
        f"{name} {shown(value, 60)} cannot be used here ({shorten(why, 200)}); `nexus-rt doctor`"
        f" lists"
        " what can.",
        code="not_found",
        param=name,
    )


def _no_device(device: torch.device) -> str:
    """Why tensors cannot be on a device; "" where they can."""
    if device.type == "meta":
        return "its tensors have no values"
    if device.type in ("cpu", "cuda"):
        there = torch.cuda.device_count() if device.type == "cuda" else 1
        if not there:
            return "no CUDA device" if torch.version.cuda else "this PyTorch build has no CUDA"
        return "" if (device.index or 0) < there else f"there are {there} of this kind"
    torch.zeros(1, device=device).cpu()
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def as_dtype(name: str, value: Any) -> torch.dtype:
    """A dtype that models compute in.

    Raises:
        InputError: no dtype of torch, or none of those.
    """
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        spelt = str(value).removeprefix("torch.") if isinstance(value, str) else ""
        close = spelt if spelt in map(dtype_name, DTYPES) else "bfloat16"
        raise InputError(
            f"{name} is {shown(value)}; expected a dtype of torch's, such as torch.{close}"
            f" ({', '.join(map(str, DTYPES))}).",
            code="invalid_type" if not isinstance(value, torch.dtype) else "unsupported",
            param=name,
        )
    return value
