"""What a pipeline is made of: how it is loaded, shared between processes, and given other LoRAs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nexus_rt.components.context import ContextEncoder
from nexus_rt.core.amounts import parse_bytes
from nexus_rt.core.checks import instance, number, optional_text, switch
from nexus_rt.core.errors import InputError, choose, shown
from nexus_rt.core.paths import as_path
from nexus_rt.core.process import LOADING, computes
from nexus_rt.engines.experts import change_loras, engines_by_name
from nexus_rt.loading.lora import Lora, LoraSource, loras_hash
from nexus_rt.loading.packing import check_weights, formats_of
from nexus_rt.loading.pair_folder import MINI, find_pair
from nexus_rt.models.coders import Tokenized
from nexus_rt.models.wan_vae import Decoder
from nexus_rt.parallel.layout import Mesh, broadcast_failure, mesh_of
from nexus_rt.pipeline.arguments import check_options, check_source, read_loras
from nexus_rt.pipeline.assemble import (
    Loaded,
    default_device,
    default_dtype,
    load_engines,
    load_models,
)
from nexus_rt.pipeline.attributes import Attributes, named_arguments
from nexus_rt.pipeline.call import Run
from nexus_rt.pipeline.recipes import find_recipes, with_recipes
from nexus_rt.pipeline.rewriting import Cache
from nexus_rt.pipeline.settings import Defaults

if TYPE_CHECKING:
    from typing_extensions import Self

    from nexus_rt.parallel.sharing import Parallel

Generator = str | Path | tuple[str | Path, str | Path]  # a source, or those of two experts
GENERATOR_BACKENDS = ("torch",)  # engine backends that can run a generator


class PipelineModels(Attributes):
    """The models of a `NexusPipeline`, which documents them."""

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
        self.defaults, (self.channels, self.patch) = loaded.defaults, loaded.space
        self.identity = loaded.identity
        self.device, self.keep_encoders, self.kernels = device, keep_encoders, kernels
        self.vram = None if vram is None else parse_bytes(vram)
        self.progress: dict[str, Any] = {}
        self._run = Run()
        self._calling = threading.RLock()
        self._rewritten = Cache()
        self.parallel: Parallel | None = None
        self._complete = True

    def _checked(self, name: str, value: Any) -> Any:
        """`value` as the attribute of this name keeps it.

        Raises:
            InputError: it cannot be one.
        """
        ours: dict[str, tuple[type, str]] = {
            "vae": (Decoder, "a video decoder of this package; pass vae= to from_pretrained"),
            "text": (Tokenized, "its text encoder; pass text_encoder= to from_pretrained"),
            "context": (ContextEncoder, "its context encoder; pass connector= to from_pretrained"),
        }
        if name in ours:
            kind, expected = ours[name]
            return None if value is None else instance(name, value, kind, f"None, or {expected}")
        if name == "vram":
            return None if value is None else parse_bytes(value)
        if name == "keep_encoders":
            return switch(name, value)
        if name == "defaults":
            return instance(name, value, Defaults, "a nexus_rt.pipeline.settings.Defaults")
        if name == "progress":
            return instance(name, value, dict, "a dictionary of tqdm's options")
        if name == "engines":
            usable = isinstance(value, dict) and value.keys() <= {"small", "large"} and value
            if not usable or not all(
                callable(getattr(e, m, None))
                for e in value.values()
                for m in ("prepare", "velocity")
            ):
                raise InputError(
                    f"engines is {shown(value, 120)}; expected 'small' and/or 'large', each an"
                    " object with `prepare` and `velocity` (nexus_rt.method.engine.Engine).",
                    code="invalid_type",
                    param="engines",
                )
        if name == "parallel" and not hasattr(value, "mesh"):
            raise InputError(
                f"parallel is {shown(value)}, and processes are shared when they load; pass"
                " parallel= to from_pretrained.",
                code="invalid_type",
                param="parallel",
            )
        return value

    @classmethod
    @named_arguments
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
    ) -> Self:
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
                `nexus_rt.pipeline.recipes.RECIPES`; by default what the header of its file or LoRA
            says. keep_encoders: False frees text encoder, understanding model and connector once a
                call's prompts are encoded, before denoising; the next call reads them again.
            torch_dtype: of the generators and the encoders: bfloat16 on a GPU, float32 on a CPU.
                The VAE always computes in float32.
            device: "cuda" where there is one, else "cpu".
            backend: what runs the generators: "torch".
            kernels: of the blend, the solver and the torch backend's norms, RoPE and modulation:
                "torch", "triton", or "auto" (triton on a GPU).
            attention: of the torch backend: a name of `nexus_rt.ops.attention.ATTENTION_BACKENDS`,
                or "auto" (measured on a GPU).
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
        vram = None if vram is None else parse_bytes(vram)  # before any model is read
        parts: dict[str, Any] = {"small": small, "large": large, "vae": vae}
        parts |= {"text_encoder": text_encoder, "tokenizer": tokenizer}
        parts |= {"understanding": understanding, "connector": connector}
        for name, source in {"pretrained": pretrained, **parts}.items():
            check_source(name, source)
        device = check_options(
            device, torch_dtype, keep_encoders, kernels, attention, vae_tiling, vram, cuda_graphs
        )
        if boundary_ratio is not None:
            number("boundary_ratio", boundary_ratio, 0.0, 1.0)
        for name, value in (
            ("small_recipe", small_recipe),
            ("large_recipe", large_recipe),
            ("revision", revision),
            ("parallel", parallel),
        ):
            optional_text(name, value)
        switch("local_files_only", local_files_only)
        if cache_dir is not None:
            cache_dir = as_path("cache_dir", cache_dir)
        mesh = mesh_of(parallel, device)
        device = default_device(mesh.device if mesh else device)
        with broadcast_failure(mesh):
            choose("backend", backend, GENERATOR_BACKENDS)
            check_weights(weights)
            loras = {
                n: own
                for n, sources in (("small", small_lora), ("large", large_lora))
                if (own := read_loras(f"{n}_lora", sources))
            }
            if pretrained is None and small is None and large is None:
                pretrained = MINI
            hub = dict(cache_dir=cache_dir, local_files_only=local_files_only, revision=revision)
            named = {name: source for name, source in parts.items() if source is not None}
            pair = find_pair(pretrained, named, hub, boundary_ratio)
            dtype = default_dtype(torch_dtype, device)
            first = torch.device("cpu") if vram else device
            with LOADING:
                loaded = load_models(
                    pair, dtype, device, first, kernels, attention, vae_tiling, loras, weights
                )
            recipes = {"small": small_recipe, "large": large_recipe}
            loaded.defaults = with_recipes(
                loaded.defaults, find_recipes(pair.generators, loras, recipes)
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
    ) -> Self:
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
        vram = None if vram is None else parse_bytes(vram)  # before any model is read
        root = as_path("folder", folder)
        device = check_options(
            device, torch_dtype, keep_encoders, kernels, "auto", vae_tiling, vram, cuda_graphs
        )
        switch("force", force)
        mesh = mesh_of(optional_text("parallel", parallel), device)
        device = default_device(mesh.device if mesh else device)
        with broadcast_failure(mesh):
            dtype = default_dtype(torch_dtype, device)
            with LOADING:
                loaded = load_engines(root, dtype, device, vae_tiling, force, engine_options)
            return cls(
                loaded.replayed() if cuda_graphs else loaded, device, keep_encoders, kernels, vram
            ).shared(mesh)

    def shared(self, mesh: Mesh | None) -> Self:
        """The pipeline, its calls shared by the processes of a mesh; None: as it is."""
        if mesh is not None:
            from nexus_rt.parallel.sharing import share

            self.parallel = share(mesh, self.engines, self.vae, self.channels, self.vram)
            if not self.parallel.first:
                self.progress = {"disable": True}
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
            n: read_loras(n, s) for n, s in (("small", small), ("large", large)) if s is not None
        }
        computes()
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
