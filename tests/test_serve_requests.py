"""Whatever a client sends is a request that can be queued, or one sentence about its field."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt.serve.problems import Problem
from nexus_rt.serve.requests import (
    FIELDS,
    ClipRequest,
    RequestLimits,
    from_form,
    read_create,
    read_remix,
)
from nexus_rt.size import ClipSize
from tests.serving import mini_profile

PROFILE = mini_profile()
KNOWN = RequestLimits(
    models=("nexus-rt",),
    defaults=PROFILE.defaults,
    temporal=4,
    generators=("small", "large"),
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
}  # fmt: skip
BODIES = st.fixed_dictionaries(
    {"prompt": st.one_of(NEAR["prompt"], ODD)},
    optional={n: st.one_of(NEAR.get(n, ODD), ODD) for n in FIELDS if n != "prompt"},
)


def check(read, *arguments):
    """A request that survives the store and that the models can make, or a problem in one piece."""
    try:
        made = read(*arguments)
        assert ClipRequest.stored(json.loads(json.dumps(made.as_row()))) == made
        json.dumps(made.as_row(), ensure_ascii=False).encode()
        planned = PROFILE.check(made)
    except Problem as problem:
        assert 400 <= problem.status < 500 and problem.message and problem.code
        assert problem.response().body
        return None
    assert planned.size == made.size and 1 <= len(planned.plan.steps) <= 100
    assert made.width * made.height * made.num_frames <= 256 * 256 * 81
    assert all(name.split(":")[1].split("@")[0] == "ink" for name in made.loras)
    assert made.batch_key and made.options
    return made


HALF, NUL = "odd \ud800 text", "odd \0 text"


@pytest.mark.parametrize(
    "value", [HALF, NUL, "\udfff", "\0", "x" * 10**6, 10**39, -(10**39), 10**400]
)
@pytest.mark.parametrize("name", FIELDS)
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
        with pytest.raises(Problem, match="unknown parameter"):
            read_create({"prompt": "x", name: 1}, KNOWN)


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
        assert remixed is None or (remixed.seed, remixed.plan) == (made.seed, made.plan)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(FIELDS), TEXT),
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
        with pytest.raises(Problem, match="this server takes at most 100"):
            read(plan)
    for plan in ("small:4/10 large:4/shift=1e-40", "large shift=1e-40", "large:20@1e30"):
        with pytest.raises(Problem, match="expected a number from") as caught:
            read(plan)
        assert caught.value.status == 400 and caught.value.param == "plan"
