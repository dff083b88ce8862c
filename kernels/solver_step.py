"""A solver's whole step in one pass: guidance or the energy factor, the clean prediction, corrector
and predictor.

    v      = factor * velocity,  or  v_u + g (v_c - v_u)
    clean  = x - sigma v
    x'     = c_x last + c_0 clean + c_1 m_1 + c_2 m_2      (x' = x where there is no corrector)
    next   = p_x x' + p_0 clean + p_1 m_1

m_k is the clean prediction k steps ago, `last` the x' of the step before; the scalars are
`nexus_rt.method.solver`'s table. The factor is R / (rms(u) + eps) per sample, of the sums that
`band_blend` left (DESIGN section 1):
    reference:    R = (rms(v_S) + rms(v_L) rms(v_S) / (rms(v_L) + eps)) / 2
    progressive:  R = w rms(v_S) + (1-w) rms(v_L)
Every program reduces its sample's sums itself, in one order: a few KiB from cache instead of a
launch.

Bytes: x, velocity, last, m_1 and m_2 read, next, x' and clean written, 4 bytes each: 32 an element;
67 MB at 480p x 81 frames. Flops: about 12 an element. So the roof is the copy bandwidth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_rt.core.limits import ENERGIES
from nexus_rt.kernels.formulas import EPS, guide, target_energy
from nexus_rt.kernels.triton_op import DTYPES, Variant, check_tensor, kernel_op, launch, tl, triton

if triton is not None:
    _EPS = tl.constexpr(EPS)

    @triton.jit
    def _solver_kernel(
        x_ptr,  # [B, N] float32
        v_ptr,  # [B, N] float32, or a prediction in any float
        v_u_ptr,  # [B, N], its unconditional twin, or unused
        last_ptr,  # [B, N] float32, or unused; so m_1 and m_2
        m1_ptr,
        m2_ptr,
        sums_ptr,  # [3, B, P] float32, or unused
        next_ptr,  # [B, N] float32
        corrected_ptr,  # [B, N] float32, or unused
        clean_ptr,  # [B, N] float32, or unused
        elements,  # N
        partials,  # P
        guidance,
        w,
        sigma,
        c_x,
        c_0,
        c_1,
        c_2,
        p_x,
        p_0,
        p_1,
        BLOCK: tl.constexpr,
        CHUNK: tl.constexpr,
        ENERGY: tl.constexpr,  # index into ENERGIES
        GUIDED: tl.constexpr,
        CORRECTOR: tl.constexpr,  # how many of clean, m_1, m_2 it reads; 0: there is none
        PREDICTOR: tl.constexpr,  # how many of clean, m_1
        KEEP: tl.constexpr,  # clean and x' are written, for the next step
    ):
        sample = tl.program_id(1).to(tl.int64)
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = column < elements
        at = sample * elements + column
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if GUIDED:
            base = tl.load(v_u_ptr + at, mask=inside, other=0.0).to(tl.float32)
            v = base + guidance * (v - base)
        if ENERGY > 0:
            chunk = tl.arange(0, CHUNK)
            small = tl.zeros([CHUNK], tl.float32)
            large = tl.zeros([CHUNK], tl.float32)
            blended = tl.zeros([CHUNK], tl.float32)
            own = sums_ptr + sample * partials
            stride = tl.num_programs(1).to(tl.int64) * partials
            for start in range(0, partials, CHUNK):
                known = start + chunk < partials
                small += tl.load(own + start + chunk, mask=known, other=0.0)
                large += tl.load(own + stride + start + chunk, mask=known, other=0.0)
                blended += tl.load(own + 2 * stride + start + chunk, mask=known, other=0.0)
            rms_small = tl.sqrt(tl.sum(small, 0) / elements)
            rms_large = tl.sqrt(tl.sum(large, 0) / elements)
            if ENERGY == 1:
                target = (rms_small + rms_large * rms_small / (rms_large + _EPS)) * 0.5
            else:
                target = w * rms_small + (1.0 - w) * rms_large
            v *= target / (tl.sqrt(tl.sum(blended, 0) / elements) + _EPS)
        clean = x - sigma * v
        if PREDICTOR > 1 or CORRECTOR > 1:
            m1 = tl.load(m1_ptr + at, mask=inside, other=0.0)
        if CORRECTOR > 0:
            x = c_x * tl.load(last_ptr + at, mask=inside, other=0.0) + c_0 * clean
            if CORRECTOR > 1:
                x += c_1 * m1
            if CORRECTOR > 2:
                x += c_2 * tl.load(m2_ptr + at, mask=inside, other=0.0)
        out = p_x * x + p_0 * clean
        if PREDICTOR > 1:
            out += p_1 * m1
        tl.store(next_ptr + at, out, mask=inside)
        if KEEP:
            tl.store(clean_ptr + at, clean, mask=inside)
            if CORRECTOR > 0:
                tl.store(corrected_ptr + at, x, mask=inside)

else:
    _solver_kernel = None


def launch_config() -> dict[str, int]:
    """Eight elements a thread and tensor: two 16-byte loads of each in flight; sums are read 512 at
    a time."""
    return {"BLOCK": 2048, "CHUNK": 512, "num_warps": 8}


def variants() -> list[Variant]:
    """What UniPC launches: after a blend (both energies), after one generator alone, first and last
    steps, Euler."""
    config = launch_config()
    warps = config.pop("num_warps")
    names = (
        "x_ptr",
        "v_ptr",
        "last_ptr",
        "m1_ptr",
        "m2_ptr",
        "sums_ptr",
        "next_ptr",
        "corrected_ptr",
        "clean_ptr",
    )
    scalars = ("guidance", "w", "sigma", "c_x", "c_0", "c_1", "c_2", "p_x", "p_0", "p_1")
    base = (
        dict.fromkeys(names, "*fp32")
        | dict.fromkeys(scalars, "fp32")
        | {
            "elements": "i32",
            "partials": "i32",
        }
    )
    out = []
    for label, energy, corrector, predictor, guided, keep in (
        ("reference", 1, 3, 2, False, True),
        ("progressive", 2, 3, 2, False, True),
        ("none", 0, 3, 2, False, True),
        ("guided", 0, 3, 2, True, True),
        ("guided, first", 0, 0, 1, True, True),
        ("guided, second", 0, 2, 2, True, True),
        ("guided, last", 0, 3, 1, True, False),
        ("reference, last", 1, 3, 1, False, False),
        ("euler, guided", 0, 0, 1, True, False),
    ):
        kind = "*bf16" if guided else "*fp32"
        flags = {
            "ENERGY": energy,
            "GUIDED": guided,
            "CORRECTOR": corrector,
            "PREDICTOR": predictor,
            "KEEP": keep,
        }
        signature = {**base, "v_ptr": kind, "v_u_ptr": kind}
        label = f"solver_step {label}"
        out.append(
            Variant(
                label, _solver_kernel, signature, {**config, **flags}, warps, aligned=("elements",)
            )
        )
    return out


def energy_factor(sums: Tensor, elements: int, energy: str, w: float) -> Tensor:
    """What a blended velocity is multiplied by, [B] float32, from `band_blend`'s sums [3, B, P] of
    `elements` a sample."""
    small, large, blended = (sums.sum(-1) / elements).sqrt()
    if energy == "none":
        return torch.ones_like(small)
    return target_energy(small, large, w, energy) / (blended + EPS)


def solver_step_ref(
    x: Tensor,
    velocity: Tensor,
    velocity_u: Tensor | None,
    guidance: float,
    sums: Tensor | None,
    energy: str,
    w: float,
    scalars: list[float],
    history: list[Tensor],
    corrector: int,
    predictor: int,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in plain PyTorch, float32; arguments as in `solver_step`."""
    v = guide(velocity, velocity_u, guidance)
    if energy != "none":
        assert sums is not None
        v = v * energy_factor(sums, x[0].numel(), energy, w).view(-1, *[1] * (x.ndim - 1))
    sigma, c, p = scalars[0], scalars[1:5], scalars[5:]
    clean = x - sigma * v
    last, *past = history if history else [x]
    if corrector:
        x = c[0] * last + sum(
            s * m for s, m in zip(c[1:], [clean, *past][:corrector], strict=False)
        )
    return (
        p[0] * x + sum(s * m for s, m in zip(p[1:], [clean, *past][:predictor], strict=False)),
        x,
        clean,
    )


