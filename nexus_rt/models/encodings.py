"""How checkpoints store weights in fewer bits: values beside scales, and GGUF's blocks.

An encoding turns stored bytes into float32 on any device, for a whole tensor or for some of its
rows: rows are stored one after another in all of them. Layouts are those of ggml
(`ggml-common.h`), ComfyUI (QUANTIZATION.md; rotations as comfy-kitchen and ConvRot,
arXiv:2512.03673, make them) and LightX2V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaled:
    """8-bit values times scales: one for all, one a row, or one a block.

    name: of the format, for reports. scale: float32, [] or [N, 1] (a 1 for each further axis of
    the weight), or one for each `block` of rows and columns (the last ones may be cut short).
    rotation: columns of a group that is rotated, of `ROTATIONS`.
    """

    name: str
    scale: Tensor
    block: tuple[int, int] | None = None
    rotation: int | None = None

    def decode(self, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Stored values to float32 of `shape`, [N, K] or, without blocks, any."""
        scale = self.scale.to(raw.device)
        if self.block is not None:
            for axis, size in enumerate(self.block):
                scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
        weight = raw.reshape(shape).float() * scale
        return weight if self.rotation is None else rotated(weight, self.rotation)


# sizes of a group that is rotated: powers of 4
ROTATIONS = (4, 16, 64, 256, 1024, 4096)


def rotated(weight: Tensor, group: int) -> Tensor:
    """Rows [N, K] times the regular Hadamard matrix in groups of columns: ConvRot's rotation, and
    its inverse, as the matrix is symmetric and orthogonal.

    The matrix is the Kronecker power of H4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1],
    [-1, 1, 1, 1]] / 2, whose product with x is sum(x) / 2 - reversed(x): one such step for each
    power, and no matrix.
    """
    powers = ROTATIONS.index(group) + 1
    out = weight.unflatten(-1, (-1, *[4] * powers))
    for axis in range(-powers, 0):
        out = out.sum(axis, keepdim=True) / 2 - out.flip(axis)
    return out.reshape(weight.shape)


@dataclass(frozen=True)
class Blocks:
    """GGUF's blocks along a row: `values` weights in `size` bytes.

    halves: bytes at which a block's float16 scales begin; the rest are whole numbers.
    """

    name: str
    values: int
    size: int
    unpack: Callable[[Tensor], Tensor]
    halves: tuple[int, ...] = (0,)

    def decode(self, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Stored bytes, uint8, to float32 of `shape`."""
        return self.unpack(raw.reshape(-1, self.size)).view(shape)

    def scales(self, raw: Tensor) -> list[Tensor]:
        """The float16 scales of all blocks, as float32: the weights are finite where these are."""
        blocks = raw.reshape(-1, self.size)
        return [_half(blocks, at) for at in self.halves]


Encoding = Scaled | Blocks


def _half(blocks: Tensor, at: int) -> Tensor:
    """float16 numbers [n, 1] at a place of every block, as float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(qs: Tensor) -> Tensor:
    """Bytes [n, g, b] to values [n, g, 2 b]: all low halves, then all high ones."""
    return torch.cat([qs & 15, qs >> 4], -1)


def _bits(packed: Tensor, shifts: int, width: int) -> Tensor:
    """Bytes [n, b] to fields [n, shifts, b] of `width` bits each."""
    by = torch.arange(0, shifts * width, width, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> by[:, None]) & ((1 << width) - 1)


def _q8_0(b: Tensor) -> Tensor:
    return _half(b, 0) * b[:, 2:].contiguous().view(torch.int8).float()


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _nibbles(b[:, 4:]).float() + _half(b, 2)


def _fifth(high: Tensor) -> Tensor:
    """The fifth bits [n, 32] of Q5_0 and Q5_1, worth 16."""
    by = torch.arange(8, dtype=torch.uint8, device=high.device)
    return ((high[:, :, None] >> by) & 1).flatten(1) << 4


def _q5_0(b: Tensor) -> Tensor:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth(b[:, 2:6])).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth(b[:, 4:8])).float() + _half(b, 2)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and eight minima of Q4_K and Q5_K from twelve bytes [n, 12], each [n, 8,
    1]."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], 1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], 1)
    return scales[..., None].float(), minima[..., None].float()


def _k_values(b: Tensor, at: int) -> Tensor:
    """Four-bit values [n, 8, 32] of Q4_K and Q5_K from byte `at` on."""
    return _nibbles(b[:, at:].unflatten(1, (4, 32))).view(len(b), 8, 32)


def _q4_k(b: Tensor) -> Tensor:
    scales, minima = _six_bits(b[:, 4:16])
    d, low = _half(b, 0)[..., None] * scales, _half(b, 2)[..., None] * minima
    return d * _k_values(b, 16).float() - low


def _q5_k(b: Tensor) -> Tensor:
    scales, minima = _six_bits(b[:, 4:16])
    d, low = _half(b, 0)[..., None] * scales, _half(b, 2)[..., None] * minima
    return d * (_k_values(b, 48) | (_bits(b[:, 16:48], 8, 1) << 4)).float() - low


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128].unflatten(1, (2, 64)))  # [n, 2, 128]
    high = _bits(b[:, 128:192].reshape(-1, 32), 4, 2).view(len(b), 2, 128)
    q = (low | (high << 4)).view(len(b), 16, 16).float() - 32
    scales = b[:, 192:208].contiguous().view(torch.int8).float()[..., None]
    return _half(b, 208)[..., None] * scales * q


def _q3_k(b: Tensor) -> Tensor:
    low = _bits(b[:, 32:96].reshape(-1, 32), 4, 2).view(len(b), 16, 16).float()
    high = _bits(b[:, :32], 8, 1).view(len(b), 16, 16).float()
    packed = b[:, 96:108]
    scales = _nibbles(packed[:, :8]) | (_bits(packed[:, 8:], 4, 2).flatten(1) << 4)
    scales = (scales.float() - 32)[..., None]
    return _half(b, 108)[..., None] * scales * (low + 4 * high - 4)


def _q2_k(b: Tensor) -> Tensor:
    q = _bits(b[:, 16:80].reshape(-1, 32), 4, 2).view(len(b), 16, 16).float()
    scales = b[:, :16, None]
    d, low = _half(b, 80)[..., None], _half(b, 82)[..., None]
    return d * (scales & 15).float() * q - low * (scales >> 4).float()


GGUF_BLOCKS = {
    e.name: e
    for e in (
        Blocks("Q8_0", 32, 34, _q8_0),
        Blocks("Q4_0", 32, 18, _q4_0),
        Blocks("Q4_1", 32, 20, _q4_1, (0, 2)),
        Blocks("Q5_0", 32, 22, _q5_0),
        Blocks("Q5_1", 32, 24, _q5_1, (0, 2)),
        Blocks("Q2_K", 256, 84, _q2_k, (80, 82)),
        Blocks("Q3_K", 256, 110, _q3_k, (108,)),
        Blocks("Q4_K", 256, 144, _q4_k, (0, 2)),
        Blocks("Q5_K", 256, 176, _q5_k, (0, 2)),
        Blocks("Q6_K", 256, 210, _q6_k, (208,)),
    )
}
