"""The gaussian split's blend in one pass: guidance of both generators, the filter, the gate, and
the sums that energy needs.

    v = v_u + g (v_c - v_u)                         each generator, where it is guided
    u = share v_L + keep v_S + low LF(v_S)          LF: a separable 3 x 3 stencil, zero padding
    sums of v_S^2, v_L^2 and u^2, one number a program

The scalars are the gate's: `u = (1-w) v_L + w (gamma v_S + (1-gamma) LF_S)` has share = 1-w, keep =
w gamma and low = w (1-gamma). The energy factor needs the whole of u, so the consumer applies it:
`solver_step` reduces the sums as it starts. They are not added atomically, so a result does not
depend on the order in which programs end.

Bytes: each prediction once (2 or 4 bytes), u once (4 bytes): both generators guided in bfloat16, 12
bytes an element; 58 MB at 720p x 81 frames. Flops: about 20 an element: the copy bandwidth is the
roof. `band_filter` does the other splits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_rt.kernels.formulas import guide
from nexus_rt.kernels.triton_op import DTYPES, Variant, check_tensor, kernel_op, launch, tl, triton

MAX_WIDTH = 4096  # of the stencil: a row of a plane lies in one warp
MAX_SIDE = 1 << 15  # a plane is indexed in 32 bits

if triton is not None:

    @triton.jit
    def guided(c_ptr, u_ptr, at, mask, scale, GUIDED: tl.constexpr):
        """A generator's velocity: float32 of its prediction, guided where it has two."""
        v = tl.load(c_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if GUIDED:
            base = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            v = base + scale * (v - base)
        return v

    @triton.jit
    def _stencil_kernel(
        small_c,  # [B, planes, H, W]
        small_u,  # the same, or unused
        large_c,  # the same, or unused
        large_u,  # the same, or unused
        u_ptr,  # [B, planes, H, W] float32
        sums_ptr,  # [3, programs] float32
        planes,  # of a sample
        programs,  # of the grid
        scale_small,
        scale_large,
        share_large,
        keep,
        low,
        side,  # the taps are (side, 1 - 2 side, side) both ways
        H: tl.constexpr,
        W: tl.constexpr,
        SEGMENT: tl.constexpr,  # a warp's elements: the same row of PACK planes
        PACK: tl.constexpr,
        WARPS: tl.constexpr,
        ROWS: tl.constexpr,
        GUIDED_SMALL: tl.constexpr,
        HAS_LARGE: tl.constexpr,
        GUIDED_LARGE: tl.constexpr,
    ):
        place = tl.arange(0, SEGMENT)[None, :]
        column = place % W
        plane = (tl.program_id(0) * WARPS + tl.arange(0, WARPS)[:, None]) * PACK + place // W
        known = (place < PACK * W) & (plane < planes)
        first = tl.program_id(1) * ROWS
        sample = tl.program_id(2).to(tl.int64)
        at = (sample * planes + plane) * (H * W) + first * W + column
        # Down the columns the neighbours come from rows that are loaded once each and kept; along a
        # row from the threads beside: a load shifted by one element could not be 16 bytes wide.
        index = tl.zeros([WARPS, SEGMENT], tl.int32) + place
        before, after = tl.maximum(index - 1, 0), tl.minimum(index + 1, SEGMENT - 1)
        middle = 1.0 - 2.0 * side
        side_before, side_after = (
            tl.where(column > 0, side, 0.0),
            tl.where(column + 1 < W, side, 0.0),
        )
        above = guided(small_c, small_u, at - W, known & (first > 0), scale_small, GUIDED_SMALL)
        here = guided(small_c, small_u, at, known, scale_small, GUIDED_SMALL)
        sum_small = tl.zeros([WARPS, SEGMENT], tl.float32)
        sum_large = tl.zeros([WARPS, SEGMENT], tl.float32)
        sum_u = tl.zeros([WARPS, SEGMENT], tl.float32)
        for r in tl.static_range(0, ROWS):
            inside = known & (first + r < H)
            below = guided(
                small_c, small_u, at + W, known & (first + r + 1 < H), scale_small, GUIDED_SMALL
            )
            vertical = middle * here + side * (above + below)
            around = side_before * tl.gather(vertical, before, 1) + side_after * tl.gather(
                vertical, after, 1
            )
            u = keep * here + low * (middle * vertical + around)
            if HAS_LARGE:
                v_large = guided(large_c, large_u, at, inside, scale_large, GUIDED_LARGE)
                u += share_large * v_large
                sum_large += v_large * v_large
            sum_small += here * here
            # beyond the last row the filter still sees the one above
            sum_u += tl.where(inside, u * u, 0.0)
            tl.store(u_ptr + at, u, mask=inside)
            above = here
            here = below
            at += W
        number = (sample * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(
            1
        ) + tl.program_id(1)
        tl.store(sums_ptr + number, tl.sum(sum_small))
        tl.store(sums_ptr + programs + number, tl.sum(sum_large))
        tl.store(sums_ptr + 2 * programs.to(tl.int64) + number, tl.sum(sum_u))

else:
    guided = _stencil_kernel = None


def stencil_config(height: int, width: int) -> dict[str, int]:
    """A warp a row: 256 elements are 8 a lane, one 16-byte load in half precision; narrow rows of
    several planes share it.

    Six rows a program: each is loaded 8/6 times instead of three (the rest from cache), and a GPU
    still gets hundreds of programs of a 480p clip.
    """
    segment = max(256, 1 << (width - 1).bit_length())
    warps = 4 if segment == 256 else 2 if segment == 512 else 1
    return {
        "SEGMENT": segment,
        "PACK": segment // width,
        "WARPS": warps,
        "ROWS": min(6, height),
        "num_warps": 4,
    }


def variants() -> list[Variant]:
    """What the plans launch at 480p and 720p, predictions in bfloat16: bridges guided or not, and
    the small one alone."""
    out = []
    small, large = ("small_c", "small_u"), ("large_c", "large_u")
    scalars = dict.fromkeys(("scale_small", "scale_large", "keep", "low"), "fp32") | {
        "programs": "i32"
    }
    pointers = dict.fromkeys((*small, *large), "*bf16")
    for height, width in ((60, 104), (90, 160)):
        size = {"H": height, "W": width}
        config = stencil_config(height, width)
        warps = config.pop("num_warps")
        signature = {
            **pointers,
            **scalars,
            "u_ptr": "*fp32",
            "sums_ptr": "*fp32",
            "planes": "i32",
            "share_large": "fp32",
            "side": "fp32",
        }
        for label, has_large, guided in (
            ("both, guided", True, (True, True)),
            ("both, small guided", True, (True, False)),
            ("both", True, (False, False)),
            ("small, guided", False, (True, False)),
        ):
            flags = {"GUIDED_SMALL": guided[0], "HAS_LARGE": has_large, "GUIDED_LARGE": guided[1]}
            name = f"band_blend {label} {height}x{width}"
            out.append(
                Variant(
                    name,
                    _stencil_kernel,
                    signature,
                    {**size, **config, **flags},
                    warps,
                    aligned=("planes",),
                )
            )
    return out


def sums_ref(*velocities: Tensor | None) -> Tensor:
    """Sums of squares of each velocity [B, ...], zero where there is none: [3, B, 1] float32."""
    some = next(v for v in velocities if v is not None)
    return torch.stack(
        [
            some.new_zeros(len(some), 1) if v is None else v.flatten(1).square().sum(1, True)
            for v in velocities
        ]
    )


def band_blend_ref(
    small: Tensor,
    small_u: Tensor | None,
    large: Tensor | None,
    large_u: Tensor | None,
    scales: tuple[float, float],
    share_large: float,
    keep: float,
    low: float,
    side: float,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, float32; arguments as in `band_blend`."""
    v_small = guide(small, small_u, scales[0])
    # no copy from the host: it can be captured beside the kernel
    taps = torch.full((3,), side, device=v_small.device)
    taps[1] = 1 - 2 * side
    planes = v_small.flatten(0, -3).unsqueeze(1)
    filtered = F.conv2d(
        F.conv2d(planes, taps.view(1, 1, 3, 1), padding=(1, 0)),
        taps.view(1, 1, 1, 3),
        padding=(0, 1),
    )
    u = keep * v_small + low * filtered.view_as(v_small)
    v_large = None if large is None else guide(large, large_u, scales[1])
    u = u if v_large is None else u + share_large * v_large
    return u, sums_ref(v_small, v_large, u)


def check_predictions(
    op: str, small: Tensor, small_u: Tensor | None, large: Tensor | None, large_u: Tensor | None
) -> None:
    """Raise a `ValueError` unless the predictions are alike and the grid holds them."""
    if small.ndim < 3:
        raise ValueError(
            f"{op}: predictions have shape {tuple(small.shape)}; expected [B, ..., H, W]."
        )
    if large is None and large_u is not None:
        raise ValueError(f"{op}: large_u without large has nothing to guide.")
    for name, own, unconditional in (("small", small, small_u), ("large", large, large_u)):
        if own is None:
            continue
        if own.dtype not in DTYPES:
            raise ValueError(f"{op}: {name} is {own.dtype}; expected float32, float16 or bfloat16.")
        check_tensor(op, name, own, small.shape, own.dtype, small.device)
        if unconditional is not None:
            check_tensor(op, f"{name}_u", unconditional, small.shape, own.dtype, small.device)
    if max(small.shape[-2:]) > MAX_SIDE or small.shape[0] > 65535:
        raise ValueError(
            f"{op}: shape {tuple(small.shape)} is beyond the grid: sides up to {MAX_SIDE}, 65535"
            " samples."
        )


@kernel_op("band_blend")
def _band_blend(
    small: Tensor,
    small_u: Tensor | None,
    large: Tensor | None,
    large_u: Tensor | None,
    scale_small: float,
    scale_large: float,
    share_large: float,
    keep: float,
    low: float,
    side: float,
) -> tuple[Tensor, Tensor]:
    check_predictions("band_blend", small, small_u, large, large_u)
    height, width = small.shape[-2:]
    if width > MAX_WIDTH:
        raise ValueError(
            f"band_blend: planes are {width} wide; a row lies in a warp's registers, up to"
            f" {MAX_WIDTH}."
        )
    batch, u = small.shape[0], torch.empty_like(small, dtype=torch.float32)
    planes = small[0].numel() // max(1, height * width) if batch else 0
    config = stencil_config(max(1, height), max(1, width))
    grid = (-(-planes // (config["PACK"] * config["WARPS"])), -(-height // config["ROWS"]), batch)
    sums = torch.empty(3, batch, grid[0] * grid[1], dtype=torch.float32, device=small.device)
    if u.numel():
        launch(
            _stencil_kernel,
            grid,
            small,
            small,
            small if small_u is None else small_u,
            small if large is None else large,
            small if large_u is None else large_u,
            u,
            sums,
            planes,
            sums.numel() // 3,
            scale_small,
            scale_large,
            share_large,
            keep,
            low,
            side,
            H=height,
            W=width,
            GUIDED_SMALL=small_u is not None,
            HAS_LARGE=large is not None,
            GUIDED_LARGE=large_u is not None,
            **config,
        )
    return u, sums


@_band_blend.register_fake
def _(small, small_u, large, large_u, scale_small, scale_large, share_large, keep, low, side):
    height, width = small.shape[-2:]
    config = stencil_config(height, width)
    planes = small[0].numel() // (height * width)
    programs = -(-planes // (config["PACK"] * config["WARPS"])) * -(-height // config["ROWS"])
    return torch.empty_like(small, dtype=torch.float32), small.new_empty(
        3, len(small), programs, dtype=torch.float32
    )


def band_blend(
    small: Tensor,
    small_u: Tensor | None,
    large: Tensor | None,
    large_u: Tensor | None,
    scales: tuple[float, float],
    share_large: float,
    keep: float,
    low: float,
    side: float,
) -> tuple[Tensor, Tensor]:
    """The gaussian split: guidance, a 3 x 3 stencil on the small velocity, the gate's sum, and sums
    of squares.

    Args:
        small, large: conditional predictions [B, C, T, H, W], contiguous, float32, float16 or
            bfloat16; `large` is None where the small generator runs alone.
        small_u, large_u: their unconditional twins, or None where a generator is not guided.
        scales: guidance scales of the small and the large generator.
        share_large, keep, low: u = share_large v_L + keep v_S + low LF(v_S).
        side: the Gaussian's outer tap; the one between is 1 - 2 side.

    Returns:
        u: before its energy factor, float32, in small's shape. sums: [3, B, P] float32, partial
        sums of v_S^2, v_L^2 and u^2 for `solver_step`, in an order that does not depend on the
        launch.

    Raises:
        ValueError: a shape, dtype, device or stride that the kernel does not take; says which.
    """
    return _band_blend(
        small, small_u, large, large_u, *map(float, (*scales, share_large, keep, low, side))
    )
