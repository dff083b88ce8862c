"""A step of each generator at its true size in the GPU suite: guided (two samples in one batch)
first, diffusers' eager beside it, then its variants, and where its time goes.

diffusers' transformer reads the same weights and inputs; its guided step is two forwards, as its
pipeline takes it.
"""

from __future__ import annotations

from functools import cache, cached_property, partial
from typing import Any

from nexus_rt.bench.gpu import estimates
from nexus_rt.bench.gpu.setting import figure
from nexus_rt.bench.gpu.units import NOT_REACHED, Unit
from nexus_rt.bench.gpu.wheels import absent
from nexus_rt.bench.presets import random_transformer

BATCH = 2
MODEL_S = 60.0  # for the model too, which the first row of a process makes
KINDS = {  # of kernels, by parts of their names
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "quantise": ("_quantise",),
    "linear": ("gemm", "cutlass", "nvjet", "xmma", "gemv", "cublas"),
    "norms and RoPE": ("_modulate_kernel", "_qk_norm_rope_kernel", "norm"),
}


class Step:
    """A model, its inputs and what its step came to, made when they are first asked for."""

    def __init__(self, s: Any, name: str, kernels: str) -> None:
        self.s, self.config, self.kernels = s, s.configs[name], kernels

    @cached_property
    def model(self) -> Any:
        return random_transformer(self.config, self.s.dtype, self.s.device)

    @cached_property
    def latents(self) -> Any:
        import torch

        return self.s.random(1, 16, *self.s.size.latent, dtype=torch.float32)

    @cached_property
    def timestep(self) -> Any:
        import torch

        return torch.tensor(700.0, device=self.s.device)

    @cached_property
    def embeds(self) -> Any:
        """Of a prompt of 40 tokens and of an empty one, padded as Wan pads them."""
        import torch

        width = self.model.config.text_dim
        rows = torch.zeros(BATCH, 512, width, dtype=self.s.dtype, device=self.s.device)
        rows[0, :40], rows[1, :1] = self.s.random(40, width), self.s.random(1, width)
        return rows

    def flops(self, batch: int) -> float:
        """Of a forward's matrix products and attention."""
        from nexus_rt.bench.work import forward_work

        work = forward_work(self.model.config, self.s.size)
        return batch * (work.linear + work.attention)

    @cached_property
    def small(self) -> Any:
        """The model with its linear layers in fp8, activations too; what is not quantised is
        shared."""
        import torch

        from nexus_rt.loading.packing import pack_model
        from nexus_rt.models.wan import WanTransformer

        with torch.device("meta"):
            model = WanTransformer(self.model.config)
        model.load_state_dict(dict(self.model.named_parameters()), assign=True)
        pack_model(model, "fp8-dynamic")
        return model.eval()

    def call(self, kernels: str, attention: str, batch: int = BATCH, fp8: bool = False) -> Any:
        """A step of ours."""
        from nexus_rt.engines.torch import TorchEngine

        model = (self.small if fp8 else self.model).use_kernels(kernels, attention)
        engine = TorchEngine(model)
        context = engine.prepare(self.embeds[:batch])
        return lambda: engine.velocity(self.latents, self.timestep, context)

    @cached_property
    def usual(self) -> Any:
        """The step's velocity, as the runtime takes it."""
        return self.call(self.kernels, self.s.attention)().float()

    @cached_property
    def theirs(self) -> Any:
        from nexus_rt.bench.peers import diffusers_transformer

        return diffusers_transformer(self.model)

    def predicted(self, batch: int = BATCH, fp8: bool = False, fp8_attention: bool = False) -> dict:
        """What `bench/roofline.py` says of this card: {"predicted_ms"}, or nothing."""
        import torch

        from nexus_rt.bench.roofline import predicted_row

        if self.s.device.type != "cuda":
            return {}
        device = torch.cuda.get_device_name()
        found = predicted_row(self.config, self.s.size, device, batch, fp8, fp8_attention)
        return {} if found is None else {"predicted_ms": found}

    def timed(self, call: Any, batch: int = BATCH, usual: bool = False) -> dict:
        """Milliseconds, rate, peak memory, and how far the velocity is from the usual one.

        usual: it is the usual one itself.
        """
        import torch

        with torch.no_grad():
            wanted, peak = self.usual if batch == BATCH and not usual else None, self.s.peak()
            got = call()  # warms up too
            row = {**self.s.of_roof(self.s.ms(call, 2, 0), flops=self.flops(batch)), **peak()}
        if usual:
            self.usual = got.float()
        if wanted is not None:
            row["difference"] = float((got.float() - wanted).norm() / wanted.norm())
        return row


def large(s: Any) -> dict[str, Unit]:
    """The large generator's step."""
    return _units(s, s.names[1], "triton" if s.dry else s.kernels)


def small(s: Any) -> dict[str, Unit]:
    """The small generator's."""
    return _units(s, s.names[0], s.kernels)


def _units(s: Any, name: str, kernels: str) -> dict[str, Unit]:
    step = cache(partial(Step, s, name, kernels))
    rows = {
        "guided": partial(_guided, step),
        "guided, diffusers": partial(_diffusers, step, False),
        "guided, fp8 linear": partial(_fp8, step, None),
        "guided, fp8 linear and attention": partial(_fp8, step, "auto-fp8"),
        "where the time goes": partial(_profile, step, False),
        "guided, fp8 attention": partial(_variant, step, "auto", "auto-fp8"),
        "plain": partial(_plain, step),
        "guided, replayed": partial(_replayed, step),
        "guided, PyTorch's kernels": partial(_variant, step, "torch", "sdpa"),
        "where the time goes in fp8": partial(_profile, step, True),
    }
    return {label: Unit(call, MODEL_S, _estimate(s, name, label)) for label, call in rows.items()}


