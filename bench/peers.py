"""What users would run instead, in the same process, with the same weights, seed and embeddings.

diffusers     `WanPipeline` with the large generator alone, against our plan `large`
switch        `WanPipeline` with `transformer_2` and `boundary_ratio`, against ours with its switch
naive         the paper's schedule as written down, with diffusers' models, against `reference`
naive-ours    the same with our transformers and decoder, so that the schedule alone differs

"+compile" after the first two: their transformers through `torch.compile`. Each pair is compared
before it is timed, and timed in turn: ours, theirs, ours, theirs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_rt.bench.failures import failure
from nexus_rt.bench.latency import Clip, scales_of
from nexus_rt.bench.measure import interleaved, ratio_of, summary
from nexus_rt.bench.quality import distance
from nexus_rt.components.context import unpad
from nexus_rt.core.errors import InputError, choose
from nexus_rt.core.limits import Scale
from nexus_rt.engines.experts import ExpertsEngine
from nexus_rt.loading.layouts import to_diffusers
from nexus_rt.loading.packing import check_dense
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.plan import Plan
from nexus_rt.method.solver import make_solver
from nexus_rt.method.upfb import published_blend
from nexus_rt.models.wan import WanTransformer
from nexus_rt.pipeline.pipeline import NexusPipeline

Call = Callable[[], tuple[Tensor, Any]]  # final latents, and frames where there is a VAE
PEERS = ("diffusers", "diffusers+compile", "switch", "switch+compile", "naive", "naive-ours")
SWITCH_AT = 0.3  # of the steps


def parse_peers(text: str | None) -> tuple[str, ...]:
    """Names of `--vs`: "diffusers" stands for the pipeline and its switch, "naive" for both forms,
    "all" for everything."""
    groups = {"diffusers": ("diffusers", "switch"), "naive": ("naive", "naive-ours"), "all": PEERS}
    chosen: dict[str, None] = {}
    for name in (text or "").split(","):
        if name.strip():
            chosen |= dict.fromkeys(
                groups.get(name.strip()) or (choose("peer", name.strip(), PEERS),)
            )
    return tuple(chosen)


def diffusers_transformer(model: WanTransformer) -> Any:
    """diffusers' transformer on the same memory as ours.

    Raises:
        InputError: its weights are quantised, which diffusers' layers do not hold.
    """
    check_dense(model)
    from diffusers import WanTransformer3DModel
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    config = asdict(model.config)
    taken = {
        k: v
        for k, v in config.items()
        if k in inspect.signature(WanTransformer3DModel.__init__).parameters
    }
    with torch.device("meta"):
        theirs: Any = WanTransformer3DModel(**taken)
    theirs.load_state_dict(to_diffusers(dict(model.named_parameters())), assign=True)
    c = theirs.config
    theirs.rope = WanRotaryPosEmbed(c.attention_head_dim, c.patch_size, c.rope_max_seq_len).to(
        model.device
    )
    return theirs.eval()


def diffusers_decoder(decoder: Any) -> Any:
    """diffusers' VAE of a decoder's weights, in the layout that diffusers reads them in."""
    decoder.load()
    return copy.deepcopy(decoder.model).to(memory_format=torch.contiguous_format)


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """A clip in [-1, 1], [B, 3, F, H, W], by diffusers' VAE."""
    mean, std = (
        torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1).to(latents)
        for name in ("latents_mean", "latents_std")
    )
    video: Tensor = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
    return video


