"""Every kernel against float64, in the dtype of the run: what the GPU suite asks before it grants a
speed.

Oracles are written from the formulas, in float64 on the device of the run; an error may be twice
what eager PyTorch loses at the same precision.
"""

from __future__ import annotations

import math
from typing import Any

from nexus_rt.bench.measure import failure


def correctness(suite: Any) -> dict:
    """Every kernel in the suite's dtype against float64; `suite.wrong` gets the names of those that
    are not right.

    A kernel that fails to compile or to run is wrong, and does not keep the others from being
    checked.
    """
    rows = {}
    for name, check in CHECKS.items():
        try:
            for label, row in check(suite):
                rows[f"{name} {label}"] = row
        except Exception as error:
            rows[name] = {"failed": failure(error), "right": False}
    suite.wrong = {name.split()[0] for name, row in rows.items() if not row["right"]}
    return rows


def compare(got, wanted, eager) -> dict:
    """Errors against float64 beside what eager PyTorch loses at the same precision; right within
    twice that."""
    error, lost = (float((t.double() - wanted).abs().max()) for t in (got, eager))
    finite = bool(got.isfinite().all())
    scale = float(wanted.abs().max())
    return {
        "error": error,
        "eager_error": lost,
        "right": finite and error <= 2 * lost + 1e-6 * max(1.0, scale),
    }


def _heads(suite: Any) -> tuple:
    return ((2, 32),) if suite.dry else ((12, 128), (40, 128), (4, 64), (4, 32))


def _planes(suite: Any) -> tuple:
    return ((6, 10),) if suite.dry else ((60, 104), (90, 160), (17, 23))


def _modulate(suite: Any):
    import torch

    from nexus_rt.kernels.modulate import modulate, modulate_ref

    for dim in (heads * head_dim for heads, head_dim in _heads(suite)):
        length = 7 if suite.dry else 1311
        x, y = suite.random(2, length, dim), suite.random(2, length, dim)
        scale, shift, gate = (suite.random(2, dim, dtype=torch.float32) for _ in range(3))
        total, out = modulate(x, scale, shift, 1e-6, y, gate)
        stream = (x.double() + y.double() * gate.double()[:, None]).to(x.dtype).double()
        eager = modulate_ref(x, scale, shift, 1e-6, y, gate)
        yield str(dim), compare(out, _layer_norm64(stream, scale, shift), eager[1])
        yield f"stream {dim}", compare(total, stream, eager[0])


def _qk_norm_rope(suite: Any):
    import torch

    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

    for heads, head_dim in _heads(suite):
        dim, length = heads * head_dim, 7 if suite.dry else 1311
        qkv = suite.random(2, length, 3 * dim)
        weights = [suite.random(dim) for _ in range(2)]
        angle = suite.random(length, head_dim // 2, dtype=torch.float32)
        args = (qkv, *weights, angle.cos(), angle.sin(), heads, 1e-6)
        got, eager = qk_norm_rope(*args), qk_norm_rope_ref(*args)
        for name, g, e, part, weight in zip(
            "qk", got, eager, qkv.double().chunk(3, -1), weights, strict=False
        ):
            yield f"{name} {dim}", compare(g, _rope64(part, weight, angle, heads), e)


def _attention(suite: Any):
    import torch

    from nexus_rt.kernels.attention import LOADS, attention

    for heads, head_dim in _heads(suite):
        length = 7 if suite.dry else 1311
        for keys, biased in ((length, False), (1280, False), (77, True)):
            if suite.dry and keys > 77:
                continue
            q, k, v = (
                suite.random(2, length, heads, head_dim),
                *(suite.random(2, keys, heads, head_dim) for _ in range(2)),
            )
            bias = suite.random(2, keys, dtype=torch.float32) if biased else None
            mask = None if bias is None else bias[:, None, None].to(q.dtype)
            plain = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
            ).transpose(1, 2)
            label = f"{head_dim} x{heads} {keys} keys{' biased' if biased else ''}"
            wanted = _attention64(q, k, v, bias)
            for loads in LOADS[:2] if suite.dry else LOADS[: 3 if biased else 4]:
                yield f"{label}, {loads}", compare(attention(q, k, v, bias, loads), wanted, plain)


