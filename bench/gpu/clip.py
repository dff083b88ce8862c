"""Decoding, and few-step clips from embeddings to mp4 by part, in the GPU suite; diffusers' step
and decoding beside them.

Weights are random: times are those of real ones, but frames are close to noise, which an mp4
takes longer to write than a real clip's.
"""

from __future__ import annotations

import tempfile
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from nexus_rt.bench.gpu import estimates
from nexus_rt.bench.gpu.pipeline import Clip
from nexus_rt.bench.gpu.setting import figure
from nexus_rt.bench.gpu.units import NOT_REACHED, Unit
from nexus_rt.bench.gpu.wheels import absent

FEW = 4  # steps of a plan without clocks
# plan -> forwards of the small and of the large generator; few-step models run without guidance
PLANS = {"small:2 bridge:1 large:1": (3, 2), "small:4/10 large:4": (4, 4)}
CHUNKS = 3  # latent frames that decoding has kernels of its own for: first, second and the rest


class Decoders:
    """Wan's VAE of the same random weights in each dtype, and float32's frames of one clip."""

    def __init__(self, s: Any) -> None:
        self.s = s
        self.made: dict[str, Any] = {}

    @cached_property
    def latents(self) -> Any:
        import torch

        return self.s.random(1, 16, *self.s.size.latent, dtype=torch.float32)

    def decoder(self, dtype: str) -> Any:
        """A decoder whose kernels are chosen."""
        import torch

        from nexus_rt.bench.presets import RandomDecoder

        if dtype not in self.made:
            made = RandomDecoder(self.s.device, self.s.decoder, getattr(torch, dtype))
            made.decode(self.latents[:, :, :CHUNKS])
            self.made[dtype] = made
        return self.made[dtype]

    @cached_property
    def usual(self) -> Any:
        return self.decoder("float32").decode(self.latents)


def vae(s: Any) -> dict[str, Unit]:
    """A row a dtype: one clip decoded as the runtime does it."""
    made = cache(partial(Decoders, s))
    decode = estimates.FACTOR * estimates.timed_s(estimates.decode_s(s), 3, 1)
    return {
        "float32": Unit(partial(_decoded, made, "float32"), 60.0, estimates.DIFFUSERS_S + decode),
        "bfloat16": Unit(partial(_decoded, made, "bfloat16"), 60.0, decode),
    }


def _decoded(made: Any, dtype: str) -> dict:
    """Its time, its share of the products' rate (TF32's for float32, which convolutions use), and
    how far its frames are from float32's."""
    import torch

    from nexus_rt.bench.work import decode_flops

    if why := absent("diffusers"):
        return {NOT_REACHED: why}
    own = made()
    s, decoder, peak = own.s, own.decoder(dtype), own.s.peak()
    wanted = own.usual
    got = wanted if dtype == "float32" else decoder.decode(own.latents)
    ms = s.ms(lambda: decoder.decode(own.latents), 3, 0)
    roof = "tf32_matmul_tflops" if dtype == "float32" else "matmul_tflops"
    row = s.of_roof(ms, flops=decode_flops(s.size, s.decoder), matmul=roof)
    if not torch.isfinite(got).all():
        return {"failed": f"frames in {dtype} are not finite"}
    row["difference"] = float((got - wanted).norm() / wanted.norm())
    return {**row, **peak(), **estimates.predicted(s, estimates.decode_s(s))}


class FewStep(Clip):
    """A pair of true architectures, whose kernels are compiled and chosen by one denoising and some
    decoding."""

    def __init__(self, s: Any) -> None:
        super().__init__(s)
        self.noise = self.clip.noise(self.pipe)
        self.latents(next(iter(PLANS)), FEW)
        if self.vae is not None:
            self.vae.decode(self.noise[:, :, :CHUNKS])

    def latents(self, plan: str, steps: int | None) -> Any:
        """A plan's latents from noise and embeddings."""
        return self.pipe(
            plan=self.pipe.make_plan(plan, steps),
            latents=self.noise,
            guidance_scale=1.0,
            output_type="latent",
            **self.s.size.options,
            prompt_embeds=self.embeds["prompt_embeds"],
        ).frames

    def write(self, plan: str, path: Path | None) -> None:
        """A clip to an mp4; path None: to the frames that would be written."""
        from nexus_rt.core.tracing import span
        from nexus_rt.media.frames import as_output, to_uint8
        from nexus_rt.media.video import save_video
        from nexus_rt.method.plan_options import has_clocks

        latents = self.latents(plan, None if has_clocks(plan) else FEW)
        if self.vae is None:
            return
        frames = self.vae.decode(latents)
        with span("to host"):
            array = as_output(frames, "np")[0]
        with span("uint8"):
            images = to_uint8(array)
        if path is not None:
            with span("mp4"):
                save_video(images, path)


