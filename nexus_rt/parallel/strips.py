"""Decoding on several GPUs: each has a strip of rows of every plane, and borrows a row from its
neighbours before every convolution, so that the picture is that of one GPU. Attention within
frames, at an eighth of the size, is computed whole by all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_rt.parallel.layout import Mesh, split_range


class Strips:
    """A group's rows, and what passes between neighbours."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.count, self.place = mesh, mesh.size("all"), mesh.places["all"]
        self.rows = 0  # of the latents that are being decoded

    def widened(self, x: Tensor, rows: int = 1) -> Tensor:
        """[..., H, W] with the neighbours' nearest rows above and below; zeros at the edges."""
        if not rows:
            return x
        top, bottom = (part.contiguous() for part in (x[..., :rows, :], x[..., -rows:, :]))
        above, below = torch.zeros_like(top), torch.zeros_like(bottom)
        group = self.mesh.groups["all"]
        send, receive = [], []
        for neighbour, mine, theirs in (
            (self.place - 1, top, above),
            (self.place + 1, bottom, below),
        ):
            if 0 <= neighbour < self.count:
                rank = dist.get_global_rank(group, neighbour)
                send.append(dist.P2POp(dist.isend, mine, rank, group))
                receive.append(dist.P2POp(dist.irecv, theirs, rank, group))
        for work in dist.batch_isend_irecv([*send, *receive]) if send else ():
            work.wait()
        return torch.cat([above, x, below], -2)

    def own(self, x: Tensor) -> Tensor:
        """This process's rows of [..., H, W]."""
        first, last = list(split_range(x.shape[-2], self.count))[self.place]
        return x[..., first:last, :].contiguous()

    def heights(self, x: Tensor) -> list[int]:
        """Rows of every process, of the height of its own."""
        shares = [last - first for first, last in split_range(self.rows, self.count)]
        return [share * x.shape[-2] // shares[self.place] for share in shares]

    def whole(self, x: Tensor) -> Tensor:
        """All rows of [..., H, W]; strips may differ in height."""
        heights = self.heights(x)
        padded = F.pad(x, (0, 0, 0, max(heights) - x.shape[-2]))
        strips = self.mesh.gathered(padded, "all")
        return torch.cat([s[..., :h, :] for s, h in zip(strips, heights, strict=True)], -2)

    def decode(self, vae: Any, z: Tensor) -> Tensor:
        """`vae.decode` of latents [B, C, T, H, W], each process a strip of the rows; the whole
        video in all of them."""
        if z.shape[-2] < self.count:  # fewer rows than processes
            return vae.decode(z, return_dict=False)[0]
        self.rows = z.shape[-2]
        forwards = cut_forwards(vae, self)
        try:
            for module, forward in forwards.items():
                module.forward = forward  # type: ignore[method-assign]
            return self.whole(vae.decode(self.own(z), return_dict=False)[0])
        finally:
            for module in forwards:
                vars(module).pop("forward", None)  # the class's own shows again


def cut_forwards(vae: Any, strips: Strips) -> dict[nn.Module, Any]:
    """What the convolutions and the attention of a decoder compute on strips."""
    forwards: dict[nn.Module, Any] = {}
    for module in vae.decoder.modules():
        kind = type(module).__name__
        if kind == "WanAttentionBlock":
            forwards[module] = _attended(module, strips)
        elif isinstance(module, nn.Conv3d) and hasattr(module, "_padding"):
            if module.kernel_size[1] > 1:
                forwards[module] = _convolved_3d(module, strips)
        elif isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            forwards[module] = _convolved_2d(module, strips)
    return forwards


def _convolved_3d(conv: Any, strips: Strips) -> Any:
    left, right, top, _, before, _ = conv._padding

    def forward(x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        missing = before
        if cache_x is not None and before:
            x = torch.cat([cache_x.to(x.device), x], 2)
            missing = before - cache_x.shape[2]
        x = F.pad(strips.widened(x, top), (left, right, 0, 0, missing, 0))
        return F.conv3d(x, conv.weight, conv.bias)

    return forward


def _convolved_2d(conv: nn.Conv2d, strips: Strips) -> Any:
    rows, columns = (int(p) for p in conv.padding)

    def forward(x: Tensor) -> Tensor:
        return F.conv2d(strips.widened(x, rows), conv.weight, conv.bias, padding=(0, columns))

    return forward


def _attended(block: Any, strips: Strips) -> Any:
    whole = type(block).forward

    def forward(x: Tensor) -> Tensor:
        first = sum(strips.heights(x)[: strips.place])
        return whole(block, strips.whole(x))[..., first : first + x.shape[-2], :]

    return forward
