"""Whatever a client sends is a request that can be queued, or one sentence about its field."""

import json
import math
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt.core.fields import SERVER, described
from nexus_rt.core.size import ClipSize
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.pipeline import settings as call_settings
from nexus_rt.pipeline.settings import CallSettings
from nexus_rt.serve.bodies import from_form
from nexus_rt.serve.problems import Problem
from nexus_rt.serve.requests import (
    INPUTS,
    OWN,
    ClipRequest,
    RequestLimits,
    field_names,
    read_create,
    read_remix,
)
from tests.serving import mini_profile

PROFILE = mini_profile()
KNOWN = RequestLimits(
    models=("nexus-rt",),
    pair=PROFILE,
    loras=["ink"],
    fps="16",
    deadline=60.0,
    max_size=ClipSize(256, 256, 81),
    max_steps=100,
)
TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXT,
    st.lists(st.one_of(TEXT, st.integers(), st.none()), max_size=3),
    st.dictionaries(TEXT, st.integers(), max_size=2),
)  # fmt: skip
NEAR = {
    "prompt": st.sampled_from(["a star", "", " ", "\0", "x" * 32_000, "x" * 32_001]),
    "size": st.sampled_from(["64x64", "80X64", "65x64", "x", "1x1", "-64x64", "64x64x64", "٦٤x64"]),
    "seconds": st.sampled_from(["1", 1, 1.5, "1e3", "inf", "nan", "-1", "0", " 2 ", "1_0"]),
    "fps": st.sampled_from([16, "16", "23.976", "30000/1001", "1/0", 0, -1, 1e9, "inf"]),
    "plan": st.sampled_from(
        ["small", "large", "handoff=0.5", "handoff=nan", "small:2 large:*", "small:0 large:*",
         "reference", "auto=0.1", "small:10% large:*@3/every=2", "small:-1", "@x:3", "small:9999999",
         "handoff=" + "9" * 400, "small:1e9 large:*", "bridge:5", "small:6/11 large:4@3"],
    ),
    "num_frames": st.sampled_from([1, 5, 17, 18, 0, -3, 10**9, "17", True]),
    "seed": st.sampled_from([0, -1, 2**64 - 1, 2**64, 7, "7", 1.0]),
    "lora": st.sampled_from(["ink", "ink@2", "small:ink", ["ink", "ink"], "ink@nan", "../ink", []]),
    "rewrite": st.sampled_from(["auto", "off", "a blue star", ""]),
    "guidance_scale": st.sampled_from([1, 5.0, -1, 1e9, "5", float("inf")]),
    "num_inference_steps": st.sampled_from([1, 8, 100, 101, 0]),
    "model": st.sampled_from(["nexus-rt", "sora-2", ""]),
    "energy": st.sampled_from(["none", "progressive", "loud", ""]),
    "gamma_w": st.sampled_from([0.3, 1, 0, -1, 1e9]),
    "timesteps": st.sampled_from([[1000, 500], [500, 1000], [], [10**39], ["5"], [5] * 101, 5]),
    "small_steps": st.sampled_from([1, 8, 100, 101, 0]),
    "large_steps": st.sampled_from([1, 8, 100, 101, 0]),
    "blend": st.sampled_from([{}, {"split": "dct"}, {"order": 0}, {"sigma_min": 9}, {"x": 1}]),
    "as_published": st.sampled_from([True, False, "true", 1]),
}  # fmt: skip
BODIES = st.fixed_dictionaries(
    {"prompt": st.one_of(NEAR["prompt"], ODD)},
    optional={n: st.one_of(NEAR.get(n, ODD), ODD) for n in field_names() if n != "prompt"},
)


def check(read, *arguments):
    """A request that survives the store and that the models can make, or a problem in one piece."""
    try:
        made = read(*arguments)
        assert ClipRequest.stored(json.loads(json.dumps(made.as_row()))) == made
        json.dumps(made.as_row(), ensure_ascii=False).encode()
        planned = PROFILE.check(made, 100)
    except Problem as problem:
        assert 400 <= problem.status < 500 and problem.message and problem.code
        known = problem.code in ("invalid_body", "unknown_parameter")
        assert known or problem.param in (*field_names(), *INPUTS), problem.param
        assert problem.response().body
        return None
    assert planned.size == made.size and 1 <= len(planned.plan.steps) <= 100
    assert math.prod(made.size) <= 256 * 256 * 81
    assert all(name.split(":")[1].split("@")[0] == "ink" for name in made.loras)
    assert made.batch_key and made.call
    return made


HALF, NUL = "odd \ud800 text", "odd \0 text"


