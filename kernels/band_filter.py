"""The fft and dct splits' blend: guidance of both generators, a two-sided matrix filter, the gate,
the sums for energy.

    v = v_u + g (v_c - v_u)                                  each generator, where it is guided
    x = v_S - v_L;  u = v_L + keep x + low F(x)              F(x) = L x R, or L^T (G * (L x R)) R^T
    sums of v_S^2, v_L^2 and u^2, one number a program

Two matrix products a plane, 2 (H + W) multiply-adds an element and pass, float32 by three tf32
products: at 90 x 160, 2 GFLOP in all. A filter of rank one (Gaussian) is one launch; any other is
diagonal in the transform's basis and takes two, of the same kernel, whatever its rank. Bytes: each
prediction once (2 or 4 bytes), u once (4 bytes), and the scratch between the two products, which
stays in the second-level cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_rt.kernels.band_blend import check_predictions, guided, sums_ref
from nexus_rt.kernels.formulas import guide
from nexus_rt.kernels.triton_op import Variant, check_tensor, kernel_op, launch, tl, triton

if triton is not None:

    @triton.jit
    def _product_kernel(
        small_c,  # [planes, H, W]
        small_u,  # the same, or unused
        large_c,  # the same
        large_u,  # the same, or unused
        z_ptr,  # [planes, H, W] float32: x of the second launch, unused in a single or first one
        left_ptr,  # L [H, H] float32
        right_ptr,  # R [W, W] float32
        gain_ptr,  # G [H, W] float32, or unused
        scratch_ptr,  # [planes, H, W] float32: x R, private to a program
        out_ptr,  # [planes, H, W] float32: u, or z where this is not the last launch
        sums_ptr,  # [3, planes * tiles] float32
        programs,  # planes * tiles
        scale_small,
        scale_large,
        keep,
        low,
        H: tl.constexpr,
        W: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        GUIDED_SMALL: tl.constexpr,
        GUIDED_LARGE: tl.constexpr,
        FIRST: tl.constexpr,  # x is v_S - v_L, not z
        LAST: tl.constexpr,  # u is written, not G * (L x R)
        PRECISION: tl.constexpr,
    ):
        plane = tl.program_id(0).to(tl.int64) * (H * W)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        wide = column < W
        for start in range(0, H, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            product = tl.zeros([ROWS, COLUMNS], tl.float32)
            for k in range(0, W, DEPTH):
                across, down = k + tl.arange(0, DEPTH)[None, :], k + tl.arange(0, DEPTH)[:, None]
                at, mask = plane + row * W + across, (row < H) & (across < W)
                if FIRST:
                    x = guided(small_c, small_u, at, mask, scale_small, GUIDED_SMALL)
                    x -= guided(large_c, large_u, at, mask, scale_large, GUIDED_LARGE)
                else:
                    x = tl.load(z_ptr + at, mask=mask, other=0.0)
                if LAST and not FIRST:
                    right = tl.load(
                        right_ptr + column * W + down, mask=(down < W) & wide, other=0.0
                    )
                else:
                    right = tl.load(
                        right_ptr + down * W + column, mask=(down < W) & wide, other=0.0
                    )
                product = tl.dot(x, right, product, input_precision=PRECISION)
            tl.store(scratch_ptr + plane + row * W + column, product, mask=(row < H) & wide)
        tl.debug_barrier()  # other threads of this program read what was stored
        sum_small, sum_large, sum_u = 0.0, 0.0, 0.0
        for start in range(0, H, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            product = tl.zeros([ROWS, COLUMNS], tl.float32)
            # not copied ahead of the barrier by the asynchronous engine
            for k in tl.range(0, H, DEPTH, num_stages=1):
                across, down = k + tl.arange(0, DEPTH)[None, :], k + tl.arange(0, DEPTH)[:, None]
                if LAST and not FIRST:
                    left = tl.load(
                        left_ptr + across * H + row, mask=(row < H) & (across < H), other=0.0
                    )
                else:
                    left = tl.load(
                        left_ptr + row * H + across, mask=(row < H) & (across < H), other=0.0
                    )
                x = tl.load(
                    scratch_ptr + plane + down * W + column, mask=(down < H) & wide, other=0.0
                )
                product = tl.dot(left, x, product, input_precision=PRECISION)
            inside = (row < H) & wide
            at = plane + row * W + column
            if LAST:
                v_small = guided(small_c, small_u, at, inside, scale_small, GUIDED_SMALL)
                v_large = guided(large_c, large_u, at, inside, scale_large, GUIDED_LARGE)
                u = tl.where(inside, v_large + keep * (v_small - v_large) + low * product, 0.0)
                tl.store(out_ptr + at, u, mask=inside)
                sum_small += tl.sum(v_small * v_small)
                sum_large += tl.sum(v_large * v_large)
                sum_u += tl.sum(u * u)
            else:
                gain = tl.load(gain_ptr + row * W + column, mask=inside, other=0.0)
                tl.store(out_ptr + at, gain * product, mask=inside)
        if LAST:
            place = sums_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
            tl.store(place, sum_small)
            tl.store(place + programs, sum_large)
            tl.store(place + 2 * programs.to(tl.int64), sum_u)

else:
    _product_kernel = None


def product_config(height: int, width: int) -> dict[str, int]:
    """Tiles of 64 x 64, 32 deep: 57 KiB of shared memory for the three parts of each operand, 136
    registers."""
    return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 8, "num_stages": 2}


def variants() -> list[Variant]:
    """What the plans launch at 480p and 720p, both generators guided, predictions in bfloat16."""
    out = []
    scalars = dict.fromkeys(("scale_small", "scale_large", "keep", "low"), "fp32") | {
        "programs": "i32"
    }
    pointers = dict.fromkeys(("small_c", "small_u", "large_c", "large_u"), "*bf16")
    matrices = ("z_ptr", "left_ptr", "right_ptr", "gain_ptr", "scratch_ptr", "out_ptr", "sums_ptr")
    signature = {**pointers, **scalars, **dict.fromkeys(matrices, "*fp32")}
    for height, width in ((60, 104), (90, 160)):
        config = product_config(height, width)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        for label, first, last in (
            ("rank 1", True, True),
            ("to frequencies", True, False),
            ("and back", False, True),
        ):
            flags = {
                "GUIDED_SMALL": True,
                "GUIDED_LARGE": True,
                "FIRST": first,
                "LAST": last,
                "PRECISION": "tf32x3",
            }
            name = f"band_filter {label} {height}x{width}"
            out.append(
                Variant(
                    name,
                    _product_kernel,
                    signature,
                    {"H": height, "W": width, **config, **flags},
                    warps,
                    stages,
                )
            )
    return out


def band_filter_ref(
    small: Tensor,
    small_u: Tensor | None,
    large: Tensor,
    large_u: Tensor | None,
    scales: tuple[float, float],
    keep: float,
    low: float,
    left: Tensor,
    right: Tensor,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, float32; arguments as in `band_filter`."""
    v_small, v_large = guide(small, small_u, scales[0]), guide(large, large_u, scales[1])
    x = v_small - v_large
    y = left @ x @ right
    if gain is not None:
        y = left.T @ (gain * y) @ right.T
    u = v_large + keep * x + low * y
    return u, sums_ref(v_small, v_large, u)


