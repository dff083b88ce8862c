"""Every kernel variant compiles for GPUs that are not here, and none spills."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


ALL = (80, 90, 100, 120)


# Hopper in every run, all of them in the slow one.
@pytest.fixture(scope="module", params=[(90,), pytest.param(ALL, marks=pytest.mark.slow)])
def arches(request):
    return request.param


@pytest.fixture(scope="module")
def rows(arches):
    # the compiler, not the interpreter
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-m", "nexus_rt.bench.aot", "--json", "-", "--arch", *map(str, arches)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout)


def test_every_variant_compiles_everywhere(rows, arches):
    from nexus_rt.bench.aot import ARCHITECTURES, all_variants

    assert set(ALL) == set(ARCHITECTURES)
    wanted = {
        (v.label, ARCHITECTURES[a])
        for v in all_variants()
        for a in v.arches or ARCHITECTURES
        if a in arches
    }
    assert {(r["variant"], r["arch"]) for r in rows} == wanted
    assert {a for _, a in wanted} == {ARCHITECTURES[a] for a in arches}
    assert len(rows) == len({(r["variant"], r["arch"]) for r in rows})
    assert all(0 < r["registers"] <= 255 for r in rows)


def test_nothing_spills(rows):
    """Under Triton 3.6 two variants do, by no more than two 8-byte registers each way."""
    import triton

    most = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 16
    assert [(r["variant"], r["arch"]) for r in rows if r["spilled_bytes"] > most] == []


def test_attention_uses_hoppers_matrix_units_and_fits_shared_memory(rows):
    own = [r for r in rows if r["variant"].startswith("attention")]
    hopper = [r for r in own if r["arch"] == "sm_90a"]
    assert hopper and all(r["wgmma"] for r in hopper)
    limits = {
        "sm_80": 163 * 1024,
        "sm_90a": 227 * 1024,
        "sm_100a": 227 * 1024,
        "sm_120a": 99 * 1024,
    }
    assert all(r["shared_bytes"] <= limits[r["arch"]] for r in rows)
    for r in own:
        assert bool(r["copied_by_descriptor"]) == ("pointers" not in r["variant"])
        assert r["warp_specialised"] == ("specialised" in r["variant"])
        assert r["fp8_products"] == r["variant"].startswith("attention_fp8")


def test_loads_are_wide(rows):
    """16 bytes a thread where rows are whole: what a kernel at the copy's roof needs."""
    assert [
        r["variant"]
        for r in rows
        if not r["wide_loads"] and not r["variant"].startswith("attention")
    ] == []


def test_occupancy_follows_the_programming_guides_rules():
    """Worked by hand from its tables: 65,536 registers, out in units of 256 a warp, four
    partitions; 1 KiB more a block."""
    from nexus_rt.bench.aot import occupancy

    assert occupancy(90, 4, 32, 0) == (64, "warps")
    # 8,192 registers a warp: two in each partition
    assert occupancy(90, 8, 255, 0) == (
        8,
        "registers",
    )
    assert occupancy(90, 4, 168, 0) == (12, "registers")  # 5,376 a warp: three in each
    assert occupancy(90, 4, 40, 100 << 10) == (8, "shared memory")  # 228 / 101
    assert occupancy(120, 4, 40, 49 << 10) == (8, "shared memory")  # 100 / 50
    assert occupancy(120, 16, 40, 0) == (48, "warps") and occupancy(90, 1, 32, 0) == (32, "blocks")


def test_every_program_fits_and_memory_bound_ones_fill_half_a_multiprocessor(rows):
    """Latency is hidden by warps: a kernel at the copy's roof needs many, a product's tile does
    not."""
    from nexus_rt.bench.aot import ARCHITECTURES, LIMITS

    limits = {name: LIMITS[arch].warps for arch, name in ARCHITECTURES.items()}
    assert all(r["resident_warps"] >= r["block_warps"] for r in rows)
    rowwise = [
        r for r in rows if r["variant"].split()[0] in ("modulate", "qk_norm_rope", "solver_step")
    ]
    assert rowwise and all(r["resident_warps"] >= limits[r["arch"]] / 2 for r in rowwise)
