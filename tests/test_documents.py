"""Documents that no reader may take: what they hold, and how much."""

import json
import os
import time
from pathlib import Path

import msgspec
import pytest

from nexus_rt import documents
from nexus_rt.errors import InputError, ModelError, NexusError, choose, shorten, shown


class Shape(msgspec.Struct):
    name: str = ""
    count: int = 0
    ratio: float = 0.0
    table: dict[str, int] = {}
    rows: list[float] = []


HOLDING = [
    ('{"name": "a\\ud800"}', "half a surrogate pair"),
    ('{"name": "\\udfffb"}', "half a surrogate pair"),
    ('{"table": {"\\uDC00": 1}}', "half a surrogate pair"),
    ('{"\\ud83d": 1}', "half a surrogate pair"),
    ('{"other": [[{"x": "\\uD83D\\u0020\\uDE00"}]]}', "half a surrogate pair"),
    ('{"ratio": NaN}', "no JSON number"),
    ('{"rows": [-Infinity]}', "no JSON number"),
    ('{"ratio": 1e309}', "beyond float64"),
    ('{"rows": [-1e999999999]}', "beyond float64"),
    ('{"count": %s}' % ("9" * 400), "400 digits"),
    ('{"count": %s}' % ("9" * 5000), "5000 digits"),
    ('{"ratio": 0.%s}' % ("1" * 5000), "5002 characters"),
    ('{"count": 1e3}', "Expected `int`"),
    ('{"count": 1, "count": 2}', "is there twice"),
    ('{"table": {"\\ud800": 1, "\\ud800": 2}}', "is there twice"),
    ("[" * 65 + "]" * 65, "nested more than 64"),
    ("[" * 100_000, "JSON"),
    ('{"a":' * 3000, "JSON"),
]


@pytest.mark.parametrize("text, words", HOLDING, ids=range(len(HOLDING)))
@pytest.mark.parametrize("error", [ModelError, InputError])
def test_a_document_that_no_reader_may_take_is_refused(text, words, error, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(error, match=words) as caught:
        documents.read(path, Shape, error)
    str(caught.value).encode()  # a log, a reply and a terminal can hold it
    assert len(str(caught.value)) < 1600 and str(path) in str(caught.value)


def holds_itself():
    value = []
    value += [value, value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"name": "\ud800"},
        {"\udc00": 1},
        {"table": {"\ud800": 1}},
        {"count": 10**400},
        {"count": -(10**5000)},
        {"rows": [10**400]},
        {"ratio": float("nan")},
        {"rows": (float("-inf"),)},
        {"ratio": 1 + 2j},
        {1: 2},
        {"x": holds_itself()},
        object(),
    ],
    ids=range(12),
)
def test_values_of_python_are_checked_alike(value):
    with pytest.raises(ModelError, match="F ") as caught:
        documents.check(value, Shape, "F")
    str(caught.value).encode()


def test_what_is_right_is_read():
    text = '{"name": "\\ud83d\\ude00\\u0000", "count": -0, "ratio": 1e308, "rows": [1e-400, 10]}'
    assert documents.check(documents.parse(text, "F"), Shape, "F") == Shape(
        "\U0001f600\0", 0, 1e308, {}, [0.0, 10.0]
    )
    assert documents.parse('"\\ud800"', "F", any_text=True) == "\ud800"
    assert documents.parse(json.dumps(10**39), "F") == 10**39


def test_a_doubled_key_of_many_costs_no_time():
    text = "{" + ",".join(f'"k{i}":1' for i in range(100_000)) + ',"k99999":1}'
    began = time.process_time()
    with pytest.raises(ModelError, match="'k99999' is there twice"):
        documents.parse(text, "F")
    assert time.process_time() - began < 2  # every key against every other takes minutes


@pytest.mark.parametrize(
    "path", ["a\0b", "a\ud800b", "/dev/zero", "/dev/null", ".", "no-such-file"]
)
def test_what_is_no_file_is_our_error(path):
    with pytest.raises(ModelError, match="cannot be read") as caught:
        documents.read_bytes(Path(path))
    str(caught.value).encode()


@pytest.mark.parametrize("limit", [10_000, 4999])
def test_a_pipe_is_read_to_its_end_or_the_limit(limit):
    end, writer = os.pipe()
    os.write(writer, b"x" * 5000)
    os.close(writer)
    path = Path(f"/dev/fd/{end}")
    try:
        if limit >= 5000:
            assert documents.read_bytes(path, InputError, limit) == b"x" * 5000
        else:
            with pytest.raises(InputError, match="more than 4999 bytes"):
                documents.read_bytes(path, InputError, limit)
    finally:
        os.close(end)


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")


def test_an_error_can_quote_anything():
    assert "19932 bits" in shorten(10**6000) and "cannot be shown" in shown(Unspeakable())
    assert str(NexusError("a\ud800\udfffb é")) == "a\\ud800\\udfffb é"
    with pytest.raises(InputError, match="unknown colour"):
        choose("colour", Unspeakable(), ["red"])