@pytest.mark.parametrize(
    "value", [HALF, NUL, "\udfff", "\0", "x" * 10**6, 10**39, -(10**39), 10**400]
)
@pytest.mark.parametrize("name", field_names())
def test_no_field_takes_what_is_no_text_or_no_number(name, value):
    """Alone, in a list and in an object."""
    for odd in (value, [value], {"a": value}, {str(value)[:50]: 1}, [[value]]):
        with pytest.raises(Problem) as refused:
            read_create({"prompt": "x", name: odd}, KNOWN)
        problem = refused.value
        assert problem.status in (400, 404) and problem.param == name, (odd, problem)
        assert len(problem.message) < 2000 and problem.response().body


@pytest.mark.parametrize("name", [HALF, NUL, "", "x" * 10**6, "seed[0]", "__class__"])
def test_names_that_are_no_fields(name):
    for fields in ([(name, "1")] * 2, [(name, "x")], [(name, b"file")]):
        with pytest.raises(Problem) as refused:
            read_create(from_form([("prompt", "x"), *fields]), KNOWN)
        assert refused.value.status == 400 and len(refused.value.param) <= 500
        assert refused.value.response().body
    if name != "seed[0]":
        with pytest.raises(Problem) as refused:
            read_create({"prompt": "x", name: 1}, KNOWN)
        assert refused.value.code == "unknown_parameter"


@pytest.mark.parametrize(
    "seconds",
    ["1_0", "\u0661", "1e0", "inf", "nan", "0" * 40 + "1", "1" * 400, "1\0", 10**400, True],
)
def test_seconds_are_plain_digits(seconds):
    with pytest.raises(Problem) as refused:
        read_create({"prompt": "x", "seconds": seconds}, KNOWN)
    assert refused.value.param == "seconds"


@pytest.mark.parametrize("scale", ["0.5", "123.123456", "0.000001", "-2", "999", "100"])
def test_a_loras_scale_keeps_its_digits(scale):
    made = read_create({"prompt": "x", "lora": f"ink@{scale}"}, KNOWN)
    assert made.loras == (f"large:ink@{scale}",)


@settings(max_examples=300, deadline=None)
@given(st.one_of(BODIES, ODD))
def test_any_json_is_a_request_or_a_sentence(body):
    made = check(read_create, body, KNOWN)
    if made is not None:
        remixed = check(read_remix, {"prompt": "another"}, made)
        if remixed is not None:
            assert remixed.seed == made.seed
            assert remixed.settings.replace(rewrite=made.settings.rewrite) == made.settings


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(field_names()), TEXT),
            st.sampled_from(sorted(NEAR)).flatmap(
                lambda name: st.tuples(st.just(name), NEAR[name].map(str))
            ),
        ),
        max_size=6,
    )
)
def test_any_form_is_a_request_or_a_sentence(fields):
    check(lambda: read_create(from_form([("prompt", "a star"), *fields]), KNOWN))


def test_a_plans_exact_text_is_taken_and_its_steps_are_bounded():
    """Decimals of a text are no steps; a plan of too many is refused before it is made."""
    read = lambda plan: PROFILE.check(read_create({"prompt": "a", "plan": plan}, KNOWN)).plan
    for plan in (
        "handoff=timestep:850",
        "large:20@3.1234567",
        "reference gamma-w=0.300000000000000444",
        "small:4/10 large:4/shift=2.999999999",
        "large sigmas=0.9333333333333333,0.5,0",
    ):
        made = read(plan)
        assert read(made.text) == made
    for plan in ("small:101/999999999 large:4", "large:101", "large steps=101", "small:4/101"):
        with pytest.raises(Problem, match=r"\b100\b") as refused:  # the server's bound
            read(plan)
        assert (refused.value.code, refused.value.param) == ("invalid_value", "plan")
    for plan in ("small:4/10 large:4/shift=1e-40", "large shift=1e-40", "large:20@1e30"):
        with pytest.raises(Problem, match=r"\b1000\b") as refused:  # the number's bound
            read(plan)
        assert (refused.value.status, refused.value.param) == (400, "plan")


# --- the settings of a call ---

SENT = {  # a setting as JSON has it, and as a form does
    "num_frames": (9, "9"),
    "num_inference_steps": (8, "8"),
    "guidance_scale": ([4, 3.0], "4,3"),
    "guidance_scale_2": (2.5, "2.5"),
    "plan": ("auto=0.1", "auto=0.1"),
    "shift": (4, "4"),
    "blend": ({"split": "dct", "rho_max": 0.5}, '{"split": "dct", "rho_max": 0.5}'),
    "energy": ("progressive", "progressive"),
    "gamma_w": (0.5, "0.5"),
    "solver": ("euler", "euler"),
    "as_published": (True, "true"),
    "rewrite": ("a red disk", "a red disk"),
    "timesteps": ([1000, 750.5], "1000,750.5"),
    "small_steps": (8, "8"),
    "large_steps": (6, "6"),
}


