"""Every kernel against float64, in the dtype of the run: what the GPU suite asks before it grants a
speed.

Oracles are written from the formulas, in float64 on the device of the run; an error may be twice
what eager PyTorch loses at the same precision. What a call on a Wan pair launches comes first, a
row a kernel and generator; a row of its own for every other case follows when the headline is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from nexus_rt.bench.gpu import estimates
from nexus_rt.bench.gpu.units import Unit

FAR = 64.0  # one component of every query, and of every key with the other sign


def units(setting: Any) -> dict[str, Unit]:
    """What a call on a Wan pair launches at 480p; headline rows."""
    cases = _cases(setting)
    rows = {
        label: {name: cases[name] for name in names if name in cases}
        for label, names in launched(setting).items()
    }
    return {
        label: Unit(partial(_together, own), 60.0, estimates.compile_s(len(own)))
        for label, own in rows.items()
        if own
    }


def units_elsewhere(setting: Any) -> dict[str, Unit]:
    """Every other case: other ways to load, widths and planes, and tensors of more than 2^31
    elements."""
    first = {name for names in launched(setting).values() for name in names}
    return {name: Unit(call, 60.0) for name, call in _cases(setting).items() if name not in first}


def launched(s: Any) -> dict[str, list[str]]:
    """Row -> its cases, of the kernels that a call launches: the large generator's in bfloat16 and
    in fp8, the small one's in bfloat16, the blend and the solver's step."""
    out: dict[str, list[str]] = {}
    for name in dict.fromkeys(reversed(s.names)):
        config = s.configs[name]
        heads, head_dim, inner = (
            config[key] for key in ("num_attention_heads", "attention_head_dim", "ffn_dim")
        )
        dim = heads * head_dim
        out[f"modulate {name}"] = [f"modulate {dim}", f"modulate stream {dim}"]
        out[f"qk_norm_rope {name}"] = [f"qk_norm_rope {which} {dim}" for which in "qk"]
        out[f"linear_gelu {name}"] = [f"linear_gelu {dim}"]
        kinds = {biased: [] for biased in (False, True)}
        for keys, biased in _key_counts(s):
            label = f"{_attention_label(heads, head_dim, keys, biased)}, auto"
            kinds[biased].append(label)
            if not biased:
                kinds[biased].append(f"far {label}")
        if name == s.names[1]:
            out[f"attention {name} self"] = [f"attention {label}" for label in kinds[False]]
            out[f"attention {name} cross"] = [f"attention {label}" for label in kinds[True]]
            out[f"modulate_rows {name}"] = [f"modulate_rows {dim}"]
            out[f"quantise_rows {name}"] = [
                f"quantise_rows {dim}",
                f"quantise_rows GELU {inner}",
            ]
            out[f"attention_fp8 {name}"] = [f"attention_fp8 {label}" for label in kinds[False]]
        else:
            both = [*kinds[False], *kinds[True]]
            out[f"attention {name}"] = [f"attention {label}" for label in both]
    plane = "{}x{}".format(*_planes(s, True)[0])
    out[f"band_blend {plane}"] = [f"band_blend {plane}", f"band_blend sums {plane}"]
    out[f"solver_step {plane}"] = [f"solver_step {plane}"]
    return out


def _cases(s: Any) -> dict[str, Callable[[], dict]]:
    return {
        f"{name} {label}": call
        for name, cases in CHECKS.items()
        for timed in (True, False)
        for label, call in cases(s, timed).items()
    }


def _together(cases: dict[str, Callable[[], dict]]) -> dict:
    """One row of several cases: right where all are, with the figures of the worst of them."""
    rows = {name: call() for name, call in cases.items()}
    wrong = [name for name, row in rows.items() if not row["right"]]

    def badness(name: str) -> tuple[bool, float]:
        row = rows[name]
        error = row.get("error", row.get("relative_error", math.inf))
        return not row["right"], math.inf if math.isnan(error) else error

    worst = rows[max(rows, key=badness)]
    return {**worst, "cases": len(rows), **({"wrong": wrong} if wrong else {})}


def compare(got, wanted, eager, slack: float = 1e-6) -> dict:
    """Errors against float64 beside what eager PyTorch loses at the same precision; right within
    twice that and a share `slack` of the largest value."""
    error, lost = (float((t.double() - wanted).abs().max()) for t in (got, eager))
    finite = bool(got.isfinite().all())
    scale = float(wanted.abs().max())
    return {
        "error": error,
        "eager_error": lost,
        "right": finite and error <= 2 * lost + slack * max(1.0, scale),
    }


Cases = dict[str, Callable[[], dict]]


def _heads(s: Any, timed: bool) -> tuple:
    if s.dry:
        return ((2, 32),) if timed else ()
    return ((40, 128), (12, 128)) if timed else ((4, 64), (4, 32))


def _planes(s: Any, timed: bool) -> tuple:
    if s.dry:
        return ((6, 10),) if timed else ()
    return ((60, 104), (90, 160)) if timed else ((17, 23),)


def _modulate(s: Any, timed: bool) -> Cases:
    return {
        f"{what}{heads * head_dim}": partial(_modulate_case, s, heads * head_dim, what)
        for heads, head_dim in _heads(s, timed)
        for what in ("", "stream ")
    }


def _modulate_case(s: Any, dim: int, what: str) -> dict:
    import torch

    from nexus_rt.kernels.modulate import modulate, modulate_ref

    length = 7 if s.dry else 1311
    x, y = s.random(2, length, dim), s.random(2, length, dim)
    scale, shift, gate = (s.random(2, dim, dtype=torch.float32) for _ in range(3))
    total, out = modulate(x, scale, shift, 1e-6, y, gate)
    stream = (x.double() + y.double() * gate.double()[:, None]).to(x.dtype).double()
    eager = modulate_ref(x, scale, shift, 1e-6, y, gate)
    if what:
        return compare(total, stream, eager[0])
    return compare(out, _layer_norm64(stream, scale, shift), eager[1])


def _qk_norm_rope(s: Any, timed: bool) -> Cases:
    return {
        f"{which} {heads * head_dim}": partial(_qk_norm_rope_case, s, heads, head_dim, which)
        for heads, head_dim in _heads(s, timed)
        for which in "qk"
    }


def _qk_norm_rope_case(s: Any, heads: int, head_dim: int, which: str) -> dict:
    import torch

    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

    dim, length, i = heads * head_dim, 7 if s.dry else 1311, "qk".index(which)
    qkv, weights = s.random(2, length, 3 * dim), [s.random(dim) for _ in range(2)]
    angle = s.random(length, head_dim // 2, dtype=torch.float32)
    args = (qkv, *weights, angle.cos(), angle.sin(), heads, 1e-6)
    wanted = _rope64(qkv.double().chunk(3, -1)[i], weights[i], angle, heads)
    return compare(qk_norm_rope(*args)[i], wanted, qk_norm_rope_ref(*args)[i])


def _rows(s: Any, timed: bool) -> Cases:
    # Triton's interpreter rounds to fp8 wrongly
    widths = (
        () if s.dry else ((5120, ""), (13824, "GELU ")) if timed else ((1536, ""), (8960, "GELU "))
    )
    return {f"{what}{dim}": partial(_rows_case, s, dim, bool(what)) for dim, what in widths}


def _rows_case(s: Any, dim: int, gelu: bool) -> dict:
    from nexus_rt.kernels.quantise_rows import quantise_rows, quantise_rows_ref

    x = s.random(2, 1311, dim)
    y = x.flatten(0, 1).double()
    if gelu:
        y = 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
    return _bytes(quantise_rows(x, gelu), quantise_rows_ref(x, gelu), y)


def _bytes(got: tuple, eager: tuple, wanted: Any) -> dict:
    """8-bit rows against what they stand for: not much farther than PyTorch's."""
    off = lambda rows: float((rows[0].double() * rows[1].double() - wanted).norm() / wanted.norm())
    error, lost = off(got), off(eager)
    return {"relative_error": error, "eager_error": lost, "right": error <= 1.05 * lost + 1e-3}


