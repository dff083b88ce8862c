"""The stages of a call, each by itself: encode, denoise, decode; and what is checked once."""

import inspect

import pytest
import torch

import nexus_rt.pipeline.call as call_module
from nexus_rt import NexusPipeline
from nexus_rt.core.errors import Cancelled
from nexus_rt.method import loop
from nexus_rt.method.hooks import Hooks
from nexus_rt.pipeline.call import decode, denoise, draw_noise
from nexus_rt.pipeline.encode import encode
from nexus_rt.pipeline.inputs import Prompts
from nexus_rt.pipeline.settings import CallSettings
from tests.refusals import refuses

SHORT = dict(num_inference_steps=2, max_sequence_length=16)


@pytest.fixture
def pipe(tiny_pipe):
    return tiny_pipe


def stages(pipe, prompt="a red circle", embeds=None, **settings):
    made = CallSettings(**{**SHORT, **settings})
    return pipe.components, pipe.request(made), Prompts.of(prompt, None, made, embeds)


def test_what_is_wrong_is_named_before_any_work(pipe):
    for change, code, param in (
        ({"prompt": None}, "missing", "prompt"),
        ({"latents": torch.zeros(1, 16, 2, 4, 5)}, "mismatch", "latents"),
        ({"generator": [torch.Generator()] * 2}, "mismatch", "generator"),
        ({"max_sequence_length": 0}, "out_of_range", "max_sequence_length"),
        ({"guidance_scale": (3.0, 4.0)}, "unsupported", "guidance_scale"),
        ({"plan": "small", "rewrite": "a disk"}, "conflict", "rewrite"),
        ({"rewrite": ["a", "b"]}, "mismatch", "rewrite"),
        ({"num_inference_steps": None, "timesteps": [1000, 500]}, "conflict", "timesteps"),
    ):
        with refuses(code, param):
            pipe(**{"prompt": "a red circle", **SHORT, **change})


def test_a_budget_decides_what_comes_and_goes(pipe, tiny_pair):
    components, request, _ = stages(pipe)
    assert not components.tight(request, 1)
    roomy = NexusPipeline.from_pretrained(tiny_pair, vram="1GB")
    assert not roomy.components.tight(request, 1)
    whole = roomy.plan_residency(request.plan, request.size)
    assert whole.mode == "resident"
    narrow = NexusPipeline.from_pretrained(tiny_pair, vram=whole.peak - 1)
    assert narrow.components.tight(request, 1)


def test_encode_makes_what_was_not_given(pipe):
    told = encode(*stages(pipe, ["a", "red"], num_videos_per_prompt=2)).embeds
    texts, none = pipe.encode_prompt(["a", "red"], None, 2, 16)
    assert torch.equal(told["prompt_embeds"], texts)
    assert torch.equal(told["negative_prompt_embeds"], none)
    assert told["context_embeds"] is None  # the tiny pair has no understanding model
    given = {"prompt_embeds": texts[:1], "negative_prompt_embeds": none[:1]}
    kept = encode(*stages(pipe, None, given)).embeds
    assert torch.equal(kept["prompt_embeds"], texts[:1])


def test_conditioning_is_a_row_a_video(pipe):
    told = encode(*stages(pipe, ["a", "red"], num_videos_per_prompt=2))
    assert len(told.embeds["prompt_embeds"]) == 4
    one = told.rows(2, 3)
    assert torch.equal(one.embeds["prompt_embeds"], told.embeds["prompt_embeds"][2:3])
    assert one.embeds["context_embeds"] is None


def test_encode_stops_when_it_is_cancelled(pipe):
    heard = []

    def stop(stage, rewriting):
        heard.append(stage)
        raise Cancelled("stopped, as the caller wants")

    with refuses("cancelled", kind=Cancelled):
        encode(*stages(pipe), stop)
    assert heard == ["encoded"]


def test_noise_is_drawn_by_the_given_generator(pipe):
    components, request, _ = stages(pipe)
    seeded = lambda: torch.Generator().manual_seed(3)
    drawn = [draw_noise(components, request.size, 2, seeded()) for _ in range(2)]
    assert drawn[0].shape == (2, 16, 2, 4, 6) and torch.equal(*drawn)


