"""The measures of finish: they must tell fine from rough, one texture from another, steady from
shaken."""

import numpy as np
import pytest
from scipy import ndimage

from nexus_rt import NexusPipeline
from nexus_rt.bench.shapes import world
from training import metrics
from training.evaluate import Row, measure, summarise


def clip(scene, seed=0, **kwargs):
    return (
        world.render(scene, np.random.default_rng(seed), **kwargs).transpose(0, 2, 3, 1) + 1
    ) / 2


def scene(texture="striped", shape="square"):
    return world.Scene(shape, "red", texture, "left", "grey")


def test_wilson_interval_and_spectrum():
    low, high = metrics.wilson(80, 100)
    assert low == pytest.approx(0.7112, abs=1e-3) and high == pytest.approx(0.8666, abs=1e-3)
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    frames = clip(scene())
    soft = ndimage.gaussian_filter(frames, (0, 1, 1, 0))
    assert (metrics.spectrum(frames) - metrics.spectrum(soft))[
        16:
    ].min() > 0.3  # a blur takes the high frequencies


@pytest.mark.parametrize("name", world.TEXTURES)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_true_texture_is_most_like_its_own(name, shape):
    frames = clip(scene(name, shape))
    scores = {n: metrics.texture_similarity(frames, n) for n in world.TEXTURES}
    assert max(scores, key=scores.get) == name and scores[name] > 0.7
    if name != "plain":
        assert (
            metrics.texture_similarity(clip(scene(name, shape), rough=True), name)
            < scores[name] - 0.3
        )


def test_colour_and_background_do_not_matter_to_texture():
    a = metrics.texture_similarity(
        clip(world.Scene("square", "yellow", "dotted", "up", "black"), 4), "dotted"
    )
    b = metrics.texture_similarity(
        clip(world.Scene("square", "blue", "dotted", "up", "white"), 4), "dotted"
    )
    assert abs(a - b) < 0.06


def test_consistency_sees_flicker_and_change():
    frames = clip(scene())
    steady = metrics.consistency(frames)
    noisy = np.clip(frames + 0.15 * np.random.default_rng(0).normal(size=frames.shape), 0, 1)
    other = frames.copy()
    other[2::4] = clip(world.Scene("square", "red", "dotted", "left", "grey"))[2::4]
    assert (
        steady > 0.9
        and metrics.consistency(noisy) < steady - 0.1
        and metrics.consistency(other) < steady - 0.2
    )
    assert metrics.consistency(np.full((17, 64, 64, 3), 0.5)) == 0.0
    assert metrics.texture_similarity(np.full((17, 64, 64, 3), 0.5), "plain") == 0.0


def test_rows_are_read_and_summed_up(tiny_pair):
    pipe = NexusPipeline.from_pretrained(tiny_pair)
    row = Row.parse("handoff=0.5,bridge=1,split=fft,guidance=4,unguided=0.5")
    assert (row.plan, row.split, row.guidance, row.unguided) == (
        "handoff=0.5,bridge=1",
        "fft",
        4.0,
        0.5,
    )
    plan = row.make(pipe)
    assert [s.guidance_large for s in plan.steps] == [None] * 3 + [1.0] * 3
    # three guided small, the bridge and two large unguided
    assert plan.evaluations(4.0, 4.0) == {
        "small": 7,
        "large": 3,
    }
    right, wrong = clip(scene()), clip(world.Scene("star", "red", "striped", "left", "grey"))
    about = {"id": [1, 0], "ms": 0.0}
    records = [{"row": "true renderings", **about, **measure(right, scene())}]
    blurred = ndimage.gaussian_filter(right, (0, 1, 1, 0))
    records += [{"row": "true through the VAE", **about, **measure(blurred, scene())}]
    records += [
        {"row": row.name, "id": [1, k], "ms": 5.0, "held_out": h, **measure(c, scene())}
        for k, (c, h) in enumerate(((right, True), (wrong, False)))
    ]
    table = summarise(records, [row], pipe)
    assert (
        table[row.name]["all"] == 0.5
        and table[row.name]["colour"] == 1.0
        and table[row.name]["ms"] == 5.0
    )
    assert table[row.name]["held_out_scenes"] == {"clips": 1, "all": 1.0}
    # beyond what the VAE can draw, sharper is farther
    assert table["true through the VAE"]["spectrum_distance"] == 0.0
    assert table["true renderings"]["spectrum_distance"] > 0.0
    assert table[row.name]["right"] == "10" and table[row.name]["units"] == 7 + 6 * 3


def test_rows_are_tested_in_pairs():
    from scipy.stats import binomtest

    from training.claim import OLD, paired

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (rng.random(40) < p for p in (0.6, 0.8))
        word = lambda hits: "".join("1" if h else "0" for h in hits)
        result = {"rows": {"new": {"right": word(b)}, OLD: {"right": word(a)}}}
        won, lost, p = paired(result, "new")
        assert (won, lost) == (int((b & ~a).sum()), int((a & ~b).sum()))
        assert abs(p - binomtest(won, won + lost).pvalue) < 1e-9


def test_free_wording_keeps_what_an_answer_says():
    from training.evaluate import free_wording

    for seed in range(6):
        text = free_wording(
            "a dotted red circle moves up on a sand background", np.random.default_rng(seed)
        )
        assert set("dotted red circle up sand".split()) <= set(text.split())
        assert text != "a dotted red circle moves up on a sand background"
