"""A call's arguments: right, or our error before any work; and the published scripts' defaults and
numerics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt import BlendConfig, Cancelled, InputError, NexusPipeline, time_grid
from nexus_rt.loading.transformer import load_transformer
from nexus_rt.method.generator import Prompt
from nexus_rt.method.hooks import Hooks
from nexus_rt.method.loop import sample
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.pipeline.request import make_plan, make_request
from nexus_rt.pipeline.settings import CallSettings, Defaults
from tests.refusals import refuses

PROMPT = "a red circle moves left"
LATENT = dict(output_type="latent", num_inference_steps=3, plan="large")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def untouched(tiny_pipe, monkeypatch):
    """The pipeline with everything that works failing the test: bad input must not cost a step, nor
    an encoding."""
    for part, name in (
        (tiny_pipe.text, "encode"),
        *((e, "velocity") for e in tiny_pipe.engines.values()),
    ):
        monkeypatch.setattr(part, name, lambda *a, **k: pytest.fail("work was done"))
    return tiny_pipe


EMBEDS = torch.zeros(1, 512, 32)
WRONG = [
    (dict(prompt=[None]), "invalid_type", "prompt"),
    (dict(prompt=5), "invalid_type", "prompt"),
    (dict(prompt=b"x"), "invalid_type", "prompt"),
    (dict(prompt={"a": 1}), "invalid_type", "prompt"),
    (dict(prompt=["a", 3]), "invalid_type", "prompt"),
    (dict(prompt="\ud800"), "invalid_value", "prompt"),
    (dict(prompt="x" * 200_000), "too_large", "prompt"),
    (dict(negative_prompt=7), "invalid_type", "negative_prompt"),
    (dict(negative_prompt=[None]), "invalid_type", "negative_prompt"),
    (dict(generator=5), "invalid_type", "generator"),
    (dict(generator=[seeded(), 1]), "invalid_type", "generator"),
    (dict(generator="seed"), "invalid_type", "generator"),
    (dict(num_frames=81.0), "invalid_type", "num_frames"),
    (dict(num_frames=True), "invalid_type", "num_frames"),
    (dict(num_frames="5"), "invalid_type", "num_frames"),
    (dict(num_frames=10**9), "out_of_range", "num_frames"),
    (dict(height="32"), "invalid_type", "height"),
    (dict(height=32.0), "invalid_type", "height"),
    (dict(width=10**9), "out_of_range", "width"),
    (dict(height=0), "out_of_range", "height"),
    (dict(width=0), "out_of_range", "width"),
    (dict(num_inference_steps=2.5), "invalid_type", "num_inference_steps"),
    (dict(num_inference_steps="4"), "invalid_type", "num_inference_steps"),
    (dict(num_inference_steps=10**9), "out_of_range", "num_inference_steps"),
    (dict(guidance_scale="6"), "invalid_type", "guidance_scale"),
    (dict(guidance_scale=float("nan")), "out_of_range", "guidance_scale"),
    (dict(guidance_scale_2=float("inf")), "out_of_range", "guidance_scale_2"),
    (dict(guidance_scale=True), "invalid_type", "guidance_scale"),
    (dict(shift="5"), "invalid_type", "shift"),
    (dict(shift=0), "out_of_range", "shift"),
    (dict(shift=float("nan")), "out_of_range", "shift"),
    (dict(shift=1e9), "out_of_range", "shift"),
    (dict(num_videos_per_prompt=1.0), "invalid_type", "num_videos_per_prompt"),
    (dict(num_videos_per_prompt=10**6), "out_of_range", "num_videos_per_prompt"),
    (dict(max_sequence_length=0), "out_of_range", "max_sequence_length"),
    (dict(max_sequence_length=513), "out_of_range", "max_sequence_length"),
    (dict(max_sequence_length=8.0), "invalid_type", "max_sequence_length"),
    (dict(plan=3), "invalid_type", "plan"),
    (dict(blend="fft"), "invalid_type", "blend"),
    (dict(energy=1), "unknown_name", "energy"),
    (dict(solver=["unipc"]), "unknown_name", "solver"),
    (dict(as_published="yes"), "invalid_type", "as_published"),
    (dict(gamma_w=-1.0, plan="reference"), "out_of_range", "gamma_w"),
    (dict(gamma_w=0.5, plan="handoff=0.5"), "conflict", "gamma_w"),
    (dict(callback_on_step_end=3), "invalid_type", "callback_on_step_end"),
    (
        dict(callback_on_step_end_tensor_inputs="latents"),
        "invalid_type",
        "callback_on_step_end_tensor_inputs",
    ),
    (
        dict(callback_on_step_end_tensor_inputs=[1]),
        "unknown_name",
        "callback_on_step_end_tensor_inputs",
    ),
    (dict(latents="noise"), "invalid_type", "latents"),
    (dict(latents=torch.zeros(1, 16, 2, 4, 6, dtype=torch.int64)), "invalid_type", "latents"),
    (dict(latents=torch.full((1, 16, 2, 4, 6), float("nan"))), "not_finite", "latents"),
    (dict(latents=torch.zeros(1, 16, 3, 4, 6)), "mismatch", "latents"),
    (dict(latents=torch.zeros(1, 16, 2, 4, 8)), "mismatch", "latents"),
    (dict(prompt_embeds=EMBEDS), "conflict", "prompt"),
    (
        dict(prompt=None, prompt_embeds=EMBEDS[0]),
        "invalid_type",
        "prompt_embeds",
    ),
    (dict(prompt=None, prompt_embeds=EMBEDS.long()), "invalid_type", "prompt_embeds"),
    (dict(prompt=None, prompt_embeds="x"), "invalid_type", "prompt_embeds"),
    (
        dict(prompt=None, prompt_embeds=EMBEDS, negative_prompt="x"),
        "conflict",
        "negative_prompt",
    ),
    (
        dict(prompt=None, prompt_embeds=EMBEDS, negative_prompt_embeds=EMBEDS[:, :226]),
        "mismatch",
        "negative_prompt_embeds",
    ),
    (
        dict(prompt=None, prompt_embeds=EMBEDS, negative_prompt_embeds=EMBEDS.repeat(2, 1, 1)),
        "mismatch",
        "negative_prompt_embeds",
    ),
    (
        dict(prompt=["a", "b"], negative_prompt_embeds=EMBEDS),
        "mismatch",
        "negative_prompt_embeds",
    ),
    (
        dict(negative_prompt="x", negative_prompt_embeds=EMBEDS),
        "conflict",
        "negative_prompt",
    ),
    (dict(negative_prompt_embeds=EMBEDS[:, :9]), "mismatch", "negative_prompt_embeds"),
    (
        dict(prompt=None, prompt_embeds=EMBEDS, context_embeds=EMBEDS.repeat(3, 1, 1)),
        "mismatch",
        "context_embeds",
    ),
]


@pytest.mark.parametrize("call, code, param", WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_wrong_is_said_before_any_work(untouched, call, code, param):
    with refuses(code, param, InputError) as caught:
        untouched(**{"prompt": PROMPT, **call})
    assert len(str(caught.value)) < 500


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.none(), max_size=2),
)
NAMES = list(CallSettings.__struct_fields__)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_any_value_is_taken_or_refused_as_ours(values):
    try:
        request = make_request(CallSettings(**values), Defaults())
    except InputError:
        return
    assert (
        len(request.plan) >= 1
        and np.isfinite([request.guidance.small, request.guidance.large]).all()
    )


def test_numpy_numbers_are_numbers(tiny_pipe):
    call = dict(
        height=np.int64(32),
        width=np.int32(48),
        num_frames=np.uint8(5),
        guidance_scale=np.float32(3),
        **LATENT,
    )
    assert tiny_pipe(PROMPT, generator=seeded(), **call).frames.shape == (1, 16, 2, 4, 6)


def test_given_embeddings_serve_several_videos(tiny_pipe):
    embeds, none = tiny_pipe.encode_prompt(["a red circle", "a blue square"])
    out = tiny_pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=none,
        num_videos_per_prompt=2,
        generator=[seeded(i) for i in range(4)],
        **LATENT,
    )
    said = tiny_pipe(
        ["a red circle", "a blue square"],
        num_videos_per_prompt=2,
        generator=[seeded(i) for i in range(4)],
        **LATENT,
    )
    assert out.frames.shape[0] == 4 and torch.equal(out.frames, said.frames)


def test_a_callback_replaces_embeddings_from_the_next_step_on(tiny_pipe):
    """What diffusers lets a callback do: the same as two plans joined at that step."""
    other = tiny_pipe.encode_prompt("a blue square")[0]

    def callback(pipe, index, timestep, tensors):
        return {"prompt_embeds": other} if index == 1 else {"latents": tensors["latents"]}

    tensors = ["latents", "prompt_embeds"]
    got = tiny_pipe(
        PROMPT,
        generator=seeded(),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=tensors,
        **LATENT,
    ).frames
    embeds, none = tiny_pipe.encode_prompt(PROMPT)
    asked = []

    class Watched:
        def prepare(self, context):
            return context

        def velocity(self, latents, timestep, context):
            asked.append(context[0])
            engine = tiny_pipe.engines["large"]
            return engine.velocity(latents, timestep, engine.prepare(context))

    told = iter([embeds, embeds, other])

    def change(step, latents):
        from nexus_rt.method.hooks import CallbackResult

        next(told)
        return CallbackResult(prompts={"large": Prompt(other, none)}) if step.index == 1 else None

    plan = tiny_pipe.make_plan("large", 3)
    wanted = sample(
        torch.randn(1, 16, 2, 4, 6, generator=seeded()),
        plan,
        {"large": Watched()},
        {"large": Prompt(embeds, none)},
        hooks=Hooks(on_step=change),
    )
    assert torch.equal(got, wanted) and [torch.equal(a, other[0]) for a in asked] == [
        False,
        False,
        True,
    ]
    for answer, code, param in (
        ({"prompt_embeds": other[:, :9]}, "mismatch", "prompt_embeds"),
        ({"prompt": "x"}, "unknown_name", "callback_on_step_end"),
        (5, "invalid_type", "callback_on_step_end"),
        ({"latents": None}, "mismatch", "latents"),
        ({"context_embeds": other}, "mismatch", "context_embeds"),
    ):
        with refuses(code, param):
            tiny_pipe(PROMPT, callback_on_step_end=lambda *a, answer=answer: answer, **LATENT)


def test_an_interrupt_ends_the_loop_and_keeps_what_there_is(tiny_pipe):
    seen, kept = [], []

    def callback(pipe, index, timestep, tensors):
        seen.append(index)
        kept.append(tensors["latents"])
        pipe._interrupt = index == 1

    out = tiny_pipe(
        PROMPT,
        generator=seeded(),
        callback_on_step_end=callback,
        **{**LATENT, "num_inference_steps": 6},
    )
    assert seen == [0, 1] and torch.equal(out.frames, kept[-1])
    assert (
        tiny_pipe(PROMPT, output_type="latent").frames.isfinite().all() and not tiny_pipe.interrupt
    )


def test_a_cancel_while_prompts_are_encoded_stops_the_call(tiny_pipe, monkeypatch):
    right = tiny_pipe.text.encode

    def encode(*args, **options):
        tiny_pipe.cancel()
        return right(*args, **options)

    monkeypatch.setattr(tiny_pipe.text, "encode", encode)
    for engine in tiny_pipe.engines.values():
        monkeypatch.setattr(engine, "velocity", lambda *a: pytest.fail("a step was made"))
    with refuses("cancelled", kind=Cancelled):
        tiny_pipe(PROMPT)


def test_words_past_the_limit_are_named(tiny_pipe):
    with pytest.warns(
        UserWarning, match=r"has 9 tokens and 5 are read; what comes after is lost: 'left right on"
    ):
        tiny_pipe.encode_prompt("a red circle moves left right on black", max_sequence_length=5)


def test_the_published_grid_is_that_of_the_published_scheduler():
    """Its sigmas before float32: s from float32(0.999), timestep the whole part of 1000 sigma in
    float64."""
    for steps, shift in ((50, 5.0), (50, 3.0), (37, 5.0), (20, 8.0)):
        s = np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1]
        exact = shift * s / (1 + (shift - 1) * s)
        grid = time_grid(steps, shift, float64_timesteps=True)
        assert grid.timesteps == tuple(int(x) for x in exact * 1000)
        assert np.array_equal(np.array(grid.sigmas[:-1], np.float32), exact.astype(np.float32))
    # or the option would be for nothing
    assert time_grid(198, 5.0, True).timesteps != time_grid(198, 5.0).timesteps


def test_as_published_sets_every_default():
    pair = Defaults(
        num_inference_steps=7,
        guidance_scale=2.0,
        guidance_scale_2=1.0,
        shift=3.0,
        plan="handoff=0.5",
    )
    request = make_request(CallSettings(as_published=True), pair)
    assert (
        request.plan.name == "reference"
        and len(request.plan) == 50
        and all(s.energy == "reference" for s in request.plan.steps)
    )
    assert request.plan.grid == time_grid(50, 5.0, float64_timesteps=True)
    # s + 1 of s = 5.0
    assert (request.guidance.small, request.guidance.large, request.solver) == (
        6.0,
        6.0,
        "unipc",
    )
    assert request.blend == BlendConfig()
    assert (request.blend.gamma_hf, request.blend.sigma_min, request.blend.sigma_max) == (
        0.7,
        0.35,
        0.7,
    )
    own = make_request(
        CallSettings(
            as_published=True,
            num_inference_steps=4,
            guidance_scale=3.0,
            shift=3.0,
            gamma_w=0.5,
        ),
        pair,
    )
    assert (
        len(own.plan) == 4
        and own.guidance.large == 3.0
        and own.plan.steps[1].w != request.plan.steps[1].w
    )
    assert [s.w for s in own.plan.steps] == [
        s.w for s in parse_plan("reference", time_grid(4, 3.0, True), 0.5).steps
    ]
    with refuses("conflict", "plan", InputError):
        make_plan(CallSettings(plan="handoff=0.3", as_published=True), pair)


def test_the_published_numerics_keep_the_stream_in_float32(tiny_pair):
    """bfloat16 weights: nearer to float32 than with a narrow stream, equal to it at no step, and
    float32 out."""
    exact = load_transformer(tiny_pair / "large", torch.float32, kernels="torch")
    low = load_transformer(tiny_pair / "large", torch.bfloat16, kernels="torch")
    exact.load_state_dict({k: v.float() for k, v in low.state_dict().items()})  # the same weights
    x, t = torch.randn(2, 16, 2, 8, 8, generator=seeded()), torch.tensor(700.0)
    text = torch.randn(2, 8, 32, generator=seeded(1))
    wanted, narrow = (m(x, t, m.prepare_context(text)) for m in (exact, low))
    low.float32_stream = True
    wide = low(x, t, low.prepare_context(text))
    error = [((v.float() - wanted).norm() / wanted.norm()).item() for v in (wide, narrow)]
    assert (
        wide.dtype == torch.float32
        and narrow.dtype == torch.bfloat16
        and 0 < error[0] < 0.7 * error[1]
    )
    streams = []
    hook = low.blocks[0].register_forward_hook(
        lambda m, a, out: streams.append((a[0].dtype, out[0].dtype))
    )
    low(x, t, low.prepare_context(text))
    hook.remove()
    assert streams == [(torch.float32, torch.float32)]
    exact.float32_stream = True
    # float32 throughout is that already
    assert torch.equal(exact(x, t, exact.prepare_context(text)), wanted)


def test_as_published_is_of_one_call(tiny_pair):
    pipe = NexusPipeline.from_pretrained(tiny_pair, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    call = dict(generator=None, num_inference_steps=3, output_type="latent")
    plain = pipe(PROMPT, plan="reference", **{**call, "generator": seeded()}).frames
    wide = pipe(PROMPT, as_published=True, **{**call, "generator": seeded()}).frames
    assert not torch.equal(plain, wide) and not any(
        e.model.float32_stream for e in pipe.engines.values()
    )
    assert torch.equal(
        plain, pipe(PROMPT, plan="reference", **{**call, "generator": seeded()}).frames
    )
    pictures = pipe(
        PROMPT, as_published=True, **{**call, "generator": seeded(), "output_type": "pil"}
    ).frames[0]
    exact = pipe.decode(wide)[0]
    # cut, not rounded
    assert np.array_equal(
        np.stack([np.asarray(p) for p in pictures]), (exact * 255).astype(np.uint8)
    )


def test_a_plan_of_ones_own_has_its_own_numbers(tiny_pipe):
    plan = parse_plan("large", time_grid(4, 5.0))
    for name, value in (("num_inference_steps", 9), ("shift", 3.0), ("gamma_w", 0.5)):
        with pytest.raises(InputError, match=f"{name} is the plan's own"):
            tiny_pipe(PROMPT, plan=plan, **{name: value})
