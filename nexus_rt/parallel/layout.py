"""Which process does what: the numbers a user names, and the mesh they make of the processes."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_rt.core.devices import as_device
from nexus_rt.core.errors import InputError, choose
from nexus_rt.parallel.watch import Watch

STARTED_BY = "torchrun --nproc-per-node {count} -m nexus_rt.cli ... --parallel {text}"
TIMEOUT = timedelta(minutes=30)  # of a collective: a first step may compile


@dataclass(frozen=True)
class Layout:
    """How many processes share each kind of work.

    pair: 2, the small generator on one half and the large on the other. cfg: 2, the conditional
    samples on one half and the unconditional on the other. ulysses: the tokens of a sample, their
    heads while they attend. All of them share the VAE's rows.
    """

    pair: int = 1
    cfg: int = 1
    ulysses: int = 1

    @property
    def size(self) -> int:
        """Processes in all."""
        return math.prod(astuple(self))

    def __str__(self) -> str:
        named = [f"{f.name}={n}" for f in fields(self) if (n := getattr(self, f.name)) > 1]
        return ",".join(named) or "cfg=1"


def parse_layout(text: str) -> Layout:
    """ "cfg=2,ulysses=2".

    Raises:
        InputError: another name, twice the same, or a number that it does not take.
    """
    given: dict[str, int] = {}
    for part in str(text).split(","):
        name, _, number = part.strip().partition("=")
        choose("parallel dimension", name, [f.name for f in fields(Layout)])
        if name in given:
            raise InputError(
                f"parallel {text!r} names {name} twice.", code="duplicate", param="parallel"
            )
        if not re.fullmatch("[0-9]{1,4}", number) or not 1 <= int(number) <= 1024:
            raise InputError(
                f"parallel {text!r}: {name} has {number or 'no number'!r}; expected a whole number,"
                " such as cfg=2,ulysses=4.",
                param="parallel",
            )
        given[name] = int(number)
        if name != "ulysses" and given[name] > 2:
            shared = "generators" if name == "pair" else "halves of a guided step"
            raise InputError(
                f"parallel {text!r}: {name} is {number}; there are two {shared} to share, so at"
                " most 2.",
                code="out_of_range",
                param="parallel",
            )
    return Layout(**given)


@dataclass
class Mesh:
    """The processes of a call, and the groups that this one shares each kind of work with.

    groups, places: under "pair", "cfg", "ulysses" and "all"; a place is this process's in the
        group. watch: says that this process is there, and whether the others are.
    """

    layout: Layout
    device: torch.device
    groups: dict[str, Any]
    places: dict[str, int]
    watch: Watch | None = None

    @property
    def rank(self) -> int:
        """This process's number; 0 writes what is asked for."""
        return self.places["all"]

    def size(self, name: str) -> int:
        """Processes of a group."""
        return self.layout.size if name == "all" else getattr(self.layout, name)

    def gathered(self, tensor: Tensor, name: str) -> list[Tensor]:
        """The tensors of a group's processes, all of one shape, in the order of their places."""
        out = [torch.empty_like(tensor) for _ in range(self.size(name))]
        dist.all_gather(out, tensor.contiguous(), group=self.groups[name])
        return out

    def broadcast(self, tensor: Tensor, place: int, name: str) -> Tensor:
        """The tensor of the process at a place, in every process's own."""
        group = self.groups[name]
        dist.broadcast(tensor, dist.get_global_rank(group, place), group=group)
        return tensor

    def same(self, number: int) -> int:
        """The first process's number, in all of them."""
        held = torch.tensor([number], dtype=torch.int64, device=self.device)
        return int(self.broadcast(held, 0, "all"))


def make_mesh(layout: Layout, device: torch.device | None = None) -> Mesh:
    """The mesh of this process, which `torchrun` or the like has started beside the others.

    device: by default the GPU of this process's number on its machine, else the CPU. A default
        process group is made where there is none: NCCL between GPUs, gloo between CPUs.

    Raises:
        InputError: not started so, or beside another number of processes.
    """
    if not dist.is_available():
        raise InputError(
            "this PyTorch is built without torch.distributed, which parallel needs.",
            code="unsupported",
            param="parallel",
        )
    if not dist.is_initialized() and "WORLD_SIZE" not in os.environ:
        started = STARTED_BY.format(count=layout.size, text=layout)
        raise InputError(
            f"parallel {layout} runs in {layout.size} processes, and this one was started alone;"
            f" start them with: {started}",
            code="missing",
            param="parallel",
        )
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    if world != layout.size:
        raise InputError(
            f"parallel {layout} needs {layout.size} processes, and there are {world}; start as"
            f" many (torchrun --nproc-per-node {layout.size}), or change it.",
            code="mismatch",
            param="parallel",
        )
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    from torch.distributed.device_mesh import init_device_mesh

    names = tuple(f.name for f in fields(Layout))
    mesh = init_device_mesh(device.type, astuple(layout), mesh_dim_names=names)
    groups: dict[str, Any] = {name: mesh.get_group(name) for name in names}
    groups["all"] = dist.group.WORLD
    places = {name: dist.get_rank(group) for name, group in groups.items()}
    return Mesh(layout, device, groups, places)


def mesh_of(parallel: str | None, device: str | torch.device | None) -> Mesh | None:
    """The mesh that "cfg=2,ulysses=2" asks for; None where nothing is."""
    if parallel is None:
        return None
    layout = parse_layout(parallel)
    mesh = make_mesh(layout, None if device is None else as_device("device", device))
    mesh.watch = Watch.begin(mesh.rank, mesh.layout.size)
    return mesh


@contextlib.contextmanager
def broadcast_failure(mesh: Mesh | None) -> Iterator[None]:
    """What is raised here is told to the other processes; one that waits in vain for another raises
    why that is gone."""
    try:
        yield
    except BaseException as error:
        if mesh is None or mesh.watch is None:
            raise
        raise mesh.watch.failed(error) from error


def split_range(count: int, among: int) -> Iterator[tuple[int, int]]:
    """First and last of every share of `count` things, which differ by one at most."""
    for i in range(among):
        yield i * count // among, (i + 1) * count // among
