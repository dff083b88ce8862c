"""NexusPipeline: prompts in, frames out, through a small and a large generator of one latent
space."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nexus_rt.call import Call
from nexus_rt.checks import prompt_lists
from nexus_rt.engines.experts import boundaries, change_loras, engines_by_name
from nexus_rt.engines.protocol import Sized, able
from nexus_rt.errors import ModelError, choose
from nexus_rt.latents import LatentGrid, random_latents
from nexus_rt.loading.lora import Lora, LoraSource, loras_hash, parse_loras
from nexus_rt.loading.packing import check_weights, formats_of
from nexus_rt.loading.pair import Loaded, default_device, default_dtype, load_engines, load_models
from nexus_rt.loading.pair_folder import MINI, find_pair
from nexus_rt.memory.residency import (
    STEP,
    MemoryUse,
    ResidencyPlan,
    call_parts,
    parse_bytes,
    plan_residency,
)
from nexus_rt.models.text import MAX_SEQUENCE_LENGTH
from nexus_rt.parallel.layout import Mesh, mesh_of
from nexus_rt.plan import Plan, Scale
from nexus_rt.process import LOADING, computes
from nexus_rt.recipes import find_recipes, with_recipes
from nexus_rt.renamed import warn_old
from nexus_rt.request import OUTPUT_TYPES, CallInputs, Schedule, make_plan, make_request
from nexus_rt.reuse import ReuseError
from nexus_rt.rewriting import (
    TIMEOUT,
    Cache,
    Rewriter,
    Rewriting,
    check_rewrite,
    rewrite_prompts,
)
from nexus_rt.size import ClipSize
from nexus_rt.step_runners import Prompt
from nexus_rt.upfb import BlendConfig
from nexus_rt.video import as_output

if TYPE_CHECKING:
    from nexus_rt.parallel.sharing import Parallel

Generator = str | Path | tuple[str | Path, str | Path]  # a source, or those of two experts
GENERATOR_BACKENDS = ("torch",)  # engine backends that can run a generator


@dataclass
class NexusOutput:
    """A call's result.

    frames: as `output_type` asks: np [B, F, H, W, 3] in [0, 1], pt [B, F, 3, H, W], pil lists, or
        latents.
    plan: what was walked. rewriting: what the large generator read instead of the prompt, None
        where it read the prompt. reuse_errors: with `reuse_parity`, of every reused step.
    """

    frames: Any
    plan: Plan
    reuse_errors: list[ReuseError] | None = None
    rewriting: Rewriting | None = None


class NexusPipeline:
    """Text to video through one or two generators. Build it with `from_pretrained`.

    Pipelines may be loaded and called from several threads; calls of one pipeline run one after the
    other. A process that was forked from one that had called is refused with an error (start
    workers with 'spawn').

    Attributes:
        engines: "small" and "large", those that were given, behind the engine protocol;
            step_engine: both in one graph.
        text, vae: the text encoder and the video decoder, loaded on first use; `drop()` frees
            either.
        context: understanding model and connector, which make the small generator's context; None
            where a pair has none and both generators read the text. `drop()` frees it.
    """

    def __init__(
        self,
        loaded: Loaded,
        device: torch.device,
        keep_encoders: bool = True,
        kernels: str = "auto",
        vram: str | int | None = None,
    ) -> None:
        self.engines, self.text, self.vae, self.context = (
            loaded.engines,
            loaded.text,
            loaded.vae,
            loaded.context,
        )
        self.step_engine, self.defaults, (self.channels, self.patch) = (
            loaded.step,
            loaded.defaults,
            loaded.space,
        )
        self.identity = loaded.identity
        self.device, self.keep_encoders, self.kernels = device, keep_encoders, kernels
        self.vram = None if vram is None else parse_bytes(str(vram))
        self.progress: dict[str, Any] = {}
        self._cancel = threading.Event()
        self._interrupt = False
        self._calling = threading.RLock()
        self._rewritten = Cache()
        self.parallel: Parallel | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str | Path | None = None,
        *,
        small: Generator | None = None,
        large: Generator | None = None,
        boundary_ratio: float | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        understanding: str | Path | None = None,
        connector: str | Path | None = None,
        small_lora: LoraSource = (),
        large_lora: LoraSource = (),
        small_recipe: str | None = None,
        large_recipe: str | None = None,
        keep_encoders: bool = True,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        backend: str = "torch",
        kernels: str = "auto",
        attention: str = "auto",
        vae_tiling: bool | str = "auto",
        weights: str = "dense",
        vram: str | int | None = None,
        cuda_graphs: bool = False,
        parallel: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> NexusPipeline:
        """Load a pair of generators, their text encoder and their VAE.

        Args:
            pretrained: a folder or hub id that holds the pair (`small/`, `large/`, `vae/`,
                `text_encoder/`, `tokenizer/`); with neither it nor `small` or `large`, the mini
                pair that comes with the package.
            small, large: folders or hub ids: a diffusers pipeline, a bare transformer, or Wan's own
                layout; or single files (safetensors, GGUF). Two of these, `(high, low)`, are the
                experts of one generator, as Wan 2.2's are. One may be left out: then only the plan
                of the other runs.
            boundary_ratio: the share of the training timesteps from which up the first expert of a
                generator runs; by default what its folder says, else 0.875.
            vae, text_encoder: a folder that holds `vae/` (or is one), and one that holds
                `text_encoder/` and `tokenizer/`, or single files; by default those of `large`, else
                of `small`.
            tokenizer: the text encoder's, where it is not beside it.
            understanding, connector: the language model's folder and the connector's
                (`nexus-rt convert omnivideo` makes both); by default those of the pair, if it has
                them. They steer the small generator.
            small_lora, large_lora: LoRA files to merge into a generator as it is loaded, one or
                several: "file.safetensors" or "file.safetensors@0.8" (how strongly), "@0.8:high"
                into one expert.
            small_recipe, large_recipe: how a few-step generator is run, a name of
                `nexus_rt.recipes.RECIPES`; by default what the header of its file or LoRA says.
            keep_encoders: False frees text encoder, understanding model and connector once a call's
                prompts are encoded, before denoising; the next call reads them again.
            torch_dtype: of the generators and the encoders: bfloat16 on a GPU, float32 on a CPU.
                The VAE always computes in float32.
            device: "cuda" where there is one, else "cpu".
            backend: what runs the generators: "torch".
            kernels: of the blend, the solver and the torch backend's norms, RoPE and modulation:
                "torch", "triton", or "auto" (triton on a GPU).
            attention: of the torch backend: a name of `nexus_rt.attention.ATTENTION_BACKENDS`, or
                "auto" (measured on a GPU).
            vae_tiling: True, False, or "auto" (above 1280 x 720).
            weights: how the matrices of the generators' blocks are kept: "dense" (in
                `torch_dtype`), "small" (as the checkpoint has them: GGUF's blocks, fp8, scaled
                int8), "int8" or "fp8" (quantised as they are read, a scale a row), "int8-dynamic"
                or "fp8-dynamic" (the activations too; of all blocks but the first and the last,
                "fp8-dynamic-all" of all). `formats` says what became of them.
            vram: a budget such as "24GB": engines, encoders and VAE then come and go as
                `plan_residency` decides.
            cuda_graphs: record each generator's step once a shape and replay it
                (`nexus_rt.engines.cuda_graphs`).
            parallel: how processes that `torchrun` started share every call, such as
                "cfg=2,ulysses=2" (`nexus_rt.parallel`). All of them load and call alike; the first
                writes what comes of it.
            cache_dir, local_files_only, revision: as in diffusers.

        Raises:
            ModelError: a folder is no model, is damaged, or the two are not of one latent space.
        """
        mesh = mesh_of(parallel, device)
        device = default_device(mesh.device if mesh else device)
        choose("backend", backend, GENERATOR_BACKENDS)
        check_weights(weights)
        loras = {
            n: parse_loras(sources)
            for n, sources in (("small", small_lora), ("large", large_lora))
            if sources
        }
        given = {"small": small, "large": large, "vae": vae}
        given |= {"text_encoder": text_encoder, "tokenizer": tokenizer}
        steering = {"understanding": understanding, "connector": connector}
        if pretrained is None and small is None and large is None:
            pretrained = MINI
        hub = dict(cache_dir=cache_dir, local_files_only=local_files_only, revision=revision)
        parts = find_pair(
            pretrained,
            {k: v for k, v in {**given, **steering}.items() if v is not None},
            hub,
            boundary_ratio,
        )
        dtype, first = default_dtype(torch_dtype, device), torch.device("cpu") if vram else device
        with LOADING:
            loaded = load_models(
                parts, dtype, device, first, kernels, attention, vae_tiling, loras, weights
            )
        recipes = {"small": small_recipe, "large": large_recipe}
        loaded.defaults = with_recipes(
            loaded.defaults, find_recipes(parts.generators, loras, recipes)
        )
        return cls(
            loaded.replayed() if cuda_graphs else loaded, device, keep_encoders, kernels, vram
        ).shared(mesh)

    @classmethod
    def from_engines(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        keep_encoders: bool = True,
        kernels: str = "auto",
        vae_tiling: bool | str = "auto",
        force: bool = False,
        vram: str | int | None = None,
        cuda_graphs: bool = False,
        parallel: str | None = None,
        **engine_options: Any,
    ) -> NexusPipeline:
        """A pipeline of exported engines: a folder that `nexus-rt export` made.

        Args:
            folder: holds `small/` and/or `large/` with a `manifest.json` each, and the pair's
                encoders and VAE.
            device, torch_dtype, keep_encoders, kernels, vae_tiling, vram, cuda_graphs, parallel: as
                in `from_pretrained`; the dtype is of the encoders.
            force: load engines that failed their parity gate.
            engine_options: of the backend, such as `provider=` of ONNX Runtime.

        Raises:
            ModelError: no engine folder, or one that is damaged, wrong, or built for something
                else; says what rebuilds it.
        """
        mesh = mesh_of(parallel, device)
        device = default_device(mesh.device if mesh else device)
        dtype, root = default_dtype(torch_dtype, device), Path(folder).expanduser()
        with LOADING:
            loaded = load_engines(root, dtype, device, vae_tiling, force, engine_options)
        return cls(
            loaded.replayed() if cuda_graphs else loaded, device, keep_encoders, kernels, vram
        ).shared(mesh)

    def shared(self, mesh: Mesh | None) -> NexusPipeline:
        """The pipeline, its calls shared by the processes of a mesh; None: as it is."""
        if mesh is not None:
            from nexus_rt.parallel.sharing import share

            share(self, mesh)
        return self

    @property
    def loras(self) -> dict[str, tuple[Lora, ...]]:
        """The LoRAs of each generator, those of both experts once."""
        found: dict[str, tuple[Lora, ...]] = {}
        for name, engine in self.engines.items():
            each = [getattr(e, "loaded", None) for e in engines_by_name({name: engine}).values()]
            own = [lora for loaded in each if loaded for lora in loaded.loras]
            found[name] = tuple(dict.fromkeys(own))
        return found

    def set_loras(self, small: LoraSource | None = None, large: LoraSource | None = None) -> None:
        """Change the LoRAs of generators in PyTorch between calls: these, and no others; `()` takes
        all out, None leaves a generator as it is. A scale is changed by naming the file with
        another.

        Weights are those of a fresh load, to the bit.

        Raises:
            InputError: a generator that is not loaded, or is an exported engine, which holds its
                weights in the artefact.
            ModelError: a LoRA that does not fit; nothing has changed then.
        """
        asked = {
            n: parse_loras(s) for n, s in (("small", small), ("large", large)) if s is not None
        }
        with self._calling:
            change_loras(self.engines, asked)
            for name in asked:
                words = self.identity[name].rpartition(" lora=")[0]
                self.identity[name] = f"{words} lora={loras_hash({name: self.loras[name]})}"

    def formats(self) -> dict[str, dict[str, int]]:
        """How many matrices of each generator in PyTorch are kept in which format, by engine; those
        outside the blocks are never quantised."""
        engines = engines_by_name(self.engines)
        return {n: formats_of(e.model) for n, e in engines.items() if hasattr(e, "model")}

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options for tqdm, such as `disable=True`."""
        self.progress = options

    def cancel(self) -> None:
        """Stop the running call before its next step (from a callback or another thread); it raises
        `Cancelled`."""
        self._cancel.set()

    def make_plan(
        self,
        plan: str | Plan | None = None,
        num_inference_steps: int | None = None,
        shift: float | None = None,
        energy: str | None = None,
        gamma_w: float | None = None,
        as_published: bool = False,
        timesteps: Sequence[float] | None = None,
        small_steps: int | None = None,
        large_steps: int | None = None,
    ) -> Plan:
        """The plan a call with these arguments would walk."""
        schedule = Schedule(timesteps, small_steps, large_steps)
        made = make_plan(
            self.defaults,
            plan,
            num_inference_steps,
            shift,
            energy,
            gamma_w,
            as_published,
            schedule,
        )
        return made.with_experts(boundaries(self.engines))

    def plan_residency(
        self,
        plan: Plan,
        size: ClipSize,
        videos: int = 1,
        guided: bool = True,
        vram: int | None = None,
    ) -> ResidencyPlan:
        """What is in memory when, under the pipeline's budget (or this one).

        Raises:
            InputError: the budget holds no mode of the plan; names the smallest that would do.
        """
        return plan_residency(
            plan.with_experts(boundaries(self.engines)),
            self.call_parts(size, videos * (1 + guided)),
            self.vram if vram is None else vram,
        )

    def call_parts(self, size: ClipSize, batch: int = 2) -> dict[str, MemoryUse]:
        """What a call holds in memory; batch: samples of a step, unconditional twins counted."""
        others: dict[str, Any] = {
            "text encoder": self.text,
            "vae": self.vae,
            STEP: self.step_engine,
        }
        if self.context:
            others |= {"understanding": self.context.understanding, "connector": self.context}
        return call_parts(
            engines_by_name(self.engines),
            {name: other for name, other in others.items() if other is not None},
            size,
            batch,
        )

    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts and negative prompts, each [B * num_videos_per_prompt, L, D],
        zero-padded to L."""
        if self.text is None:
            raise ModelError(
                "this pipeline has no text encoder; pass text_encoder= to from_pretrained, or"
                " prompt_embeds."
            )
        prompts, negatives = prompt_lists(prompt, negative_prompt)
        # Encoded one by one where they differ in length the results differ by rounding; together
        # they are reproducible.
        stored = self.context.unconditional_text() if self.context and negatives is None else None
        if stored is None:
            embeds = self.text.encode(
                [*prompts, *(negatives or [""] * len(prompts))], max_sequence_length
            )
            positive, negative = embeds.chunk(2)
        else:  # the checkpoint's own embedding of no prompt
            positive = self.text.encode(prompts, max_sequence_length)
            negative = torch.zeros_like(positive)
            rows = stored[:max_sequence_length]
            negative[:, : len(rows)] = rows.to(negative)
        every = num_videos_per_prompt
        return positive.repeat_interleave(every, 0), negative.repeat_interleave(every, 0)

    def rewrites_by(
        self,
        rewrite: str | list[str] | Rewriter | None,
        plan: Plan | None = None,
        as_published: bool = False,
    ) -> str | list[str] | Rewriter | None:
        """What a call with these arguments rewrites by: what was asked, else the pair's default;
        None where the large generator reads the prompt, or does not run in the plan."""
        if rewrite is None and self.context is not None and not as_published:
            rewrite = self.defaults.rewrite
        runs = plan is None or "large" in plan.generators
        return rewrite if runs and rewrite != "off" else None

    def rewrite(
        self,
        prompt: str | list[str],
        rewrite: str | list[str] | Rewriter | None = None,
        timeout: float = TIMEOUT,
    ) -> Rewriting | None:
        """What the large generator reads instead of prompts, as the call's `rewrite` asks; None
        where it reads them as they are. Answers are kept by prompt."""
        rewrite = self.rewrites_by(rewrite)
        if rewrite is None:
            return None
        prompts, _ = prompt_lists(prompt, None)
        check_rewrite(rewrite, len(prompts))
        model = self.context.understanding if self.context else None
        return rewrite_prompts(prompts, rewrite, model, self._rewritten, timeout)

    def encode_context(
        self,
        prompt: str | list[str],
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        single_frame: bool = False,
        num_videos_per_prompt: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The small generator's contexts and negative contexts, each [B, max_context_len, D], from
        prompts and what `encode_prompt` made of them."""
        if self.context is None:
            raise ModelError(
                "this pipeline has no understanding model; pass understanding= and connector= to"
                " from_pretrained."
            )
        prompts, _ = prompt_lists(prompt, None)
        every = num_videos_per_prompt
        positive = self.context.encode(prompts, prompt_embeds[::every], single_frame)
        negative = self.context.encode_unconditional(negative_prompt_embeds[::every], single_frame)
        return positive.repeat_interleave(every, 0), negative.repeat_interleave(every, 0)

    def encode(self, prompt: str | list[str], single_frame: bool = False) -> dict[str, Prompt]:
        """What each generator is told, as `denoise` takes it."""
        embeds = self.encode_prompt(prompt)
        prompts = dict.fromkeys(self.engines, Prompt(*embeds))
        if self.context is not None and "small" in prompts:
            prompts["small"] = Prompt(
                *self.encode_context(prompt, *embeds, single_frame=single_frame)
            )
        return prompts

    def prepare_latents(
        self,
        batch: int,
        size: ClipSize,
        generator: torch.Generator | list[torch.Generator] | None = None,
        *old: Any,
    ) -> Tensor:
        """Noise [B, C, T, H, W], float32; a list of generators gives each sample its own."""
        if isinstance(size, int):  # batch, num_frames, height, width, generator: one release more
            frames, height, (width, *rest) = size, generator, old
            warn_old("prepare_latents(batch, num_frames, height, width)", "a ClipSize")
            size, generator = ClipSize(width, height, frames), rest[0] if rest else None
        shape = (batch, self.channels, *self.grid.latent(size))
        return random_latents(shape, generator, self.device)

    @property
    def grid(self) -> LatentGrid:
        """From pixels and frames to latent cells."""
        space, time = (self.vae.spatial, self.vae.temporal) if self.vae else (8, 4)
        return LatentGrid(space, time, self.patch)

    def check_inputs(self, height: int, width: int, num_frames: int, output_type: str) -> None:
        """The old form of `grid.check`; it goes with the next release."""
        warn_old("check_inputs(height, width, num_frames)", "grid.check of a ClipSize")
        self.grid.check(ClipSize(width, height, num_frames))
        choose("output_type", output_type, OUTPUT_TYPES)
        for engine in (*self.engines.values(), self.vae, self.step_engine):
            if able(engine, Sized):
                engine.check_size(ClipSize(width, height, num_frames))
        if output_type != "latent" and self.vae is None:
            raise ModelError(
                "this pipeline has no VAE; pass vae= to from_pretrained, or output_type='latent'."
            )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: Scale | None = None,
        guidance_scale_2: Scale | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: Callable[[NexusPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
        *,
        context_embeds: Tensor | None = None,
        negative_context_embeds: Tensor | None = None,
        plan: str | Plan | None = None,
        shift: float | None = None,
        blend: BlendConfig | None = None,
        energy: str | None = None,
        gamma_w: float | None = None,
        solver: str | None = None,
        as_published: bool = False,
        prompt_embeds_2: Tensor | None = None,
        rewrite: str | list[str] | Rewriter | None = None,
        rewrite_timeout: float = TIMEOUT,
        reuse_parity: bool = False,
        timesteps: Sequence[float] | None = None,
        small_steps: int | None = None,
        large_steps: int | None = None,
    ) -> NexusOutput:
        """Generate videos; arguments as in diffusers' `WanPipeline`, and these:

        Args:
            guidance_scale: of the small generator (and the large, unless `guidance_scale_2` is
                given), in diffusers' meaning `v_u + g (v_c - v_u)`; the default 6.0 is the paper's
                s = 5.0. 1 runs without guidance. Two numbers are those of a generator's two
                experts, for high noise and for low: `guidance_scale_2=(4.0, 3.0)`.
            callback_on_step_end: may return new values of the tensors it was given (latents and any
                embeddings), used from the next step on; setting `pipe._interrupt = True` in it ends
                the loop and decodes what there is.
            context_embeds, negative_context_embeds: the small generator's contexts [B, L, D], as
                `encode_context` makes them; made from the prompt where they are not given.
            plan: which generator runs when: a `Plan` or what `nexus_rt.plan.parse_plan` reads.
            shift: of the time grid. blend: the frequency split (default: the published one).
                energy: overrides the plan's rule. gamma_w: exponent of the gate, for the plans that
                    follow it (default: 0.3).
            solver: "unipc" (default), "euler", or "lcm": Euler to clean latents and noise again at
                every step, as models distilled for consistency are walked.
            timesteps: the list to walk, before the shift, such as `[1000, 750, 500, 250]`.
                small_steps, large_steps: of the generators' whole schedules, of which the plan
                gives each a share.
            rewrite: what the large generator reads instead of the prompt: "auto" (what the pair's
                understanding model answers), a text, one for each prompt, or a function of a
                prompt, such as `nexus_rt.rewriting.ChatRewriter`; "off" for the prompt itself, None
                for the pair's default. Where it fails or takes longer than `rewrite_timeout`
                seconds, the prompt is kept and `NexusOutput.rewriting` says why.
            prompt_embeds_2: the large generator's text embeddings, beside `prompt_embeds`.
            reuse_parity: compute the steps that a plan reuses as well, and return their errors.
            as_published: the defaults and numerics of the published scripts: plan `reference`, 50
                steps, shift 5, s = 5 and their gates; timesteps of float64 sigmas, residual stream
                and velocity in float32, pixels by truncation (of "pil" here;
                `save_video(truncate=True)`).

        Raises:
            InputError: an argument is out of range; raised before any work.
            NumericsError: a generator's velocity is not finite.
            Cancelled: `cancel()` was called.
            DecodeError: decoding failed; its `latents_path` names the saved latents.
        """
        request = make_request(
            self.defaults,
            height=height,
            width=width,
            num_frames=num_frames,
            plan=plan,
            shift=shift,
            energy=energy,
            num_inference_steps=num_inference_steps,
            gamma_w=gamma_w,
            guidance_scale=guidance_scale,
            blend=blend,
            guidance_scale_2=guidance_scale_2,
            solver=solver,
            output_type=output_type,
            published=as_published,
            num_videos_per_prompt=num_videos_per_prompt,
            reuse_parity=reuse_parity,
            timesteps=timesteps,
            small_steps=small_steps,
            large_steps=large_steps,
        )
        plan = request.plan.with_experts(boundaries(self.engines))
        request = replace(request, plan=plan)
        given = {
            "prompt_embeds": prompt_embeds,
            "prompt_embeds_2": prompt_embeds_2,
            "negative_prompt_embeds": negative_prompt_embeds,
            "context_embeds": context_embeds,
            "negative_context_embeds": negative_context_embeds,
        }
        inputs = CallInputs(
            prompt,
            negative_prompt,
            given,
            latents,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
            rewrite,
            rewrite_timeout,
        )
        with self._calling:  # a second thread waits: a call keeps state on the pipeline
            self._cancel.clear()
            self._interrupt = False
            computes()
            if self.parallel is not None and generator is None and latents is None:
                inputs = replace(inputs, generator=self.parallel.generator())
            call = Call(self, request, inputs)
            try:
                return NexusOutput(call.run(), request.plan, call.reuse_errors, call.rewriting)
            except BaseException as error:
                if self.parallel is None:
                    raise
                raise self.parallel.watch.failed(error) from error

    @property
    def cancelled(self) -> bool:
        """Whether `cancel()` was called since the running call began."""
        return self._cancel.is_set()

    @property
    def interrupt(self) -> bool:
        """Whether the running call ends after its step, as diffusers' pipelines have it."""
        return self._interrupt

    def decode(
        self,
        latents: Tensor,
        output_type: str = "np",
        rescue: str | Path | None = None,
        truncate: bool = False,
    ) -> Any:
        """Latents [B, C, T, H, W] to frames as `output_type` asks; see `VideoDecoder.decode`.
        truncate: see `save_video`."""
        choose("output_type", output_type, OUTPUT_TYPES)
        if output_type == "latent":
            return latents
        if self.vae is None:
            raise ModelError(
                "this pipeline has no VAE; pass vae= to from_pretrained, or output_type='latent'."
            )
        return as_output(self.vae.decode(latents, rescue), output_type, truncate)
