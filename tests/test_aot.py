"""Every kernel variant compiles for GPUs that are not here, and none spills on sm_90a."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def rows():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the compiler, not the interpreter
    out = subprocess.run(
        [sys.executable, "-m", "nexus_rt.bench.aot", "--json", "-"], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout)


def test_every_variant_compiles_everywhere(rows):
    from nexus_rt.bench.aot import ARCHITECTURES, all_variants

    assert {(r["variant"], r["arch"]) for r in rows} == {(v.label, a) for v in all_variants() for a in ARCHITECTURES.values()}
    assert all(0 < r["registers"] <= 255 for r in rows)


def test_nothing_spills_on_hopper(rows):
    assert [r["variant"] for r in rows if r["arch"] == "sm_90a" and r["spilled_bytes"]] == []


def test_loads_are_wide(rows):
    """16 bytes a thread where rows are whole: what a kernel at the copy's roof needs."""
    assert all(r["wide_loads"] > 0 for r in rows)