def units(s: Any) -> dict[str, Unit]:
    """A row a few-step plan; diffusers' step of the large generator and its decoding, ours beside
    each."""
    made = cache(partial(FewStep, s))
    small, large = (s.configs[name] for name in s.names)
    load = estimates.DIFFUSERS_S + estimates.weights_s(small, large) + estimates.compile_s(4)
    load += sum(estimates.trial_s(s, config, 1) for config in (small, large))
    load += estimates.denoise_s(s, *next(iter(PLANS.values())))
    rows = {}
    for plan, forwards in PLANS.items():
        seconds = load + estimates.clip_s(s, *forwards)
        rows[plan], load = Unit(partial(_few, made, plan), 90.0, seconds), 0.0
    pair = estimates.FACTOR + estimates.PEER_FACTOR
    step, decode = estimates.forward_s(s, large, 1), estimates.decode_s(s)
    rows["diffusers' step"] = Unit(partial(_peer_step, made), 60.0, pair * estimates.timed_s(step))
    rows["diffusers' decoding"] = Unit(
        partial(_peer_decode, made), 60.0, pair * estimates.timed_s(decode)
    )
    return rows


def _few(made: Any, plan: str) -> dict:
    """Milliseconds from embeddings to mp4, by part, after one warm-up of every kernel."""
    from nexus_rt.bench.measure import measured

    own = made()
    without = {"vae": absent("diffusers"), "mp4": absent("av")}
    with tempfile.TemporaryDirectory() as folder:
        path = None if without["mp4"] else Path(folder) / "clip.mp4"
        run = measured(lambda: own.write(plan, path), own.s.device)
        size = path.stat().st_size if path is not None and path.exists() else None
    spent = run.trace.totals()
    denoise = sum(stop - start for start, stop in run.trace.steps().values())
    row = {
        "ms": figure(run.total_ms),
        "denoise_ms": figure(denoise),
        "parts_ms": {name: figure(ms) for name, ms in spent.items()},
        "mp4_bytes": size,
        "peak_device_bytes": run.peak_device,
        "energy_joules": run.energy,
    }
    row |= estimates.predicted(own.s, estimates.denoise_s(own.s, *PLANS[plan]) / estimates.FACTOR)
    return row | {f"{name}_why": why for name, why in without.items() if why}


def _beside(s: Any, ours: Any, theirs: Any) -> dict:
    """Both timed after both are compared."""
    import torch

    with torch.no_grad():
        wanted, got = ours().float(), theirs().float()
        difference = float((got - wanted).norm() / wanted.norm())
        ms = {"ours_ms": s.ms(ours, 2, 0), "ms": s.ms(theirs, 2, 0)}
    row = {name: figure(value) for name, value in ms.items()}
    return {**row, "against_ours": figure(ms["ms"] / ms["ours_ms"]), "difference": difference}


def _peer_step(made: Any) -> dict:
    """diffusers' transformer on the large generator's weights, one sample, as few-step plans run
    it."""
    import torch

    if why := absent("diffusers"):
        return {NOT_REACHED: why}
    from nexus_rt.bench.peers import diffusers_transformer

    own = made()
    engine, embeds = own.pipe.engines["large"], own.embeds["prompt_embeds"]
    theirs, context = diffusers_transformer(engine.model), engine.prepare(embeds)
    timestep = torch.tensor(700.0, device=own.s.device)
    narrow = own.noise.to(own.s.dtype)
    return _beside(
        own.s,
        lambda: engine.velocity(own.noise, timestep, context),
        lambda: theirs(narrow, timestep[None], embeds, return_dict=False)[0],
    )


def _peer_decode(made: Any) -> dict:
    """diffusers' own decoding of the same weights, in its own layout."""
    if why := absent("diffusers"):
        return {NOT_REACHED: why}
    from nexus_rt.bench.peers import diffusers_decoder

    own = made()
    theirs = diffusers_decoder(own.vae)
    mean, std = own.vae._statistics(own.s.device)
    z = own.noise * std + mean

    def decode() -> Any:
        video = theirs.decode(z, return_dict=False)[0]
        return video.float().add_(1).div_(2).clamp_(0, 1).transpose(1, 2)

    return _beside(own.s, lambda: own.vae.decode(own.noise), decode)
