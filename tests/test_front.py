"""Fronts: read with their limits, and a plan taken within a budget."""

import json
import os

import pytest

from nexus_rt import InputError
from nexus_rt.cli import main
from nexus_rt.pipeline.front import Front, FrontPlan, from_front, read_front
from tests.refusals import refuses

ROW = dict(plan="small:4/10 large:4", ms=900.0, score=0.5, low=0.4, high=0.6)
FRONT = dict(
    front=[ROW, {**ROW, "plan": "large", "ms": 4000.0, "score": 0.9}],
    tried=3,
    judge="pixels",
    costs={"small": 1.0},
    default={**ROW, "plan": "handoff=0.3", "rewrite": "auto"},
)


def written(folder, value):
    path = folder / "front.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_the_best_plan_within_a_budget(tmp_path, capsys):
    path = written(tmp_path, FRONT)
    assert from_front(f"@{path}:900").plan == "small:4/10 large:4"
    assert from_front(f"@{path}:5000.5ms").plan == "large"
    assert main(["plan", "--plan", f"@{path}:900", "--costs", "1,2"]) == 0
    assert "\nsmall:4/10 large:4: 8 small" in capsys.readouterr().out
    with refuses("out_of_range", "plan", InputError):
        from_front(f"@{path}:899.999")
    read_front(path).save(tmp_path / "again.json")
    assert read_front(tmp_path / "again.json") == read_front(path)


@pytest.mark.parametrize(
    "place, value",
    [
        (("front", 0, "ms"), -1.0),
        (("front", 0, "ms"), -1e-9),
        (("front", 0, "ms"), 1e300),
        (("front", 0, "ms"), "900"),
        (("front", 0, "ms"), None),
        (("front", 0, "score"), 1e308),
        (("front", 0, "score"), True),
        (("front", 0, "count"), -1),
        (("front", 0, "count"), 1.5),
        (("front", 0, "wall_ms"), -5),
        (("front", 0, "rewrite"), "loud"),
        (("front", 0, "rewrite"), ["auto"]),
        (("front", 0, "plan"), "nonsense"),
        (("front", 0, "plan"), ""),
        (("front", 0, "plan"), "large:4/4/shift=1e-40"),
        (("front", 0, "plan"), "small:4/10 large:" + "9" * 5000),
        (("front", 0, "plan"), 7),
        (("front", 0), [ROW]),
        (("front", 0), 3),
        (("front",), {"a": ROW}),
        (("tried",), -1),
        (("judge",), 4),
        (("costs",), {"small": -1.0}),
        (("costs",), {"small": "x"}),
        (("costs",), [1.0]),
        (("budget_ms",), -1.0),
        (("default", "plan"), "auto=2e9999"),
        (("settings",), []),
    ],
)
def test_wrong_values_of_a_front_are_named(tmp_path, place, value):
    document = json.loads(json.dumps(FRONT))
    *parents, last = place
    at = document
    for key in parents:
        at = at[key]
    at[last] = value
    path = written(tmp_path, document)
    with pytest.raises(InputError, match="front.json") as caught:
        from_front(f"@{path}:1000")
    assert len(str(caught.value)) < 800


def test_a_front_of_python_is_checked_too():
    with refuses("unknown_name", "plan", InputError):
        FrontPlan("nonsense", 1.0, 0.5, 0.4, 0.6)
    assert Front([FrontPlan(**ROW)], 1, "pixels").front[0].rewrite == "off"


@pytest.mark.parametrize("text", ['{"front": [{"ms": NaN}]}', '{"front": 1e999}', "", "[]"])
def test_no_front(tmp_path, text):
    with pytest.raises(InputError, match="front.json"):
        read_front(written(tmp_path, text))


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", ".", "pipe"])
def test_what_has_no_end_is_not_waited_for(tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with refuses("unreadable", "plan", InputError):
        from_front(f"@{name}:900")
    for command in (["plan", "--costs", "1,2"], ["generate", "a", "-o", "x.mp4"]):
        assert main([*command, "--plan", f"@{name}:900"]) == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["\x00", "a\x00b", "\ud800", "caf\udce9", "~nobody-of-this-name/x", "x" * 5000, "none.json"],
)
def test_names_that_no_file_has(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for ask in (lambda: from_front(f"@{name}:900"), lambda: read_front(name)):
        with pytest.raises(InputError) as caught:
            ask()
        assert len(str(caught.value)) < 800 and str(caught.value).encode()


@pytest.mark.parametrize(
    "text",
    ["@f.json", "@:900", "@f:-1", "@f:nan", "@f:inf", "@f:" + "9" * 400, "@f:1e3", "@f:\u0663"],
)
def test_budgets_that_are_none(text):
    with refuses("invalid_value", "plan", InputError):
        from_front(text)