def _modulate_rows(s: Any, timed: bool) -> Cases:
    return {
        f"{heads * head_dim}": partial(_modulate_rows_case, s, heads * head_dim)
        for heads, head_dim in _heads(s, timed)
        if not s.dry
    }


def _modulate_rows_case(s: Any, dim: int) -> dict:
    import torch

    from nexus_rt.kernels.modulate import modulate_rows, modulate_rows_ref

    x, y = s.random(2, 1311, dim), s.random(2, 1311, dim)
    scale, shift, gate = (s.random(2, dim, dtype=torch.float32) for _ in range(3))
    args = (x, scale, shift, 1e-6, y, gate)
    stream = (x.double() + y.double() * gate.double()[:, None]).to(x.dtype).double()
    wanted = _layer_norm64(stream, scale, shift).flatten(0, 1)
    return _bytes(modulate_rows(*args)[1], modulate_rows_ref(*args)[1], wanted)


def _key_counts(s: Any) -> tuple:
    """(keys, whether they have a bias): a last block in part, whole blocks, a prompt's."""
    return ((7 if s.dry else 1311, False), (64 if s.dry else 1280, False), (77, True))


def _attention(s: Any, timed: bool) -> Cases:
    from nexus_rt.kernels.attention_launch import LOADS, TIMED

    out = {}
    for heads, head_dim in _heads(s, timed):
        for keys, biased in _key_counts(s):
            label, shape = _attention_label(heads, head_dim, keys, biased), (heads, head_dim, keys)
            for loads in LOADS[:2] if s.dry else LOADS[:3] if biased else TIMED:
                call = partial(_attention_case, s, *shape, biased, loads)
                out[f"{label}, {loads}"] = call
            if not biased:
                for loads in LOADS[:3] if s.dry else TIMED:
                    call = partial(_attention_case, s, *shape, False, loads, True)
                    out[f"far {label}, {loads}"] = call
    return out