def test_every_setting_of_a_server_is_a_field_in_json_and_in_a_form():
    """As the call itself keeps it, through the store."""
    assert list(SENT) == list(call_settings.fields(SERVER))
    assert not set(OWN) & set(CallSettings.__struct_fields__)
    for name, (value, text) in SENT.items():
        expected = CallSettings(**{"width": 64, "height": 64, "num_frames": 17, name: value})
        for body in ({"prompt": "x", name: value}, from_form([("prompt", "x"), (name, text)])):
            made = read_create(body, KNOWN)
            assert made.settings == expected, name
            row = json.loads(json.dumps(made.as_row()))
            assert name in row and ClipRequest.stored(row) == made
    blend = read_create({"prompt": "x", "blend": SENT["blend"][0]}, KNOWN).settings.blend
    assert blend == BlendConfig(split="dct", rho_max=0.5)


def test_a_new_setting_is_a_field_of_the_server(monkeypatch):
    class Longer(CallSettings, frozen=True, kw_only=True):
        grain: Annotated[float | None, described("film grain", 0.0, 1.0)] = None
        quiet: Annotated[int | None, described("of Python alone", 0, 9, fronts=())] = None

    monkeypatch.setattr(call_settings, "CallSettings", Longer)
    for body in ({"prompt": "x", "grain": 1}, from_form([("prompt", "x"), ("grain", "1")])):
        made = read_create(body, KNOWN)
        assert made.settings.grain == made.as_row()["grain"] == 1.0
        assert ClipRequest.stored(json.loads(json.dumps(made.as_row()))) == made
    for body, code in (({"grain": 2}, "invalid_value"), ({"quiet": 1}, "unknown_parameter")):
        with pytest.raises(Problem) as refused:
            read_create({"prompt": "x", **body}, KNOWN)
        assert (refused.value.code, refused.value.param) == (code, *body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"num_inference_steps": 101}, "num_inference_steps"),
        ({"small_steps": 101}, "small_steps"),
        ({"large_steps": 101}, "large_steps"),
        ({"timesteps": list(range(1000, 0, -5))}, "timesteps"),
        ({"plan": "small:101 large:4"}, "plan"),
        ({"plan": "small", "small_steps": 100}, None),
        ({"plan": "small:60/70 large:60"}, "plan"),  # each count is small enough
    ],
)
def test_all_counts_of_steps_are_bounded(body, param):
    def read():
        return PROFILE.check(read_create({"prompt": "x", **body}, KNOWN), KNOWN.max_steps)

    if param is None:
        assert len(read().plan) == 100
        return
    with pytest.raises(Problem, match=r"\b100\b") as refused:  # the server's bound
        read()
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"size": "80x48", "num_frames": 0}, "num_frames"),
        ({"size": "65x64"}, "size"),
        ({"size": "64x65"}, "size"),
        ({"size": "16400x16", "num_frames": 1}, "size"),
        ({"plan": "large shift=1e-40"}, "plan"),  # of the plan's text
        ({"plan": "large", "shift": 1e-40}, "shift"),
        ({"plan": "small:4 large:4", "num_inference_steps": 3}, "plan"),
        ({"plan": "small:4/10 large:4", "num_inference_steps": 3}, "num_inference_steps"),
        ({"plan": "small", "rewrite": "auto"}, "rewrite"),
        ({"plan": "small", "gamma_w": 0.5}, "gamma_w"),
        ({"plan": "small", "as_published": True}, "plan"),
        ({"timesteps": [1000, 500]}, "timesteps"),  # the pair's plan has clocks
        ({"guidance_scale": [4, 3]}, "guidance_scale"),
        ({"guidance_scale": [4, 3, 2]}, "guidance_scale"),
        ({"blend": {"gamma_hf": 2}}, "blend"),
        ({"blend": [1]}, "blend"),
        ({"as_published": "yes"}, "as_published"),
        ({"energy": "loud"}, "energy"),
    ],
)
def test_the_field_at_fault_is_named(body, param):
    with pytest.raises(Problem) as refused:
        PROFILE.check(read_create({"prompt": "x", **body}, KNOWN))
    assert (refused.value.status, refused.value.param) == (400, param), refused.value.message


def test_a_remix_keeps_all_but_the_prompt_and_its_text_for_the_large_generator():
    source = read_create({"prompt": "x", "seed": 3, "shift": 4, "rewrite": "a red disk"}, KNOWN)
    made = read_remix({"prompt": "y"}, source)
    assert (made.prompt, made.seed, made.settings.shift) == ("y", 3, 4.0)
    assert made.settings.rewrite is None
    off = read_create({"prompt": "x", "rewrite": "off"}, KNOWN)
    assert read_remix({"prompt": "y"}, off).settings == off.settings
