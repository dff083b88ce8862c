"""Attributes and methods of other pipelines on ours: none is taken in silence."""

import copy
from functools import cache

import pytest
import torch

from nexus_rt import InputError, NexusError, NexusPipeline
from nexus_rt.core.errors import UnknownArgument, UnknownAttribute
from nexus_rt.pipeline.attributes import ARGUMENTS, OTHERS

PROMPT = "a red circle moves left"
QUICK = {"num_inference_steps": 2, "output_type": "latent"}
SHARED = {  # names that both have, with one meaning
    "from_pretrained",
    "encode_prompt",
    "prepare_latents",
    "set_progress_bar_config",
    "device",
    "interrupt",
    "num_timesteps",
    "components",
}
INTERNAL = {  # of diffusers' own machinery, which no caller uses
    "config_name",
    "extract_init_dict",
    "get_config_dict",
    "has_compatibles",
    "ignore_for_config",
    "load_config",
    "load_lora_into_transformer",
    "name_or_path",
    "pack_weights",
    "parameters",
    "register_for_auto_class",
    "register_to_config",
    "save_config",
    "to_json_file",
    "to_json_string",
    "transformer_name",
    "write_lora_layers",
    "fused_loras",
    "num_fused_loras",
    "set_attention_slice",
    "set_use_memory_efficient_attention_xformers",
}


@pytest.fixture
def pipe(tiny_pipe):
    own = dict(vars(tiny_pipe))
    yield tiny_pipe
    vars(tiny_pipe).update(own)


PARTS = (
    "scheduler",
    "transformer",
    "transformer_2",
    "text_encoder",
    "tokenizer",
    "vae_scale_factor",
)


@pytest.mark.parametrize(
    "name", [*PARTS, "unet", "image_encoder", "safety_checker", "_guidance_scale"]
)
def test_an_attribute_of_another_pipeline_is_refused_with_the_name_of_ours(pipe, name):
    with pytest.raises(UnknownAttribute, match=rf"no attribute '{name}': \w") as caught:
        setattr(pipe, name, object())
    assert isinstance(caught.value, (NexusError, AttributeError)) and not hasattr(pipe, name)
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'"):
        getattr(pipe, name)
    with pytest.raises(AttributeError):
        delattr(pipe, name)


def test_every_name_of_diffusers_pipeline_is_ours_or_refused_with_a_hint(pipe):
    import diffusers

    names = {n for n in dir(diffusers.WanPipeline) if not n.startswith("_")} - SHARED - INTERNAL
    names |= set(diffusers.WanPipeline.__init__.__annotations__) - {"vae"}
    for name in names:
        hint = OTHERS.get(name)
        assert hint is not None, name
        with pytest.raises(UnknownAttribute) as caught:
            getattr(pipe, name)
        assert hint.strip(".?") in str(caught.value)
        with pytest.raises(UnknownAttribute):
            setattr(pipe, name, None)
    for name in SHARED:
        assert hasattr(pipe, name)


def test_a_misspelt_attribute_suggests_ours(pipe):
    with pytest.raises(UnknownAttribute, match=r"did you mean 'engines'\?"):
        pipe.engine = {}
    with pytest.raises(UnknownAttribute, match=r"did you mean 'set_loras'\?"):
        pipe.set_lora()
    with pytest.raises(UnknownAttribute, match="pass the file as small= or large="):
        NexusPipeline.from_single_file("x.safetensors")


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("vae", object(), "pass vae= to from_pretrained"),
        ("text", object(), "pass text_encoder= to from_pretrained"),
        ("engines", {"small": object()}, "an object with `prepare` and `velocity`"),
        ("engines", {}, "expected 'small' and/or 'large'"),
        ("device", "cuda", "pass device= and torch_dtype="),
        ("kernels", "triton", "load the pipeline again with kernels="),
        ("loras", (), "use set_loras"),
        ("rewrite", "off", "it is a method; call it"),
        ("decode", None, "it is a method; call it"),
        ("vram", "much", "is not an amount"),
        ("keep_encoders", 1, "expected True or False"),
        ("_interrupt", "yes", "expected True or False"),
        ("parallel", "cfg=2", "pass parallel= to from_pretrained"),
    ],
)
def test_an_attribute_of_ours_takes_only_what_it_can_use(pipe, name, value, words):
    before = getattr(pipe, name)
    with pytest.raises(InputError, match=words):
        setattr(pipe, name, value)
    assert getattr(pipe, name) == before


