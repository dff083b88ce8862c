"""What the tests themselves stand on: tools named with their extras, groups, what is built once."""

import os
import re

import pytest

from tests import built, needs
from tests.conftest import GROUPS


def test_every_extra_is_one_of_the_package():
    text = (built.ROOT / "pyproject.toml").read_text()
    for module, extra in needs.EXTRAS.items():
        assert re.search(rf"(?m)^{extra} = \[", text), module


def test_a_missing_tool_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    words = 'ray, fastapi not installed or too old: pip install "nexus-rt[dev,ray]"'
    assert needs.missing("ray", "fastapi") == words and needs.missing() is None
    with pytest.raises(pytest.skip.Exception, match="nexus-rt.ray."):
        needs.needs("ray")


def test_a_tool_that_is_too_old_counts_as_missing(monkeypatch):
    monkeypatch.setattr(needs, "find_spec", lambda name: True)
    monkeypatch.setattr(needs, "version", lambda name: "3.6.1")
    assert "triton" in needs.missing("triton")
    monkeypatch.setattr(needs, "version", lambda name: "3.10.0")
    assert needs.missing("triton") is None


def test_each_group_has_a_mark_and_is_left_out_by_default(pytestconfig):
    marks = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    text = (built.ROOT / "pyproject.toml").read_text()
    expression = re.search(r"(?m)^addopts = .*-m '([^']*)'", text)[1]
    for name in (*GROUPS, "slow", "exhaustive"):
        assert name in marks and name in expression


def test_what_is_built_is_built_once_and_again_after_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(built, "folder", lambda: tmp_path)
    made = []

    def make(path):
        made.append(path)
        (path / "a").write_text("half")
        if len(made) == 1:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        built.once("x", make)
    assert built.once("x", make) == built.once("x", make) == tmp_path / "x"
    assert len(made) == 2 and (tmp_path / "x" / "a").is_file()


def test_the_oldest_states_go(monkeypatch, tmp_path):
    monkeypatch.setattr(built, "store", lambda: tmp_path)
    for age in range(6):
        path = tmp_path / f"state{age}"
        path.mkdir()
        os.utime(path, (1e9 - age, 1e9 - age))
    built.folder.cache_clear()
    try:
        own = built.folder()
    finally:
        built.folder.cache_clear()
    assert own.name == built.state() and own.is_dir()
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {own.name, "state0", "state1"}