def _attention_label(heads: int, head_dim: int, keys: int, biased: bool) -> str:
    return f"{head_dim} x{heads} {keys} keys{' biased' if biased else ''}"


def _qkv(
    s: Any, heads: int, head_dim: int, keys: int, biased: bool, far: bool = False, dtype: Any = None
) -> tuple:
    """far: every score is far below 0: at most -300, whose exponential's inverse is infinite."""
    import torch

    q = s.random(2, 7 if s.dry else 1311, heads, head_dim, dtype=dtype)
    k, v = (s.random(2, keys, heads, head_dim, dtype=dtype) for _ in range(2))
    if far:
        q[..., 0], k[..., 0] = FAR, -FAR
    return q, k, v, s.random(2, keys, dtype=torch.float32) if biased else None


def _attention_case(
    s: Any, heads: int, head_dim: int, keys: int, biased: bool, loads: str, far: bool = False
) -> dict:
    import torch

    from nexus_rt.kernels.attention import attention

    # descriptors take 16 bits, and the interpreter computes bfloat16 wrongly
    dtype = torch.float16 if s.dry and loads == "descriptors" else None
    q, k, v, bias = _qkv(s, heads, head_dim, keys, biased, far, dtype)
    mask = None if bias is None else bias[:, None, None].to(q.dtype)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
    ).transpose(1, 2)
    # a score's last place, which the sum of a product may be off by several of
    slack = 4 * FAR**2 / math.sqrt(head_dim) * 2.0**-24 if far else 1e-6
    return compare(attention(q, k, v, bias, loads), _attention64(q, k, v, bias), plain, slack)


def _attention_fp8(s: Any, timed: bool) -> Cases:
    from nexus_rt.kernels.attention_launch import FP8_HEAD_DIMS, LOADS, TIMED

    return {
        f"{'far ' if far else ''}{_attention_label(heads, head_dim, keys, biased)}, {loads}": (
            partial(_attention_fp8_case, s, heads, head_dim, keys, biased, loads, far)
        )
        for heads, head_dim in _heads(s, timed)
        # Triton's interpreter rounds to fp8 wrongly
        if head_dim in FP8_HEAD_DIMS and not s.dry
        for keys, biased in _key_counts(s)
        for far in ((False,) if biased else (False, True))
        for loads in (LOADS[:3] if biased else TIMED)
    }