def _estimate(s: Any, name: str, label: str) -> float:
    """Predicted seconds of a headline row: the guided step and diffusers' of both generators, and
    the large one's in fp8."""
    config, large = s.configs[name], name == s.names[1]
    if label == "guided":
        return estimates.weights_s(config) + estimates.step_s(s, config, 4 if large else 2)
    if label == "guided, diffusers":
        return estimates.peer_step_s(s, config)
    if large and label == "guided, fp8 linear":
        return estimates.weights_s(config) + estimates.step_s(s, config, 2, fp8=True)
    if large and label == "guided, fp8 linear and attention":
        return estimates.step_s(s, config, 2, fp8=True, fp8_attention=True)
    return 0.0


def compiled(s: Any) -> dict[str, Unit]:
    """The guided step with its blocks compiled, ours and diffusers', of both generators."""
    rows = {}
    for name in dict.fromkeys(reversed(s.names)):
        step = cache(partial(Step, s, name, s.kernels))
        rows[f"{name} guided, blocks compiled"] = Unit(partial(_compiled, step), 120.0)
        rows[f"{name} guided, diffusers, blocks compiled"] = Unit(
            partial(_diffusers, step, True), 120.0
        )
    return rows


def _guided(step: Any) -> dict:
    own = step()
    row = own.timed(own.call(own.kernels, own.s.attention), usual=True)
    return {
        **row,
        **own.predicted(),
        "tokens": own.s.tokens,
        "kernels": own.model.ops.name,
        "attention": _attended(own),
    }


def _attended(own: Any) -> str:
    """The backend that self-attention ran by."""
    from nexus_rt.ops.attention import Case, decide

    backend = own.model.blocks[0].attn1.backend
    if own.s.device.type != "cuda" or backend != "auto":
        return backend
    c = own.model.config
    shape = (own.s.tokens, own.s.tokens, c.num_attention_heads, c.attention_head_dim)
    return decide(Case(BATCH, *shape, own.s.dtype, own.s.device, False))["chosen"]


def _variant(step: Any, kernels: str, attention: str) -> dict:
    own = step()
    kernels = own.kernels if kernels == "auto" else kernels
    return own.timed(own.call(kernels, attention))


def _plain(step: Any) -> dict:
    own = step()
    return own.timed(own.call(own.kernels, own.s.attention, 1), 1)


def _fp8(step: Any, attention: str | None) -> dict:
    from nexus_rt.loading.packing import formats_of

    own = step()
    kernels = "torch" if {"modulate_rows", "quantise_rows"} & own.s.wrong else own.kernels
    row = own.timed(own.call(kernels, attention or own.s.attention, fp8=True))
    predicted = own.predicted(fp8=True, fp8_attention=attention is not None)
    return {**row, **predicted, "layers": formats_of(own.small)}


def _replayed(step: Any) -> dict:
    import torch

    own = step()
    if own.s.device.type != "cuda":
        return {"why": "CUDA graphs are of a GPU"}
    call = own.call(own.kernels, own.s.attention)
    with torch.no_grad():
        ms = own.s.ms(call, 3, 1, graph=True)
    return own.s.of_roof(ms, flops=own.flops(BATCH))


def _compiled(step: Any) -> dict:
    own = step()
    if own.s.dry:
        return {"why": "nothing is compiled in a dry run"}
    own.usual  # noqa: B018
    for block in own.model.blocks:
        block.compile()
    return own.timed(own.call("torch", "sdpa"))


def _diffusers(step: Any, compile_blocks: bool) -> dict:
    import torch

    if why := absent("diffusers"):
        return {NOT_REACHED: why}
    own = step()
    if compile_blocks and own.s.dry:
        return {"why": "nothing is compiled in a dry run"}
    for block in own.theirs.blocks if compile_blocks else ():
        block.compile()
    latents, timestep = own.latents.to(own.s.dtype), own.timestep[None]

    def call() -> Any:
        parts = [
            own.theirs(latents, timestep, rows[None], return_dict=False)[0] for rows in own.embeds
        ]
        return torch.cat(parts)

    return own.timed(call)


def _profile(step: Any, fp8: bool) -> dict:
    """Milliseconds of the GPU's kernels in one step, by kind, and the longest of them by name."""
    from torch.profiler import ProfilerActivity, profile

    own = step()
    call = own.call(own.kernels, own.s.attention, fp8=fp8)
    call()
    cuda = own.s.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        call()
        own.s.synchronize()
    spent: dict[str, float] = {}
    for event in seen.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            spent[event.key] = spent.get(event.key, 0.0) + us / 1000
    kinds: dict[str, float] = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, ms in spent.items():
        kinds[kind_of(name)] += ms
    longest = sorted(spent, key=spent.__getitem__, reverse=True)[:8]
    return {
        **{f"{kind} ms": figure(ms) for kind, ms in kinds.items()},
        "longest": {name[:90]: figure(spent[name]) for name in longest},
    }


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    low = kernel.lower()
    return next((k for k, words in KINDS.items() if any(w in low for w in words)), "other")