@kernel_op("band_filter")
def _band_filter(
    small: Tensor,
    small_u: Tensor | None,
    large: Tensor,
    large_u: Tensor | None,
    scale_small: float,
    scale_large: float,
    keep: float,
    low: float,
    left: Tensor,
    right: Tensor,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_predictions("band_filter", small, small_u, large, large_u)
    height, width = small.shape[-2:]
    for name, t, shape in (
        ("left", left, (height,) * 2),
        ("right", right, (width,) * 2),
        ("gain", gain, (height, width)),
    ):
        if t is not None:
            check_tensor("band_filter", name, t, shape, torch.float32, small.device)
    config = product_config(height, width)
    u = torch.empty_like(small, dtype=torch.float32)
    planes = small.numel() // max(1, height * width)
    grid = (planes, -(-width // config["COLUMNS"]))
    sums = torch.empty(
        3,
        len(small),
        planes * grid[1] // max(1, len(small)),
        dtype=torch.float32,
        device=small.device,
    )
    if u.numel():
        scratch = torch.empty_like(u)
        frequencies = u if gain is None else torch.empty_like(u)
        predictions = (
            small,
            small if small_u is None else small_u,
            large,
            large if large_u is None else large_u,
        )
        passes = (
            ((True, True, u),) if gain is None else ((True, False, frequencies), (False, True, u))
        )
        for first, last, out in passes:
            launch(
                _product_kernel,
                grid,
                small,
                *predictions,
                frequencies,
                left,
                right,
                left if gain is None else gain,
                scratch,
                out,
                sums,
                sums.numel() // 3,
                scale_small,
                scale_large,
                keep,
                low,
                H=height,
                W=width,
                GUIDED_SMALL=small_u is not None,
                GUIDED_LARGE=large_u is not None,
                FIRST=first,
                LAST=last,
                PRECISION="tf32x3",
                **config,
            )
    return u, sums


@_band_filter.register_fake
def _(small, small_u, large, large_u, scale_small, scale_large, keep, low, left, right, gain=None):
    height, width = small.shape[-2:]
    tiles = -(-width // product_config(height, width)["COLUMNS"])
    programs = small[0].numel() // (height * width) * tiles
    return torch.empty_like(small, dtype=torch.float32), small.new_empty(
        3, len(small), programs, dtype=torch.float32
    )


def band_filter(
    small: Tensor,
    small_u: Tensor | None,
    large: Tensor,
    large_u: Tensor | None,
    scales: tuple[float, float],
    keep: float,
    low: float,
    left: Tensor,
    right: Tensor,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The fft and dct splits: guidance, a two-sided matrix filter on the difference, the gate's
    sum, sums of squares.

    Args:
        small, small_u, large, large_u, scales: as in `band_blend`; both generators are needed.
        keep, low: u = v_L + keep x + low F(x) with x = v_S - v_L.
        left, right: L [H, H] and R [W, W], float32, contiguous. gain: None for F(x) = L x R; [H, W]
            for F(x) = L^T (gain * (L x R)) R^T, a gain on each frequency of an orthonormal basis.

    Returns:
        u, sums: as `band_blend`.

    Raises:
        ValueError: a shape, dtype, device or stride that the kernel does not take; says which.
    """
    return _band_filter(
        small, small_u, large, large_u, *map(float, (*scales, keep, low)), left, right, gain
    )
