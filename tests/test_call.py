"""The stages of a call, each by itself: check, place, encode, sample, decode."""

import pytest
import torch

from nexus_rt import Cancelled, InputError, NexusPipeline
from nexus_rt.call import Call, Placement
from nexus_rt.request import CallInputs, make_request

NOWHERE = Placement(None)


def a_call(pipe, prompt="a red circle", **change):
    settings = dict.fromkeys(
        ("height", "width", "num_frames", "plan", "shift", "energy", "gamma_w", "guidance_scale")
    )
    settings |= dict.fromkeys(("guidance_scale_2", "blend", "solver"))
    settings |= {"num_inference_steps": 2, "output_type": "np", "num_videos_per_prompt": 1}
    named = {k: change.pop(k) for k in list(change) if k in settings}
    request = make_request(pipe.defaults, **{**settings, **named}, published=False)
    embeds = dict.fromkeys(
        ("prompt_embeds", "negative_prompt_embeds", "context_embeds", "negative_context_embeds")
    )
    fields = {"negative_prompt": None, "embeds": embeds, "latents": None, "generator": None}
    fields |= {"callback": None, "tensors": ("latents",), "max_sequence_length": 16, **change}
    return Call(pipe, request, CallInputs(prompt=prompt, **fields))


@pytest.fixture
def pipe(tiny_pipe):
    tiny_pipe._cancel.clear()  # another file's test may have ended in a cancelled call
    return tiny_pipe


def test_check_counts_videos_and_names_what_is_wrong(pipe):
    assert a_call(pipe).check() == 1
    assert a_call(pipe, ["a", "b"], num_videos_per_prompt=3).check() == 6
    for change, words in (
        ({"prompt": None}, "pass either prompt or prompt_embeds"),
        ({"latents": torch.zeros(1, 16, 2, 4, 5)}, "latents have shape"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 videos"),
        ({"max_sequence_length": 0}, "max_sequence_length is 0"),
    ):
        with pytest.raises(InputError, match=words):
            a_call(pipe, **change).check()


def test_place_moves_nothing_without_a_budget_and_clears_the_device_under_a_tight_one(
    pipe, tiny_pair
):
    assert a_call(pipe).place(1) == NOWHERE and not NOWHERE.tight
    roomy = NexusPipeline.from_pretrained(tiny_pair, vram="1GB")
    place = a_call(roomy).place(1)
    assert place.residency.plan.mode == "resident" and not place.tight
    request = a_call(roomy).request
    whole = roomy.plan_residency(request.plan, request.size)
    narrow = NexusPipeline.from_pretrained(tiny_pair, vram=whole.peak - 1)
    assert a_call(narrow).place(1).tight


def test_encode_makes_what_was_not_given(pipe):
    embeds = a_call(pipe, ["a", "red"], num_videos_per_prompt=2).encode()
    texts, none = pipe.encode_prompt(["a", "red"], None, 2, 16)
    assert torch.equal(embeds["prompt_embeds"], texts)
    assert torch.equal(embeds["negative_prompt_embeds"], none)
    assert embeds["context_embeds"] is None  # the tiny pair has no understanding model
    given = dict.fromkeys(("context_embeds", "negative_context_embeds"))
    given |= {"prompt_embeds": texts[:1], "negative_prompt_embeds": none[:1]}
    kept = a_call(pipe, None, embeds=given).encode()
    assert torch.equal(kept["prompt_embeds"], texts[:1])


def test_encode_stops_when_it_is_cancelled(pipe):
    pipe.cancel()
    try:
        with pytest.raises(Cancelled, match="after the prompt was encoded"):
            a_call(pipe).encode()
    finally:
        pipe._cancel.clear()


def test_noise_is_what_was_given_or_drawn(pipe):
    latents = torch.zeros(1, 16, 2, 4, 6)
    assert a_call(pipe, latents=latents).noise(1) is latents
    drawn = [a_call(pipe, generator=torch.Generator().manual_seed(3)).noise(2) for _ in range(2)]
    assert drawn[0].shape == (2, 16, 2, 4, 6) and torch.equal(*drawn)


def test_sample_and_decode_are_the_rest_of_a_call(pipe):
    """Stage by stage, a call's own frames."""
    options = {"plan": "small:1 large:1", "generator": torch.Generator().manual_seed(5)}
    call = a_call(pipe, **options)
    latents = call.sample(call.noise(call.check()), call.encode(), NOWHERE)
    assert latents.shape == (1, 16, 2, 4, 6) and latents.isfinite().all()
    frames = call.decode(latents, NOWHERE)
    options["generator"].manual_seed(5)
    wanted = pipe("a red circle", num_inference_steps=2, max_sequence_length=16, **options).frames
    assert (frames == wanted).all()
    options["generator"].manual_seed(5)
    assert (a_call(pipe, **options).run() == wanted).all()


def test_a_callback_changes_prompts_for_the_steps_that_follow(pipe):
    new = {}

    def answer(_, index, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if index == 0 else new

    call = a_call(pipe, callback=answer, tensors=("prompt_embeds",))
    embeds = call.encode()
    before, latents = embeds["prompt_embeds"].clone(), torch.zeros(1, 16, 2, 4, 6)
    first, second = call.request.plan.steps
    change = call.callback(first, latents, embeds)
    assert torch.equal(embeds["prompt_embeds"], before + 1) and change.latents is None
    assert torch.equal(change.prompts["large"].conditional, before + 1)
    assert call.callback(second, latents, embeds).prompts is None
    new["latents"] = torch.zeros(2)
    with pytest.raises(InputError, match="expected a tensor of shape"):
        call.callback(second, latents, embeds)