class Peers:
    """The others, made of a PyTorch pipeline when they are first asked for."""

    def __init__(self, pipe: NexusPipeline, clip: Clip, scales: tuple[Scale, Scale]) -> None:
        self.pipe, self.clip, self.scales = pipe, clip, scales
        self.models: dict[str, Any] = {}
        self.vae: Any = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The prompt, or its embeddings, as a call of ours takes them."""
        own = self.clip
        return {"prompt": own.prompt} if own.prompt else own.embeds

    def noise(self) -> Tensor:
        return self.clip.noise(self.pipe)

    def transformer(self, name: str) -> Any:
        if name not in self.pipe.engines:
            raise InputError(
                f"it runs the {name} generator, which is not loaded", code="missing", param=name
            )
        if isinstance(self.pipe.engines[name], ExpertsEngine):
            raise InputError(
                f"the {name} generator has two experts; one transformer is compared",
                code="unsupported",
                param=name,
            )
        if name not in self.models:
            self.models[name] = diffusers_transformer(self.pipe.engines[name].model)
        return self.models[name]

    def decoder(self) -> Any:
        if self.vae is None and self.pipe.vae is not None:
            self.vae = diffusers_decoder(self.pipe.vae)
        return self.vae

    def scheduler(self) -> Any:
        """diffusers' UniPC on Wan's published time grid, whatever number of steps it is asked for:
        its own grid differs by up to 5e-3 in sigma, and another grid is another clip."""
        from diffusers import UniPCMultistepScheduler

        grid = self.pipe.make_plan("large", self.clip.steps).grid

        class OnOurGrid(UniPCMultistepScheduler):
            def set_timesteps(self, count: int, device: Any = None, **ignored: Any) -> None:
                parent: Any = super()
                parent.set_timesteps(count, device=device)
                self.sigmas = torch.tensor(grid.sigmas)
                self.timesteps = torch.tensor(grid.timesteps, device=device)

        shift = self.pipe.defaults.shift
        return OnOurGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)

    def stepper(self, plan: Plan, device: torch.device) -> Callable[[int, Tensor, Tensor], Tensor]:
        """(index, velocity, latents) -> latents by diffusers' UniPC; by ours where diffusers is not
        installed: they agree to 1e-5."""
        if find_spec("diffusers") is None:
            solver = make_solver("unipc", plan.grid)
            return lambda index, velocity, latents: solver.step(index, latents, velocity)
        scheduler = self.scheduler()
        scheduler.set_timesteps(len(plan), device=device)
        return lambda index, velocity, latents: scheduler.step(
            velocity, scheduler.timesteps[index], latents, return_dict=False
        )[0]

    def ours(self, plan: str, **prompt: Any) -> Call:
        """A call of our pipeline: final latents and frames."""
        inputs: dict[str, Any] = {**self.clip.size.options, **prompt}

        def call() -> tuple[Tensor, np.ndarray | None]:
            latents = self.pipe(
                num_inference_steps=self.clip.steps_of(plan),
                plan=plan,
                latents=self.noise(),
                output_type="latent",
                guidance_scale=self.scales[0],
                guidance_scale_2=self.scales[1],
                **inputs,
            ).frames
            return latents, self.pipe.decode(latents, "np") if self.pipe.vae is not None else None

        return call

    def embeddings(self) -> dict[str, Tensor]:
        """Embeddings for both sides; both of our generators read the text, as theirs do."""
        embeds = self.clip.embeds
        if self.pipe.context is not None:
            names = {
                "context_embeds": "prompt_embeds",
                "negative_context_embeds": "negative_prompt_embeds",
            }
            embeds = {**embeds, **{ours: embeds[name] for ours, name in names.items()}}
        return embeds

    def wan_pipeline(self, switch: bool, compiled: bool) -> tuple[Call, Call, str]:
        """Ours, diffusers' pipeline, and our plan."""
        from diffusers import WanPipeline

        grid = self.pipe.make_plan("large", self.clip.steps).grid
        at, guidance = (
            max(1, round(SWITCH_AT * self.clip.steps)),
            {"guidance_scale": self.scales[1]},
        )
        plan, parts = "large", {"transformer": self.transformer("large")}
        if switch:
            plan = f"small:{at} large:*"
            parts = {
                "transformer": self.transformer("small"),
                "transformer_2": self.transformer("large"),
            }
            parts["boundary_ratio"] = (
                float(grid.timesteps[at - 1]) + float(grid.timesteps[at])
            ) / 2000
            guidance = {"guidance_scale": self.scales[0], "guidance_scale_2": self.scales[1]}
        if compiled:
            for name in ("transformer", "transformer_2"):
                if name in parts:
                    parts[name] = copy.copy(parts[name])
                    parts[name].compile()
        vae = self.decoder()
        theirs: Any = WanPipeline(
            tokenizer=None, text_encoder=None, vae=vae, scheduler=self.scheduler(), **parts
        )
        theirs.set_progress_bar_config(disable=True)
        embeds = self.clip.embeds

        def call() -> tuple[Tensor, np.ndarray | None]:
            latents = theirs(
                **self.clip.size.options,
                num_inference_steps=self.clip.steps,
                latents=self.noise(),
                output_type="latent",
                **guidance,
                **embeds,
            ).frames
            if vae is None:
                return latents, None
            video = decoded(vae, latents)
            return latents, theirs.video_processor.postprocess_video(video, output_type="np")

        return self.ours(plan, **self.embeddings()), call, plan

    def connected(self) -> Callable[[int, Tensor], Tensor]:
        """(branch, text embeddings) -> the small generator's context, its connector run anew;
        branch 0 is conditional.

        Raises:
            InputError: there is no text, which the understanding model reads.
        """
        from nexus_rt.models.coders import clean_prompt

        context: Any = self.pipe.context
        if self.clip.prompt is None:
            raise InputError(
                "the small generator is steered by a prompt's text, and embeddings are given",
                code="missing",
                param="prompt",
            )
        connect, read = context.connector, context.understanding.hidden_states
        stored = connect.unconditional_hidden
        hidden = (
            read(clean_prompt(self.clip.prompt)),
            read("") if stored is None else stored.reshape(1, -1, stored.shape[-1]),
        )
        return lambda branch, rows: connect.pack(unpad(rows[0]), connect(hidden[branch])[0])[None]

    def naive(self, own: bool) -> tuple[Call, Call, str]:
        """Ours, the paper's schedule written down: both generators at every step, each guided by
        two calls, the connector run for every one of the small one's, four bands a blend."""
        pipe, clip = self.pipe, self.clip
        plan = pipe.make_plan("reference", clip.steps)
        models = {
            n: pipe.engines[n].model if own else self.transformer(n) for n in ("small", "large")
        }
        vae = None if own else self.decoder()

        def velocity(name: str, latents: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
            model = models[name]
            if own:
                return model(latents, timestep, model.prepare_context(rows))
            return model(latents.to(rows.dtype), timestep[None], rows, return_dict=False)[0].float()

        @torch.no_grad()
        def call() -> tuple[Tensor, np.ndarray | None]:
            text = pipe.encode_prompt(clip.prompt) if clip.prompt else tuple(clip.embeds.values())
            steered = None if pipe.context is None else self.connected()
            latents, velocities = self.noise(), {}
            solve = self.stepper(plan, latents.device)
            for step in plan.steps:
                t = torch.tensor(step.timestep, device=latents.device)
                for name, default in zip(("small", "large"), self.scales, strict=True):
                    scale = step.scale(name, default)
                    pair = []
                    for branch in (0, 1) if scale != 1.0 else (0,):
                        rows = text[branch]
                        if name == "small" and steered is not None:
                            rows = steered(branch, rows)
                        pair.append(velocity(name, latents, t, rows))
                    velocities[name] = pair[-1] + scale * (pair[0] - pair[-1])
                blended = published_blend(
                    velocities["small"], velocities["large"], step.w, BlendConfig()
                )
                latents = solve(step.index, blended, latents)
            if own or vae is None:
                return latents, pipe.decode(latents, "np") if pipe.vae is not None else None
            frames = decoded(vae, latents).add(1).div(2).clamp(0, 1).permute(0, 2, 3, 4, 1)
            return latents, frames.float().cpu().numpy()

        prompt = {**self.inputs, "rewrite": "off"} if clip.prompt else clip.embeds
        return self.ours("reference", **prompt), call, "reference"

    def pair(self, name: str) -> tuple[Call, Call, str]:
        kind, _, compiled = name.partition("+")
        if kind.startswith("naive"):
            return self.naive(own=kind == "naive-ours")
        return self.wan_pipeline(kind == "switch", bool(compiled))


def measure_peers(
    pipe: NexusPipeline,
    names: tuple[str, ...],
    clip: Clip,
    runs: int,
    warmup: int,
    others: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """A row for every peer; others: plans of ours that are timed in turn with the naive schedule,
    their distance shown.

    Returns:
        Rows {"peer", "plan", "ours_ms", "theirs_ms", "ratio" (theirs over ours, the median over
        pairs), "difference", "psnr_db", ...}, or {"peer", "failed": why}.
    """
    made = Peers(pipe, clip, scales_of(pipe))
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            ours, theirs, plan = made.pair(name)
            calls: dict[str, Call] = {plan: ours}
            if name.startswith("naive"):
                calls |= {p: made.ours(p, **made.inputs) for p in others if p != plan}
            wanted, distances = theirs(), {}
            for p, call in calls.items():
                latents, frames = call()
                distances[p] = distance(latents, frames, *wanted)
            timed = interleaved({**calls, "": theirs}, pipe.device, runs, warmup)
        except ImportError as error:
            rows.append(
                {"peer": name, "failed": f"{error.name or 'a package'} is not installed here"}
            )
            continue
        except Exception as error:  # a row that says so, not the end of the others
            rows.append({"peer": name, "failed": failure(error)})
            continue
        their_ms = [r.total_ms for r in timed[""]]
        for p in calls:
            ms = [r.total_ms for r in timed[p]]
            rows.append(
                {
                    "peer": name,
                    "plan": p,
                    "same_mathematics": p == plan,
                    "ours_ms": summary(ms),
                    "theirs_ms": summary(their_ms),
                    "ratio": float(f"{ratio_of(ms, their_ms):.4g}"),
                    **distances[p],
                }
            )
    return rows
