"""Documents that no reader may take: what they hold, and how much."""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, ModelError, NexusError, choose, shorten, shown
from tests.refusals import refuses


class Shape(msgspec.Struct):
    name: str = ""
    count: int = 0
    ratio: float = 0.0
    table: dict[str, int] = {}
    rows: list[float] = []


HOLDING = [
    ('{"name": "a\\ud800"}', "invalid_value"),
    ('{"name": "\\udfffb"}', "invalid_value"),
    ('{"table": {"\\uDC00": 1}}', "invalid_value"),
    ('{"\\ud83d": 1}', "invalid_value"),
    ('{"other": [[{"x": "\\uD83D\\u0020\\uDE00"}]]}', "invalid_value"),
    ('{"ratio": NaN}', "not_finite"),
    ('{"rows": [-Infinity]}', "not_finite"),
    ('{"ratio": 1e309}', "out_of_range"),
    ('{"rows": [-1e999999999]}', "out_of_range"),
    ('{"count": %s}' % ("9" * 400), "too_large"),
    ('{"count": %s}' % ("9" * 5000), "too_large"),
    ('{"ratio": 0.%s}' % ("1" * 5000), "too_large"),
    ('{"count": 1e3}', "invalid_type"),
    ('{"count": 1, "count": 2}', "duplicate"),
    ('{"table": {"\\ud800": 1, "\\ud800": 2}}', "duplicate"),
    ("[" * 65 + "]" * 65, "too_large"),
    ("[" * 100_000, "too_large"),
    ('{"a":' * 3000, "too_large"),
    ('{"name": ', "unreadable"),
]


@pytest.mark.parametrize("text, code", HOLDING, ids=range(len(HOLDING)))
@pytest.mark.parametrize("error", [ModelError, InputError])
def test_a_document_that_no_reader_may_take_is_refused(text, code, error, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with refuses(code, kind=error) as caught:
        documents.read(path, Shape, error)
    str(caught.value).encode()  # a log, a reply and a terminal can hold it
    assert len(str(caught.value)) < 1600 and str(path) in str(caught.value)


def holds_itself():
    value = []
    value += [value, value]
    return value


@pytest.mark.parametrize(
    "value, code, param",
    [
        ({"name": "\ud800"}, "invalid_value", None),
        ({"\udc00": 1}, "invalid_value", None),
        ({"table": {"\ud800": 1}}, "invalid_value", None),
        ({"count": 10**400}, "too_large", None),
        ({"count": -(10**5000)}, "too_large", None),
        ({"rows": [10**400]}, "too_large", None),
        ({"ratio": float("nan")}, "not_finite", None),
        ({"rows": (float("-inf"),)}, "not_finite", None),
        ({"ratio": 1 + 2j}, "invalid_type", "ratio"),
        ({1: 2}, "invalid_type", None),
        ({"x": holds_itself()}, "too_large", None),
        (object(), "invalid_type", None),
    ],
    ids=range(12),
)
def test_values_of_python_are_checked_alike(value, code, param):
    with refuses(code, param, ModelError) as caught:
        documents.check(value, Shape, "F")
    assert str(caught.value).encode().startswith(b"F ")


class Row(msgspec.Struct, forbid_unknown_fields=True):
    count: Annotated[int, msgspec.Meta(ge=1)]
    kind: Literal["a", "b"] = "a"
    words: Annotated[list[str], msgspec.Meta(max_length=1)] = []

    def __post_init__(self):
        if self.count == 7:
            raise InputError("7 comes twice", code="duplicate", param="count")
        if self.count == 8:
            raise ModelError("8 does not fit", code="mismatch", param="count")


@pytest.mark.parametrize(
    "row, code, param",
    [
        ({}, "missing", "rows[0].count"),
        ({"count": 1, "length": 2}, "unknown_name", "rows[0].length"),
        ({"count": 1, "kind": "c"}, "unknown_name", "rows[0].kind"),
        ({"count": "1"}, "invalid_type", "rows[0].count"),
        ({"count": 0}, "out_of_range", "rows[0].count"),
        ({"count": 1, "words": ["a", "b"]}, "too_large", "rows[0].words"),
        ({"count": 7}, "duplicate", "count"),
        ({"count": 8}, "mismatch", "count"),
    ],
    ids=range(8),
)
def test_a_broken_schema_names_its_code_and_field(row, code, param):
    with refuses(code, param, ModelError):
        documents.check({"rows": [row]}, msgspec.defstruct("Rows", [("rows", list[Row])]), "F")


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
    with refuses("duplicate") as caught:
        documents.parse(text, "F")
    assert "'k99999'" in str(caught.value)
    assert time.process_time() - began < 2  # every key against every other takes minutes


@pytest.mark.parametrize(
    "path", ["a\0b", "a\ud800b", "/dev/zero", "/dev/null", ".", "no-such-file"]
)
def test_what_is_no_file_is_our_error(path):
    with refuses("not_found" if path == "no-such-file" else "unreadable") as caught:
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
            with refuses("too_large", kind=InputError):
                documents.read_bytes(path, InputError, limit)
    finally:
        os.close(end)


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no words")


def test_an_error_can_quote_anything():
    assert "19932 bits" in shorten(10**6000) and "cannot be shown" in shown(Unspeakable())
    assert str(NexusError("a\ud800\udfffb é")) == "a\\ud800\\udfffb é"
    with refuses("unknown_name", "colour", InputError):
        choose("colour", Unspeakable(), ["red"])