def _attention_fp8_case(
    s: Any, heads: int, head_dim: int, keys: int, biased: bool, loads: str, far: bool = False
) -> dict:
    from nexus_rt.kernels.attention_fp8 import attention_fp8
    from nexus_rt.ops.attention import APPROXIMATE

    args = _qkv(s, heads, head_dim, keys, biased, far)
    wanted = _attention64(*args)
    share = float((attention_fp8(*args, loads).double() - wanted).norm() / wanted.norm())
    return {"relative_error": share, "allowed": APPROXIMATE, "right": share <= APPROXIMATE}


def _linear_gelu(s: Any, timed: bool) -> Cases:
    widths = {
        c["num_attention_heads"] * c["attention_head_dim"]: c["ffn_dim"]
        for c in reversed(s.configs.values())
    }
    return {
        f"{dim}": partial(_linear_gelu_case, s, dim, inner)
        for dim, inner in widths.items()
        if timed
    }


def _linear_gelu_case(s: Any, dim: int, inner: int) -> dict:
    from nexus_rt.ops.block_ops import TORCH, _linear_gelu_epilogue

    x, bias = s.random(2, 7 if s.dry else 500, dim), s.random(inner)
    weight = s.random(inner, dim) / dim**0.5
    y = x.double() @ weight.double().T + bias.double()
    wanted = 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
    eager = TORCH.linear_gelu(x, weight, bias)
    return compare(_linear_gelu_epilogue(x, weight, bias), wanted, eager)


def _predictions(s: Any, height: int, width: int):
    """Four predictions in the setting's dtype, guidance scales, and the guided velocities in
    float64."""
    four, scales = [s.random(2, 4, 3, height, width) for _ in range(4)], (5.0, 3.0)
    pairs = zip(four[::2], four[1::2], scales, strict=True)
    return four, scales, [u.double() + g * (c.double() - u.double()) for c, u, g in pairs]


def _squares(*velocities):
    import torch

    return torch.stack([v.square().flatten(1).sum(1) for v in velocities])


def _band_blend(s: Any, timed: bool) -> Cases:
    return {
        f"{what}{h}x{w}": partial(_band_blend_case, s, h, w, what)
        for h, w in _planes(s, timed)
        for what in ("", "sums ")
    }


def _band_blend_case(s: Any, height: int, width: int, what: str) -> dict:
    from nexus_rt.kernels.band_blend import band_blend, band_blend_ref

    four, scales, (v_small, v_large) = _predictions(s, height, width)
    got, sums = band_blend(*four, scales, 0.4, 0.42, 0.18, 0.2)
    wanted = 0.4 * v_large + 0.42 * v_small + 0.18 * _stencil64(v_small, 0.2)
    if not what:
        eager = band_blend_ref(*four, scales, 0.4, 0.42, 0.18, 0.2)[0]
        return compare(got, wanted, eager)
    squares = _squares(v_small, v_large, wanted)
    eager = _squares(v_small.float(), v_large.float(), got)
    return compare(sums.sum(-1) / squares, squares / squares, eager / squares)


def _band_filter(s: Any, timed: bool) -> Cases:
    return {
        f"{split} {lowpass} {h}x{w}": partial(_band_filter_case, s, h, w, split, lowpass)
        for h, w in _planes(s, timed)
        for split, lowpass in (("fft", "gaussian"), ("dct", "butterworth"))
    }


