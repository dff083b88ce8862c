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
    assert len(rows) == len({(r["variant"], r["arch"]) for r in rows})
    assert all(0 < r["registers"] <= 255 for r in rows)


def test_nothing_spills_on_hopper(rows):
    assert [r["variant"] for r in rows if r["arch"] == "sm_90a" and r["spilled_bytes"]] == []


def test_attention_uses_hoppers_matrix_units_and_fits_shared_memory(rows):
    own = [r for r in rows if r["variant"].startswith("attention")]
    assert own and all(r["wgmma"] for r in own if r["arch"] == "sm_90a")
    limits = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024, "sm_120a": 99 * 1024}
    assert all(r["shared_bytes"] <= limits[r["arch"]] for r in own)


def test_loads_are_wide(rows):
    """16 bytes a thread where rows are whole: what a kernel at the copy's roof needs."""
    assert all(r["wide_loads"] > 0 for r in rows if not r["variant"].startswith("attention"))
