"""Attributes and arguments that a pipeline does not have: each is refused, with the name of ours
where other pipelines' idioms have one, so that nothing is set and then ignored."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from nexus_rt.core.errors import UnknownArgument, UnknownAttribute, shorten, shown
from nexus_rt.pipeline.settings import GUIDANCE_SETTINGS, fields

P = ParamSpec("P")
R = TypeVar("R")
MISSING = object()

LOADED = "load the pipeline again with {}= of from_pretrained"
GENERATORS = (
    "the generators are engines['small'] and engines['large']; pass others as small= and large= of"
    " from_pretrained"
)
EXPERTS = (
    "a generator's two experts are one engine; pass large=(high, low), or small=, to"
    " from_pretrained"
)
TEXT = "the text encoder is `text`; pass another as text_encoder= and tokenizer= of from_pretrained"
SCHEDULE = "pass shift=, solver= and timesteps=, or a number of steps, to the call"
GUIDANCE = (
    "pass guidance_scale= and guidance_scale_2= to the call; a plan guides some of its steps, as in"
    " plan='large:*@5[0:40%]'"
)
LORAS = "`set_loras` changes LoRAs and their scales, and `loras` has them"
BUDGET = (
    "pass vram= to from_pretrained: weights then come and go within that budget"
    " (keep_encoders=False frees the encoders)"
)
TILING = "pass vae_tiling= to from_pretrained"
ATTENTION = "pass attention= to from_pretrained"
DEVICE = "pass device= and torch_dtype= to from_pretrained: weights stay where they were loaded"
WEIGHTS = "pass weights= or torch_dtype= to from_pretrained"
NO_IMAGES = "text-to-video models run here, which read no image"
NO_CHECKER = "there is none: what is generated is not checked"
REUSE = "a plan reuses computations, as in plan='large:*/every=2'"
FOLDERS = "`nexus-rt convert` makes model folders, and `nexus-rt export` engines"
CALLBACK = "pass callback_on_step_end="
ONE_PROMPT = "pass prompt=, or embeddings of your own as prompt_embeds="

# Attributes and methods of diffusers' pipelines: what does the same here.
OTHERS: dict[str, str] = {
    **dict.fromkeys(("scheduler", "timesteps", "sigmas"), SCHEDULE),
    **dict.fromkeys(("transformer", "unet", "dit", "model"), GENERATORS),
    **dict.fromkeys(("transformer_2", "boundary_ratio"), EXPERTS),
    **dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2"), TEXT
    ),
    **dict.fromkeys(("image_encoder", "image_processor", "feature_extractor"), NO_IMAGES),
    **dict.fromkeys(("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter"), NO_IMAGES),
    **dict.fromkeys(("safety_checker", "requires_safety_checker", "watermark"), NO_CHECKER),
    **dict.fromkeys(("vae_scale_factor", "vae_scale_factor_spatial"), "it is `grid.space`"),
    "vae_scale_factor_temporal": "it is `grid.time`",
    "video_processor": "`decode` turns latents into frames, and `save_video` writes them",
    "numpy_to_pil": "pass output_type='pil' to the call",
    "check_inputs": "a call checks its arguments before any work",
    **dict.fromkeys(("config", "default_sample_size"), "a pair's settings are `defaults`"),
    "register_modules": "the models are `engines`, `text`, `vae`, `context`",
    **dict.fromkeys(
        (*GUIDANCE_SETTINGS.values(), "do_classifier_free_guidance", "guider"), GUIDANCE
    ),
    "guidance_rescale": "no rescaling of guidance is computed here",
    "current_timestep": f"{CALLBACK}: it is called with the timestep",
    **dict.fromkeys(("attention_kwargs", "cross_attention_kwargs"), ATTENTION),
    "clip_skip": "the text encoder has no CLIP layers to skip",
    **dict.fromkeys(("to", "cuda", "cpu", "half", "float", "dtype", "hf_device_map"), DEVICE),
    **dict.fromkeys(
        (
            "enable_model_cpu_offload",
            "enable_sequential_cpu_offload",
            "enable_group_offload",
            "maybe_free_model_hooks",
            "remove_all_hooks",
            "reset_device_map",
            "model_cpu_offload_seq",
        ),
        BUDGET,
    ),
    **dict.fromkeys(
        (
            "enable_vae_tiling",
            "disable_vae_tiling",
            "enable_vae_slicing",
            "disable_vae_slicing",
            "enable_tiling",
            "disable_tiling",
            "enable_slicing",
            "disable_slicing",
        ),
        TILING,
    ),
    **dict.fromkeys(
        (
            "enable_xformers_memory_efficient_attention",
            "disable_xformers_memory_efficient_attention",
            "enable_attention_slicing",
            "disable_attention_slicing",
            "set_attn_processor",
            "set_attention_backend",
            "attn_processors",
        ),
        ATTENTION,
    ),
    **dict.fromkeys(
        (
            "load_lora_weights",
            "unload_lora_weights",
            "fuse_lora",
            "unfuse_lora",
            "set_adapters",
            "get_active_adapters",
            "get_list_adapters",
            "delete_adapters",
            "enable_lora",
            "disable_lora",
            "enable_lora_hotswap",
            "set_lora_device",
            "lora_scale",
            "lora_state_dict",
            "save_lora_weights",
            "load_lora",
        ),
        LORAS,
    ),
    **dict.fromkeys(("enable_layerwise_casting", "quantization_config"), WEIGHTS),
    **dict.fromkeys(("enable_cache", "disable_cache"), REUSE),
    **dict.fromkeys(("enable_freeu", "disable_freeu"), "there is no UNet here"),
    **dict.fromkeys(("save_pretrained", "push_to_hub"), FOLDERS),
    **dict.fromkeys(
        ("from_single_file", "from_ckpt"), "pass the file as small= or large= of from_pretrained"
    ),
    **dict.fromkeys(("from_pipe", "from_config", "download"), "use from_pretrained"),
    "expand_timesteps": "a step has one timestep for all of a clip",
    "progress_bar": "`set_progress_bar_config` has its options",
    "load_textual_inversion": ONE_PROMPT,
    "compile": "`warmup` of an engine readies it; engines are compiled by `nexus-rt export`",
}
# Arguments of diffusers' calls and loaders.
ARGUMENTS: dict[str, str] = OTHERS | {
    **dict.fromkeys(("callback", "callback_steps"), CALLBACK),
    **dict.fromkeys(("image", "last_image", "video", "mask_image", "strength"), NO_IMAGES),
    **dict.fromkeys(
        ("prompt_2", "prompt_3", "negative_prompt_2"), "pass rewrite=, the large generator's text"
    ),
    "num_images_per_prompt": "pass num_videos_per_prompt=",
    "num_videos": "pass num_videos_per_prompt=",
    **{f.flag: f"pass {name}=" for name, f in fields().items() if f.flag != name},
    "seed": "pass generator=torch.Generator().manual_seed(seed)",
    "return_dict": "the call returns a NexusOutput; its `frames` are what was generated",
    "eta": "pass solver= to the call",
    "flow_shift": "pass shift= to the call",
    "sigmas": "pass timesteps= and shift= to the call",
    "variant": "name the folder or file of that variant",
    "use_safetensors": "weights are read from safetensors and GGUF files; leave it out",
    "custom_pipeline": "there are none here; leave it out",
    "trust_remote_code": "no code of a repository is run; leave it out",
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "low_cpu_mem_usage"), BUDGET),
    **dict.fromkeys(("token", "use_auth_token"), "set HF_TOKEN, or run `hf auth login`"),
    "subfolder": "pass the folder itself",
    **dict.fromkeys(
        ("force_download", "proxies"), "fetch the folder by `hf download`, and pass it"
    ),
    "dtype": "pass torch_dtype=",
    "scheduler": "pass shift= and solver= to the call",
}
# Attributes of ours that belong to the loaded models.
FIXED: dict[str, str] = {
    "device": DEVICE,
    "kernels": LOADED.format("kernels"),
    "channels": GENERATORS,
    "patch": GENERATORS,
    "identity": GENERATORS,
}


def unknown_attribute(name: str, known: Any) -> UnknownAttribute:
    """The error for an attribute that a pipeline does not have, with what to use instead."""
    hint = OTHERS.get(name.lstrip("_"))
    if hint is None:
        near = difflib.get_close_matches(shorten(name, 80), known, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]!r}?" if near else "see the attributes of NexusPipeline"
    return UnknownAttribute(
        f"NexusPipeline has no attribute {shown(name, 80)}: {hint.rstrip('.?')}"
        f"{'?' if hint.endswith('?') else '.'}",
        param=name,
    )


class Named(type):
    """The class of a pipeline's class: attributes of it that are not there have a hint too."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            raise unknown_attribute(name, dir(cls))


