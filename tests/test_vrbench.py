"""VR-Bench's prompt files, the reading of a judge's replies, and scores."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_rt import InputError
from nexus_rt.bench.vrbench import scoring
from nexus_rt.bench.vrbench.command import EXAMPLE
from nexus_rt.bench.vrbench.protocol import FRAMES, STRICT
from nexus_rt.bench.vrbench.replies import parse
from nexus_rt.bench.vrbench.schema import Question, read_bench, read_taxonomy
from nexus_rt.media.frames import uniform
from tests.refusals import refuses
from tests.vrbench import TAXONOMY, bench_file, first, questions


def test_the_shipped_file_and_its_layers():
    prompts = read_bench(EXAMPLE, TAXONOMY)
    assert [(p.category, p.difficulty, len(p.questions)) for p in prompts] == [
        ("ETV", "easy", 8),
        ("CCR", "medium", 8),
        ("CAC", "hard", 8),
    ]
    assert [q.layer for q in prompts[0].questions] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert all(sum(q.weight for q in p.questions) == pytest.approx(1) for p in prompts)
    assert prompts[0].principle == "Motion follows what causes it." and prompts[1].principle == ""


def test_the_published_taxonomy():
    """Eight categories of three named layers, in three groups that share none."""
    assert sorted(TAXONOMY.names) == sorted("DRF CAR ETV MMC CCR CAC PCR BBR".split())
    assert sorted(c for codes in TAXONOMY.groups.values() for c in codes) == sorted(TAXONOMY.names)
    assert len({layer for layers in TAXONOMY.layers.values() for layer in layers}) == 24
    for name in (
        "ETV",
        "Energy Transfer Visualization",
        "energy_transfer_visualization",
        "Energy Transfer Visualization (ETV)",
    ):
        assert TAXONOMY.code(name) == "ETV"
    assert TAXONOMY.code("My own") == "My own" and TAXONOMY.layer_names("My own") == (
        "layer 1",
        "layer 2",
        "layer 3",
    )


@pytest.mark.parametrize(
    "change, code, place",
    [
        (lambda s: s.clear(), "invalid_type", "bench.json"),
        (lambda s: first(s).pop("id"), "missing", "prompts[0].id"),
        (lambda s: first(s).update(id="a/b"), "invalid_value", "prompts[0].id is 'a/b'"),
        (lambda s: first(s).update(prompt_en=""), "missing", "prompts[0].prompt_en"),
        (lambda s: first(s).update(difficulty=True), "invalid_type", "prompts[0].difficulty"),
        (lambda s: first(s).update(evaluation=[]), "invalid_type", "prompts[0].evaluation"),
        (
            lambda s: first(s)["evaluation"].update(evaluation_questions=[]),
            "missing",
            "prompts[0].evaluation is not as expected: evaluation_questions is empty",
        ),
        (
            lambda s: questions(s)[1].update(id="two"),
            "invalid_value",
            'id is \'two\'; expected "q1", "q2", ... - at `evaluation_questions[1]`',
        ),
        (lambda s: questions(s)[1].update(id="q1"), "duplicate", "'q1'"),
        (
            lambda s: questions(s)[2].update(question=""),
            "missing",
            "at `evaluation_questions[2]`",
        ),
        (
            lambda s: questions(s)[2].update(weight="1"),
            "invalid_type",
            "at `evaluation_questions[2].weight`",
        ),
        (lambda s: questions(s)[2].update(weight=-1), "out_of_range", "[2].weight"),
        (lambda s: questions(s)[2].update(weight=1e308), "out_of_range", "[2].weight"),
        (lambda s: questions(s)[2].update(weight=10**39), "out_of_range", "[2].weight"),
        (
            lambda s: questions(s)[2].update(id="q" + "9" * 5000),
            "invalid_value",
            "evaluation_questions[2]",
        ),
        (
            lambda s: questions(s)[2].update(id="q\u0661"),
            "invalid_value",
            "evaluation_questions[2]",
        ),
        (lambda s: questions(s)[2].update(question="a \ud800"), "invalid_value", "surrogate"),
        (
            lambda s: questions(s)[2].update(importance_score="x"),
            "invalid_type",
            "[2].importance_score",
        ),
        (
            lambda s: [q.update(weight=0) for q in questions(s)],
            "out_of_range",
            "prompts[0].evaluation is not",
        ),
        (
            lambda s: next(iter(s.values()))["prompts"].append(first(s)),
            "duplicate",
            "'etv_example_1'",
        ),
        (lambda s: s.update(X=3), "invalid_type", "X.prompts"),
    ],
)
def test_a_file_that_breaks_the_schema_names_the_field(change, code, place, tmp_path):
    path = bench_file(tmp_path, change)
    with refuses(code, kind=InputError) as caught:
        read_bench(path, TAXONOMY)
    assert place in str(caught.value)


def test_a_number_is_read_as_a_prompts_text(tmp_path):
    path = bench_file(tmp_path, lambda s: first(s).update(prompt_en=3))
    assert read_bench(path, TAXONOMY)[0].text == "3"


def test_ids_are_one_namespace_over_a_folder(tmp_path):
    bench_file(tmp_path, name="1.json")
    bench_file(tmp_path, name="2.json")
    with refuses("duplicate", kind=InputError):
        read_bench(tmp_path, TAXONOMY)


def test_a_taxonomy_of_ones_own(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(
        json.dumps({"categories": {"ETV": {"name": "Energy"}}, "groups": {"All": ["ETV"]}})
    )
    assert (
        read_taxonomy(own).groups == {"All": ("ETV",)}
        and read_taxonomy(own).layer_names("ETV")[0] == "layer 1"
    )
    own.write_text(
        json.dumps({"categories": {"ETV": {"name": "Energy"}}, "groups": {"All": ["XYZ"]}})
    )
    with refuses("unknown_name", "groups.All", InputError) as caught:
        read_taxonomy(own)
    assert "'XYZ'" in str(caught.value)
    own.write_text(
        json.dumps({"categories": {"ETV": {"name": "Energy", "layers": ["a"]}}, "groups": {}})
    )
    with refuses("mismatch", "categories.ETV.layers", InputError):
        read_taxonomy(own)


def test_frames_are_sampled_uniformly():
    frames = np.arange(81)[:, None, None, None]
    picked = uniform(frames, FRAMES)[:, 0, 0, 0]
    assert (
        len(picked) == 16 and picked[0] == 0 and picked[-1] == 80 and set(np.diff(picked)) <= {5, 6}
    )
    assert len(uniform(frames[:16], FRAMES)) == 16 and len(uniform(frames[:3], FRAMES)) == 3


WHOLE = {
    "video_id": "v",
    "answers": {"q1": {"answer": "Yes", "reason": "a"}, "q2": {"answer": "No", "reason": ""}},
}
READ = WHOLE["answers"]


@pytest.mark.parametrize(
    "reply, found",
    [
        (json.dumps(WHOLE), READ),
        ("```json\n" + json.dumps(WHOLE, indent=2) + "\n```", READ),
        ("Let me think {about} it: " + json.dumps(WHOLE) + " Hope that helps! {}", READ),
        ('{"note": 1} ' + json.dumps(WHOLE), READ),
        (json.dumps(READ), READ),
        (
            '{"answers": {"q1": "yes.", "q2": false}}',
            {"q1": {"answer": "Yes", "reason": ""}, "q2": {"answer": "No", "reason": ""}},
        ),
        (
            '{"answers": {"q1": {"answer": "YES", "reason": "a"}, "q2": {"answer": "maybe"}}}',
            {"q1": READ["q1"]},
        ),
        ('{"answers": {"q1": {"answer": "Yes and No"}}}', {}),
        ("Yes, all of it.", {}),
        ('{"answers": ["Yes", "No"]}', {}),
        ('{"answers": {"q1": {"answer": "Yes", "rea', {}),
        ("", {}),
        ("{" * 5000, {}),
    ],
)
def test_replies_are_read_tolerantly_and_never_guessed(reply, found):
    assert parse(reply, ["q1", "q2"]) == found


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text):
    assert set(parse(text, ["q1"])) <= {"q1"}


def test_the_request_asks_everything_at_once():
    prompt = read_bench(EXAMPLE, TAXONOMY)[0]
    text = STRICT.render(prompt, 16)
    assert all(f"{q.id} (weight {q.weight:g}): {q.text}" in text for q in prompt.questions)
    assert (
        prompt.text in text
        and prompt.principle in text
        and "only partly visible counts as Yes" in text
    )
    assert (
        '{"video_id": "etv_example_1", "answers": {"q1": {"answer": "Yes" or "No", "reason"' in text
    )


def answered(*words, weights=None):
    weights = weights or [1.0] * len(words)
    return {
        f"q{i + 1}": {
            "answer": w,
            "weight": weights[i],
            "layer": Question(f"q{i + 1}", "", 1).layer,
        }
        for i, w in enumerate(words)
    }


def test_scores_are_weighted_and_unknown_is_neither_yes_nor_no():
    names = ("a", "b", "c")
    found = scoring.clip_scores(
        answered("Yes", "No", "Yes", "Yes", "No", "Unknown", weights=[3, 1, 1, 1, 1, 9]), names
    )
    assert found == {
        "score": round(5 / 7, 4),
        "layers": {"a": 0.75, "b": 0.6667, "c": None},
        "unknown": 1,
        "questions": 6,
    }
    assert scoring.clip_scores(answered("Unknown"), names)["score"] is None
    # four places, as published
    assert scoring.clip_scores(answered("Yes", "No", "No"), names)["score"] == 0.3333


ROWS = st.lists(
    st.tuples(st.sampled_from(["Yes", "No", "Unknown"]), st.integers(0, 100)),
    min_size=1,
    max_size=10,
)


@settings(deadline=None)
@given(ROWS, st.floats(0.1, 10))
def test_scores_are_shares(rows, factor):
    make = lambda f: [{"answer": a, "weight": w * f} for a, w in rows]
    score = scoring.weighted(make(1))
    if score is None:
        assert sum(w for a, w in rows if a != "Unknown") == 0
        return
    assert 0 <= score <= 1 and score == pytest.approx(scoring.weighted(make(factor)), abs=1.01e-4)
    swapped = [
        {**r, "answer": {"Yes": "No", "No": "Yes"}.get(r["answer"], r["answer"])} for r in make(1)
    ]
    assert scoring.weighted(swapped) == pytest.approx(1 - score, abs=1.01e-4)


def test_intervals_hold_the_mean_and_shrink():
    rng = np.random.default_rng(3)
    few, many = (list(rng.uniform(0, 1, n)) for n in (12, 600))
    a, b = scoring.mean_interval(few), scoring.mean_interval(many)
    assert a["low"] < a["mean"] < a["high"] and b["high"] - b["low"] < a["high"] - a["low"]
    half = 1.96 * np.std(many) / np.sqrt(len(many))  # the normal theory's interval, of many values
    assert (b["high"] - b["low"]) / 2 == pytest.approx(half, rel=0.1)
    assert scoring.mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "count": 1}


def clip(category, difficulty, *words):
    return {
        "category": category,
        "difficulty": difficulty,
        **scoring.clip_scores(answered(*words), TAXONOMY.layer_names(category)),
    }


def test_the_summary_groups_as_the_taxonomy_says():
    clips = {
        "a": clip("ETV", "easy", "Yes", "Yes"),
        "b": clip("DRF", "hard", "No", "No"),
        "c": clip("BBR", "easy", "Yes", "No"),
        "d": clip("Mine", "", "Unknown"),
    }
    found = scoring.summary(clips, TAXONOMY)
    assert (
        found["overall"]["mean"] == 0.5
        and found["overall"]["count"] == 3
        and found["overall"]["unknown"] == 1
    )
    assert {g: s["mean"] for g, s in found["groups"].items()} == {
        "Physical World": 0.5,
        "Embodied": 0.5,
    }
    assert {c: s["mean"] for c, s in found["categories"].items()} == {
        "DRF": 0.0,
        "ETV": 1.0,
        "BBR": 0.5,
        "Mine": None,
    }
    assert (
        list(found["difficulties"]) == ["easy", "hard"]
        and found["difficulties"]["easy"]["mean"] == 0.75
    )
    assert found["categories"]["ETV"]["layers"]["energy_continuity"]["mean"] == 1.0
    other = {**clips, "a": clip("ETV", "easy", "Yes", "No"), "b": clip("DRF", "hard", "Yes", "No")}
    pair = scoring.paired(clips, {k: v for k, v in other.items() if k != "c"})
    assert (pair["better"], pair["worse"], pair["same"], pair["count"], pair["mean"]) == (
        1,
        1,
        0,
        2,
        0.0,
    )