def test_attributes_that_may_be_set_are_what_calls_use(pipe):
    before = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **QUICK).frames
    pipe.engines = {"small": pipe.engines["large"], "large": pipe.engines["small"]}
    swapped = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **QUICK).frames
    assert not torch.equal(before, swapped)
    pipe.vram = "1GB"
    assert pipe.vram == 10**9
    pipe.vae = None
    with pytest.raises(NexusError, match="no VAE"):
        pipe(PROMPT, num_inference_steps=2)


def test_a_subclass_declares_attributes_of_its_own(tiny_pair):
    class Own(NexusPipeline):
        note = None

    pipe = Own.from_pretrained(tiny_pair)
    pipe.note = "mine"
    assert pipe.note == "mine" and copy.copy(pipe).note == "mine"
    with pytest.raises(UnknownAttribute):
        pipe.other = 1


@pytest.mark.parametrize(
    "name",
    ["return_dict", "attention_kwargs", "callback", "seed", "image", "num_images_per_prompt"],
)
def test_an_argument_of_another_call_is_refused_with_the_name_of_ours(pipe, name):
    with pytest.raises(UnknownArgument, match=rf"no argument '{name}': ") as caught:
        pipe(PROMPT, **{name: None})
    assert ARGUMENTS[name] in str(caught.value) and isinstance(caught.value, TypeError)


def test_arguments_of_other_loaders_are_refused_with_the_name_of_ours(tiny_pair):
    for name in ("variant", "device_map", "scheduler", "token", "quantization_config"):
        with pytest.raises(UnknownArgument, match=f"from_pretrained has no argument '{name}'"):
            NexusPipeline.from_pretrained(tiny_pair, **{name: None})
    with pytest.raises(UnknownArgument, match=r"did you mean 'cache_dir'\?"):
        NexusPipeline.from_pretrained(tiny_pair, cache_dirs="x")


@cache
def keeper():
    """A class of callbacks that keep the names they are called with."""
    from diffusers.callbacks import PipelineCallback

    class Keep(PipelineCallback):
        tensor_inputs = ["prompt_embeds"]  # noqa: RUF012 (a list, as diffusers' own)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            self.names = list(callback_kwargs)
            self.steps = pipeline.num_timesteps
            return callback_kwargs

    return Keep


def test_a_callback_object_names_its_tensors(pipe):
    from diffusers.callbacks import MultiPipelineCallbacks

    keep = keeper()()
    pipe(PROMPT, callback_on_step_end=keep, **QUICK)
    assert keep.names == ["prompt_embeds"] and keep.steps == 2
    more = ["latents", "negative_prompt_embeds"]
    pipe(PROMPT, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=more, **QUICK)
    assert keep.names == ["prompt_embeds", *more]

    class KeepNegative(keeper()):
        tensor_inputs = ("latents", "negative_prompt_embeds")

    both = (keeper()(), KeepNegative())
    pipe(PROMPT, callback_on_step_end=MultiPipelineCallbacks(list(both)), **QUICK)
    assert both[0].names == ["prompt_embeds", *KeepNegative.tensor_inputs] == both[1].names


def test_a_callback_object_changes_what_it_named(pipe):
    class Zero(keeper()):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    frames = pipe(PROMPT, callback_on_step_end=Zero(), **QUICK).frames
    assert torch.count_nonzero(frames) == 0


def test_a_callback_object_whose_names_cannot_be_used(pipe):
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    class Unnamed(PipelineCallback):
        def callback_fn(self, *arguments):
            return {}

    class Wrong(keeper()):
        tensor_inputs = ("latent",)

    for callback, words in (
        (Unnamed(), "the Unnamed has no tensor_inputs that can be read"),
        (
            MultiPipelineCallbacks([lambda *a: None]),
            "the MultiPipelineCallbacks has no tensor_inputs",
        ),
        (Wrong(), "did you mean 'latents'"),
    ):
        with pytest.raises(InputError, match=words):
            pipe(PROMPT, callback_on_step_end=callback, **QUICK)


def test_generators_may_be_a_tuple(pipe):
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    wanted = pipe([PROMPT, "a panda"], generator=seeds(), **QUICK).frames
    got = pipe([PROMPT, "a panda"], generator=tuple(seeds()), **QUICK).frames
    assert torch.equal(got, wanted)


def test_a_scheduler_of_diffusers_changes_nothing_and_is_not_taken(pipe):
    import diffusers

    call = lambda: pipe(PROMPT, generator=torch.Generator().manual_seed(1), **QUICK).frames
    before = call()
    with pytest.raises(AttributeError, match="pass shift=, solver= "):
        pipe.scheduler = diffusers.UniPCMultistepScheduler(flow_shift=12.0)
    assert torch.equal(before, call())