class Attributes(metaclass=Named):
    """An object that takes no attribute beyond its own, and those only with values that it can use.

    Its own are what `__init__` set before `_complete`, and what a subclass declares.
    """

    _complete = False

    def _checked(self, name: str, value: Any) -> Any:
        """`value` as an attribute of this name keeps it; raises an `InputError` for any other."""
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if self._complete and not name.startswith("__"):
            if name in FIXED:
                raise UnknownAttribute(f"{name} cannot be set: {FIXED[name]}.", param=name)
            own = inspect.getattr_static(type(self), name, MISSING)
            if isinstance(own, property) and own.fset is None:
                raise UnknownAttribute(
                    f"{name} cannot be set: it is read from the models"
                    f"{'; use set_loras' if name == 'loras' else ''}.",
                    param=name,
                )
            if inspect.isroutine(own) and not callable(value):
                raise UnknownAttribute(
                    f"{name} cannot be set: it is a method; call it.", param=name
                )
            if own is MISSING and name not in vars(self):
                raise unknown_attribute(name, dir(self))
            value = self._checked(name, value)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name not in vars(self):
            raise unknown_attribute(name, dir(self))
        object.__delattr__(self, name)

    if not TYPE_CHECKING:  # for a type checker, an unknown attribute is unknown

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            raise unknown_attribute(name, dir(type(self)))


def named_arguments(call: Callable[P, R]) -> Callable[P, R]:
    """A call whose unknown arguments are refused with the name of ours, where there is one."""
    known = inspect.signature(call).parameters
    places = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in known.values())

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > places:
            raise UnknownArgument(
                f"{call.__name__} takes {places} arguments without a name, and was called with"
                f" {len(args)}; name the others."
            )
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(shorten(name, 80), known, n=1, cutoff=0.7)
                hint = ARGUMENTS.get(name) or (
                    f"did you mean {near[0]!r}" if near else "see its documentation"
                )
                raise UnknownArgument(
                    f"{call.__name__} has no argument {shown(name, 80)}: {hint}"
                    f"{'?' if hint.startswith('did') else '.'}",
                    param=name,
                )
        return call(*args, **kwargs)

    return checked
