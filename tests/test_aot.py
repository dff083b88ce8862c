"""Every kernel variant compiles for GPUs that are not here, and none spills."""

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

    wanted = {(v.label, ARCHITECTURES[a]) for v in all_variants() for a in v.arches or ARCHITECTURES}
    assert {(r["variant"], r["arch"]) for r in rows} == wanted and {a for _, a in wanted} == set(ARCHITECTURES.values())
    assert len(rows) == len({(r["variant"], r["arch"]) for r in rows})
    assert all(0 < r["registers"] <= 255 for r in rows)


def test_nothing_spills(rows):
    assert [(r["variant"], r["arch"]) for r in rows if r["spilled_bytes"]] == []


def test_attention_uses_hoppers_matrix_units_and_fits_shared_memory(rows):
    own = [r for r in rows if r["variant"].startswith("attention")]
    hopper = [r for r in own if r["arch"] == "sm_90a"]
    assert hopper and all(r["wgmma"] for r in hopper)
    limits = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100a": 227 * 1024, "sm_120a": 99 * 1024}
    assert all(r["shared_bytes"] <= limits[r["arch"]] for r in rows)
    for r in own:
        assert bool(r["copied_by_descriptor"]) == ("pointers" not in r["variant"])
        assert r["warp_specialised"] == ("specialised" in r["variant"])
        assert r["fp8_products"] == r["variant"].startswith("attention_fp8")


def test_loads_are_wide(rows):
    """16 bytes a thread where rows are whole: what a kernel at the copy's roof needs."""
    assert [r["variant"] for r in rows if not r["wide_loads"] and not r["variant"].startswith("attention")] == []
