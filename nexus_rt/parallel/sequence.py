"""The tokens of a sample on several GPUs (DeepSpeed-Ulysses, arXiv 2309.14509).

Each process has a run of the tokens and computes everything of them but self-attention, for which
they change places: all tokens of some heads, and back. A number of tokens that the processes do not
divide is filled up with zeros at the end, which leave before they could be attended to.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nexus_rt.core.errors import InputError
from nexus_rt.parallel.layout import Mesh


def check_heads(count: int, heads: int) -> None:
    """Raise an `InputError` unless so many processes can share a transformer's heads."""
    if heads % count:
        fit = [n for n in range(2, heads + 1) if heads % n == 0]
        raise InputError(
            f"ulysses={count} shares {heads} heads, which it does not divide; take one of"
            f" {', '.join(map(str, fit))}.",
            code="mismatch",
            param="parallel",
        )


class Sequence:
    """A transformer's share of the tokens. length: of all tokens of the forward that runs."""

    def __init__(self, mesh: Mesh, heads: int) -> None:
        self.mesh, self.count, self.place = mesh, mesh.size("ulysses"), mesh.places["ulysses"]
        self.length = 0
        check_heads(self.count, heads)

    def own(self, t: Tensor, axis: int) -> Tensor:
        """This process's run of the tokens along an axis, zeros past the last."""
        length = t.shape[axis]
        share = -(-length // self.count)
        first = min(length, self.place * share)
        part = t.narrow(axis, first, min(length, first + share) - first)
        missing = share - part.shape[axis]
        if not missing:
            return part.contiguous()
        after = [0, 0] * (t.ndim - 1 - axis)
        return F.pad(part, (*after, 0, missing))

    def whole(self, t: Tensor) -> Tensor:
        """[N, share, ...] of every process as [N, length, ...]."""
        return torch.cat(self.mesh.gathered(t, "ulysses"), 1)[:, : self.length]

    def heads(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        """Tensors [N, share, heads, D] of these tokens as [N, length, heads / count, D] of all."""
        stacked = torch.stack(parts)  # [P, N, share, heads, D]
        sent = stacked.unflatten(3, (self.count, -1)).movedim(3, 0)
        got = self._exchanged(sent)  # [count, P, N, share, own heads, D], by the tokens' owner
        tokens = got.movedim(0, 2).flatten(2, 3)[:, :, : self.length]
        return list(tokens.unbind(0))

    def tokens(self, out: Tensor) -> Tensor:
        """[N, length, heads / count, D] of all tokens as [N, share, heads, D] of these."""
        short = -out.shape[1] % self.count
        out = F.pad(out, (0, 0, 0, 0, 0, short)) if short else out
        got = self._exchanged(out.unflatten(1, (self.count, -1)).movedim(1, 0))
        return got.movedim(0, 2).flatten(2, 3)  # heads by their owner

    def _exchanged(self, sent: Tensor) -> Tensor:
        """Piece i of the first axis to process i; of what came, piece j is from process j."""
        sent = sent.contiguous()
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.mesh.groups["ulysses"])
        return got