def test_three_functions_are_a_call(pipe):
    """Stage by stage, a call's own frames."""
    plan = "small:1 large:1"
    components, request, prompts = stages(pipe, plan=plan)
    told = encode(components, request, prompts)
    noise = draw_noise(components, request.size, 1, torch.Generator().manual_seed(5))
    latents = denoise(components, request, told, noise)
    assert latents.shape == (1, 16, 2, 4, 6) and latents.isfinite().all()
    frames = decode(components, request, latents)
    wanted = pipe("a red circle", plan=plan, generator=torch.Generator().manual_seed(5), **SHORT)
    assert (frames == wanted.frames).all()


def test_a_callback_changes_prompts_for_the_steps_that_follow(pipe):
    read, engine = [], pipe.engines["large"]
    new = {}

    def callback(_, index, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if index == 0 else new

    class Watched:
        def prepare(self, context):
            read.append(context.clone())
            return engine.prepare(context)

        def velocity(self, *args):
            return engine.velocity(*args)

    options = {"plan": "large", "generator": torch.Generator().manual_seed(5), **SHORT}
    options |= {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "output_type": "latent"}
    text, _ = pipe.encode_prompt("a red circle", max_sequence_length=16)
    before = dict(pipe.engines)
    try:
        pipe.engines = {**before, "large": Watched()}
        pipe("a red circle", callback_on_step_end=callback, **options)
        assert torch.equal(read[0][:1], text) and torch.equal(read[1][:1], text + 1)
        new["latents"] = torch.zeros(2)
        with refuses("mismatch", "latents"):
            pipe("a red circle", callback_on_step_end=callback, **options)
    finally:
        pipe.engines = before


def test_prompts_and_rewrite_are_checked_once_a_call(pipe, monkeypatch):
    counts = {}

    def counted(module, name):
        real = getattr(module, name)

        def count(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    import nexus_rt.pipeline.inputs as inputs_module
    import nexus_rt.pipeline.pipeline as pipeline_module
    import nexus_rt.pipeline.rewriting as rewriting_module

    counted(inputs_module, "prompt_lists")
    counted(inputs_module, "check_rewrite")
    counted(pipeline_module, "prompt_lists")
    counted(pipeline_module, "make_request")
    counted(rewriting_module, "check_rewrite")
    pipe("a red circle", rewrite="a red disk", output_type="latent", **SHORT)
    assert counts == {"prompt_lists": 1, "check_rewrite": 1, "make_request": 1}


@pytest.mark.parametrize("function", [loop.denoise, call_module.denoise])
def test_denoise_stays_on_a_screen(function):
    source, _ = inspect.getsourcelines(function)
    assert len(inspect.signature(function).parameters) <= 8
    doc = len(inspect.getdoc(function).splitlines())
    signature = next(i for i, line in enumerate(source) if line.startswith(") ->")) + 1
    assert len(source) - signature - doc <= 25


def test_hooks_of_a_caller_reach_the_loop(pipe):
    components, request, prompts = stages(pipe, plan="large")
    told = encode(components, request, prompts)
    noise = draw_noise(components, request.size, 1, None)
    seen = []
    hooks = Hooks(on_step=lambda step, x: seen.append(step.index))
    denoise(components, request, told, noise, hooks)
    assert seen == [0, 1]


def test_a_made_plan_is_the_calls(pipe):
    for settings in (dict(solver="lcm"), dict(plan="large", solver="euler", shift=3.0)):
        made = pipe.make_plan(**settings)
        assert made == pipe.request(CallSettings(**settings)).plan
    for settings, code, param in (
        (dict(plan="reference solver=euler", solver="unipc"), "conflict", "solver"),
        (dict(plan="reference", timesteps=[1000, 500]), "conflict", "timesteps"),
        (dict(plan="small:q"), "unreadable", "plan"),
    ):
        with refuses(code, param):
            pipe.make_plan(**settings)


def test_a_callers_hooks_stay_as_they_are(pipe):
    components, request, prompts = stages(pipe, plan="large")
    hooks = Hooks()
    noise = draw_noise(components, request.size, 1, None)
    told = encode(components, request, prompts)
    loop.sample(noise, request.plan, pipe.engines, told.prompts(pipe.engines), hooks=hooks)
    assert hooks.generators == {} and hooks.check is None