@kernel_op("solver_step")
def _solver_step(
    x: Tensor,
    velocity: Tensor,
    velocity_u: Tensor | None,
    sums: Tensor | None,
    last: Tensor | None,
    m1: Tensor | None,
    m2: Tensor | None,
    guidance: float,
    w: float,
    scalars: list[float],
    energy: int,
    corrector: int,
    predictor: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, velocity, velocity_u, sums, last, m1, m2, energy, corrector, predictor)
    out, none = torch.empty_like(x), torch.empty(0, device=x.device)
    corrected = torch.empty_like(x) if keep and corrector else none
    clean = torch.empty_like(x) if keep else none.clone()
    if x.numel():
        config = launch_config()
        elements = x[0].numel()
        grid = (-(-elements // config["BLOCK"]), x.shape[0])
        or_x = lambda t: x if t is None else t
        launch(
            _solver_kernel,
            grid,
            x,
            x,
            velocity,
            velocity if velocity_u is None else velocity_u,
            or_x(last),
            or_x(m1),
            or_x(m2),
            or_x(sums),
            out,
            corrected if corrected.numel() else out,
            clean if clean.numel() else out,
            elements,
            0 if sums is None else sums.shape[2],
            guidance,
            w,
            *scalars,
            ENERGY=energy,
            GUIDED=velocity_u is not None,
            CORRECTOR=corrector,
            PREDICTOR=predictor,
            KEEP=keep,
            **config,
        )
    return out, corrected, clean


@_solver_step.register_fake
def _(
    x,
    velocity,
    velocity_u,
    sums,
    last,
    m1,
    m2,
    guidance,
    w,
    scalars,
    energy,
    corrector,
    predictor,
    keep,
):
    corrected = torch.empty_like(x) if keep and corrector else x.new_empty(0)
    return torch.empty_like(x), corrected, torch.empty_like(x) if keep else x.new_empty(0)


def _check(x, velocity, velocity_u, sums, last, m1, m2, energy, corrector, predictor) -> None:
    op = "solver_step"
    if x.ndim < 2 or x.shape[0] > 65535 or (x.shape[0] and x[0].numel() >= 2**31):
        raise ValueError(
            f"{op}: latents have shape {tuple(x.shape)}; expected [B, ...], up to 65535 samples of"
            " 2^31 elements."
        )
    if velocity.dtype not in DTYPES:
        raise ValueError(
            f"{op}: velocity is {velocity.dtype}; expected float32, float16 or bfloat16."
        )
    needed = {"last": corrector > 0, "m1": corrector > 1 or predictor > 1, "m2": corrector > 2}
    for name, t in (("last", last), ("m1", m1), ("m2", m2)):
        if needed[name] and t is None:
            raise ValueError(
                f"{op}: this step's scalars read {name}, which is missing: steps are taken in order"
                " from 0."
            )
    for name, t, dtype in (
        ("latents", x, torch.float32),
        ("velocity", velocity, velocity.dtype),
        ("velocity_u", velocity_u, velocity.dtype),
        ("last", last, torch.float32),
        ("m1", m1, torch.float32),
        ("m2", m2, torch.float32),
    ):
        if t is not None:
            check_tensor(op, name, t, x.shape, dtype, x.device)
    if energy and sums is None:
        raise ValueError(f"{op}: energy {ENERGIES[energy]!r} needs the sums that band_blend left.")
    if sums is not None:
        check_tensor(op, "sums", sums, (3, x.shape[0], *sums.shape[2:3]), torch.float32, x.device)


def solver_step(
    x: Tensor,
    velocity: Tensor,
    velocity_u: Tensor | None,
    guidance: float,
    sums: Tensor | None,
    energy: str,
    w: float,
    scalars: list[float],
    history: list[Tensor],
    corrector: int,
    predictor: int,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a linear multistep solver.

    Args:
        x: latents [B, ...], float32, contiguous; so `history`.
        velocity: in x's shape; float32, float16 or bfloat16. velocity_u: its unconditional twin
            where guidance is still to be applied, at scale `guidance`; else None.
        sums, energy, w: as `band_blend` returned them; energy "none", "reference" or "progressive".
        scalars: sigma, then c_x, c_0, c_1, c_2, then p_x, p_0, p_1.
        history: [last, m_1, m_2], as many as the scalars read.
        corrector, predictor: how many predictions each reads, clean among them (corrector 0: there
            is none).
        keep: False where no step will read this one: less is written.

    Returns:
        (next, x', clean): float32; the last two only where `keep` (x' is x itself without a
        corrector).

    Raises:
        ValueError: a shape, dtype, device or stride that the kernel does not take; says which.
    """
    padded = [*history, None, None, None][:3]
    out, corrected, clean = _solver_step(
        x,
        velocity,
        velocity_u,
        sums,
        *padded,
        float(guidance),
        float(w),
        [float(s) for s in scalars],
        ENERGIES.index(energy),
        corrector,
        predictor,
        keep,
    )
    return out, corrected if corrector else x, clean