def _band_filter_case(s: Any, height: int, width: int, split: str, lowpass: str) -> dict:
    from nexus_rt.kernels.band_filter import band_filter, band_filter_ref
    from nexus_rt.method.filters import split_filter

    four, scales, (v_small, v_large) = _predictions(s, height, width)
    x = v_small - v_large
    f = split_filter(height, width, split, lowpass, 2, 0.43, s.device)
    args = (*four, scales, 0.42, 0.18, f.left, f.right, f.gain)
    wanted = v_large + 0.42 * x + 0.18 * _lowpass64(x, split, lowpass, 0.43)
    return compare(band_filter(*args)[0], wanted, band_filter_ref(*args)[0])


def _solver_step(s: Any, timed: bool) -> Cases:
    return {f"{h}x{w}": partial(_solver_step_case, s, h, w) for h, w in _planes(s, timed)}


def _solver_step_case(s: Any, height: int, width: int) -> dict:
    import torch

    from nexus_rt.kernels.solver_step import solver_step, solver_step_ref

    x, v, last, m1, m2 = (s.random(2, 4, 3, height, width, dtype=torch.float32) for _ in range(5))
    scalars = [0.9, 0.7, -0.2, 0.35, 0.11, 0.83, 0.4, -0.09]
    squares = _squares(x, m1, v).double()
    sums = (squares[..., None] / 700).expand(3, 2, 700).float().contiguous()
    args = (x, v, None, 1.0, sums, "progressive", 0.6, scalars, [last, m1, m2], 3, 2)
    wanted = _step64(x, v, squares, 0.6, scalars, last, m1, m2)
    return compare(solver_step(*args)[0], wanted, solver_step_ref(*args)[0])


def _beyond_int32(s: Any, timed: bool) -> Cases:
    """Tensors of more than 2^31 elements, checked at their end."""
    if s.dry or timed:
        return {}
    kinds = (_modulate_beyond, _qk_norm_rope_beyond, _band_blend_beyond)
    return {f.__name__.strip("_").removesuffix("_beyond"): partial(f, s) for f in kinds}


END = slice(-64, None)


def _modulate_beyond(s: Any) -> dict:
    import torch

    from nexus_rt.kernels.modulate import modulate, modulate_ref

    zeros = torch.zeros(1, 5120, device=s.device)
    x = s.random(1, 430_000, 5120)
    got = modulate(x, zeros, zeros, 1e-6)[1][:, END]
    last = x[:, END].clone()
    eager = modulate_ref(last, zeros, zeros, 1e-6)[1]
    return compare(got, _layer_norm64(last.double(), zeros, zeros), eager)


def _qk_norm_rope_beyond(s: Any) -> dict:
    import torch

    from nexus_rt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

    qkv, weight = s.random(1, 145_000, 3 * 5120), s.random(5120)
    angle = s.random(145_000, 64, dtype=torch.float32)
    got = qk_norm_rope(qkv, weight, weight, angle.cos(), angle.sin(), 40, 1e-6)[1][:, END]
    last, turn = qkv[:, END].clone(), angle[END].clone()
    eager = qk_norm_rope_ref(last, weight, weight, turn.cos(), turn.sin(), 40, 1e-6)[1]
    return compare(got, _rope64(last.double().chunk(3, -1)[1], weight, turn, 40), eager)


def _band_blend_beyond(s: Any) -> dict:
    from nexus_rt.kernels.band_blend import band_blend, band_blend_ref

    small, rest = s.random(1, 16, 9400, 90, 160), (None, None, None, (1.0, 1.0), 0.0, 0.7, 0.3, 0.2)
    got = band_blend(small, *rest)[0][:, -1, END]
    last = small[:, -1, END].clone()[:, None]
    wanted = 0.7 * last.double() + 0.3 * _stencil64(last.double(), 0.2)
    return compare(got[:, None], wanted, band_blend_ref(last, *rest)[0])


CHECKS: dict[str, Callable[[Any, bool], Cases]] = {
    "modulate": _modulate,
    "qk_norm_rope": _qk_norm_rope,
    "linear_gelu": _linear_gelu,
    "attention": _attention,
    "band_blend": _band_blend,
    "solver_step": _solver_step,
    "band_filter": _band_filter,
    "modulate_rows": _modulate_rows,
    "quantise_rows": _rows,
    "attention_fp8": _attention_fp8,
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