def _attention_fp8(suite: Any):
    import torch

    from nexus_rt.attention import APPROXIMATE
    from nexus_rt.kernels.attention import LOADS
    from nexus_rt.kernels.attention_fp8 import attention_fp8

    if suite.dry:  # Triton's interpreter rounds to fp8 wrongly
        return
    for heads, head_dim in ((12, 128), (4, 64)):
        for keys, biased in ((1311, False), (1280, False), (77, True)):
            q, k, v = (
                suite.random(2, 1311, heads, head_dim),
                *(suite.random(2, keys, heads, head_dim) for _ in range(2)),
            )
            bias = suite.random(2, keys, dtype=torch.float32) if biased else None
            wanted = _attention64(q, k, v, bias)
            for loads in LOADS[: 3 if biased else 4]:
                share = float(
                    (attention_fp8(q, k, v, bias, loads).double() - wanted).norm() / wanted.norm()
                )
                label = f"{head_dim} x{heads} {keys} keys{' biased' if biased else ''}, {loads}"
                yield (
                    label,
                    {
                        "relative_error": share,
                        "allowed": APPROXIMATE,
                        "right": share <= APPROXIMATE,
                    },
                )


def _linear_gelu(suite: Any):
    from nexus_rt.block_ops import TORCH, _linear_gelu_epilogue

    for dim, inner in ((32, 64),) if suite.dry else ((1536, 8960), (5120, 13824)):
        x, weight, bias = (
            suite.random(2, 7 if suite.dry else 500, dim),
            suite.random(inner, dim) / dim**0.5,
            suite.random(inner),
        )
        y = x.double() @ weight.double().T + bias.double()
        wanted = 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
        yield (
            f"{dim}",
            compare(
                _linear_gelu_epilogue(x, weight, bias), wanted, TORCH.linear_gelu(x, weight, bias)
            ),
        )


def _predictions(suite: Any, height: int, width: int):
    """Four predictions in the suite's dtype, guidance scales, and the guided velocities in
    float64."""
    four, scales = [suite.random(2, 4, 3, height, width) for _ in range(4)], (5.0, 3.0)
    pairs = zip(four[::2], four[1::2], scales, strict=True)
    return four, scales, [u.double() + g * (c.double() - u.double()) for c, u, g in pairs]


def _squares(*velocities):
    import torch

    return torch.stack([v.square().flatten(1).sum(1) for v in velocities])


def _band_blend(suite: Any):
    from nexus_rt.kernels.band_blend import band_blend, band_blend_ref

    for height, width in _planes(suite):
        four, scales, (v_small, v_large) = _predictions(suite, height, width)
        got, sums = band_blend(*four, scales, 0.4, 0.42, 0.18, 0.2)
        wanted = 0.4 * v_large + 0.42 * v_small + 0.18 * _stencil64(v_small, 0.2)
        yield (
            f"{height}x{width}",
            compare(got, wanted, band_blend_ref(*four, scales, 0.4, 0.42, 0.18, 0.2)[0]),
        )
        squares, eager = (
            _squares(v_small, v_large, wanted),
            _squares(v_small.float(), v_large.float(), got),
        )
        yield (
            f"sums {height}x{width}",
            compare(sums.sum(-1) / squares, squares / squares, eager / squares),
        )


def _band_filter(suite: Any):
    from nexus_rt.kernels.band_filter import band_filter, band_filter_ref
    from nexus_rt.upfb import split_filter

    for height, width in _planes(suite):
        four, scales, (v_small, v_large) = _predictions(suite, height, width)
        x = v_small - v_large
        for split, lowpass in (("fft", "gaussian"), ("dct", "butterworth")):
            f = split_filter(height, width, split, lowpass, 2, 0.43, suite.device)
            args = (*four, scales, 0.42, 0.18, f.left, f.right, f.gain)
            wanted = v_large + 0.42 * x + 0.18 * _lowpass64(x, split, lowpass, 0.43)
            yield (
                f"{split} {lowpass} {height}x{width}",
                compare(band_filter(*args)[0], wanted, band_filter_ref(*args)[0]),
            )


def _solver_step(suite: Any):
    import torch

    from nexus_rt.kernels.solver_step import solver_step, solver_step_ref

    for height, width in _planes(suite):
        x, v, last, m1, m2 = (
            suite.random(2, 4, 3, height, width, dtype=torch.float32) for _ in range(5)
        )
        scalars, squares = (
            [0.9, 0.7, -0.2, 0.35, 0.11, 0.83, 0.4, -0.09],
            _squares(x, m1, v).double(),
        )
        sums = (squares[..., None] / 700).expand(3, 2, 700).float().contiguous()
        args = (x, v, None, 1.0, sums, "progressive", 0.6, scalars, [last, m1, m2], 3, 2)
        wanted = _step64(x, v, squares, 0.6, scalars, last, m1, m2)
        yield f"{height}x{width}", compare(solver_step(*args)[0], wanted, solver_step_ref(*args)[0])


def _beyond_int32(suite: Any):
    """Tensors of more than 2^31 elements, checked at their end."""
    import torch

    from nexus_rt.kernels.band_blend import band_blend, band_blend_ref
    from nexus_rt.kernels.modulate import modulate, modulate_ref
    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

    if suite.dry:
        return
    end, zeros = slice(-64, None), lambda n: torch.zeros(1, n, device=suite.device)
    x = suite.random(1, 430_000, 5120)
    got = modulate(x, zeros(5120), zeros(5120), 1e-6)[1][:, end]
    last = x[:, end].clone()
    eager = modulate_ref(last, zeros(5120), zeros(5120), 1e-6)[1]
    yield "modulate", compare(got, _layer_norm64(last.double(), zeros(5120), zeros(5120)), eager)
    del x
    qkv, weight, angle = (
        suite.random(1, 145_000, 3 * 5120),
        suite.random(5120),
        suite.random(145_000, 64, dtype=torch.float32),
    )
    got = qk_norm_rope(qkv, weight, weight, angle.cos(), angle.sin(), 40, 1e-6)[1][:, end]
    last, turn = qkv[:, end].clone(), angle[end].clone()
    eager = qk_norm_rope_ref(last, weight, weight, turn.cos(), turn.sin(), 40, 1e-6)[1]
    yield (
        "qk_norm_rope",
        compare(got, _rope64(last.double().chunk(3, -1)[1], weight, turn, 40), eager),
    )
    del qkv
    small = suite.random(1, 16, 9400, 90, 160)
    got = band_blend(small, None, None, None, (1.0, 1.0), 0.0, 0.7, 0.3, 0.2)[0][:, -1, end]
    last = small[:, -1, end].clone()[:, None]
    eager = band_blend_ref(last, None, None, None, (1.0, 1.0), 0.0, 0.7, 0.3, 0.2)[0]
    yield (
        "band_blend",
        compare(got[:, None], 0.7 * last.double() + 0.3 * _stencil64(last.double(), 0.2), eager),
    )


CHECKS = {
    "modulate": _modulate,
    "qk_norm_rope": _qk_norm_rope,
    "linear_gelu": _linear_gelu,
    "attention": _attention,
    "attention_fp8": _attention_fp8,
    "band_blend": _band_blend,
    "band_filter": _band_filter,
    "solver_step": _solver_step,
    "beyond_int32": _beyond_int32,
}


def _stencil64(v, side):
    import torch

    taps = torch.tensor([side, 1 - 2 * side, side], dtype=torch.float64, device=v.device)
    padded = torch.nn.functional.pad(v, (1, 1, 1, 1))
    h, w = v.shape[-2:]
    return sum(
        taps[i] * taps[j] * padded[..., i : i + h, j : j + w] for i in range(3) for j in range(3)
    )


def _lowpass64(x, split, lowpass, cutoff):
    """By torch.fft; a DCT-II is the FFT of the plane continued by its mirror image."""
    import torch

    h, w = x.shape[-2:]
    if split == "dct":
        x = torch.cat([x, x.flip(-1)], -1)
        x = torch.cat([x, x.flip(-2)], -2)
    rows, columns = (
        2 * torch.fft.fftfreq(n, dtype=torch.float64, device=x.device).abs() for n in x.shape[-2:]
    )
    rho = torch.hypot(rows[:, None], columns[None]) / cutoff
    gain = 2.0 ** (-(rho**2) / 2) if lowpass == "gaussian" else 1 / (1 + rho**4).sqrt()
    return torch.fft.ifft2(torch.fft.fft2(x) * gain).real[..., :h, :w]


def _step64(x, v, squares, w, scalars, last, m1, m2):
    """progressive energy, corrector and predictor as `nexus_rt.kernels.solver_step` writes them."""
    small, large, blended = (squares / v[0].numel()).sqrt()
    factor = (w * small + (1 - w) * large) / (blended + 1e-6)
    sigma, c, p = scalars[0], scalars[1:5], scalars[5:]
    clean = x.double() - sigma * factor.view(-1, 1, 1, 1, 1) * v.double()
    corrected = c[0] * last.double() + c[1] * clean + c[2] * m1.double() + c[3] * m2.double()
    return p[0] * corrected + p[1] * clean + p[2] * m1.double()


def _layer_norm64(x, scale, shift):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + 1e-6).sqrt() * (1 + scale.double()[:, None]) + shift.double()[
        :, None
    ]


def _rope64(x, weight, angle, heads):
    import torch

    n = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    z = torch.view_as_complex(n.unflatten(-1, (heads, -1, 2)).contiguous())
    turn = torch.complex(angle.cos().double(), angle.sin().double())
    return torch.view_as_real(z * turn[:, None]).flatten(-2)


def _attention64(q, k, v, bias):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    score = q @ k.mT / math.sqrt(q.shape[-1])
    score = score if bias is None else score + bias.double()[:, None, None]
    return (score.softmax(-1) @ v).transpose(1, 2)
