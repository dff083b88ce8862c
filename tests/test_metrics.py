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
    records = [{"row": "true renderings", "ms": 0.0, **measure(right, scene())}]
    records += [
        {"row": row.name, "ms": 5.0, "held_out": h, **measure(c, scene())}
        for c, h in ((right, True), (wrong, False))
    ]
    table = summarise(records, [row], pipe)
    assert (
        table[row.name]["all"] == 0.5
        and table[row.name]["colour"] == 1.0
        and table[row.name]["ms"] == 5.0
    )
    assert table[row.name]["held_out_scenes"] == {"clips": 1, "all": 1.0}
    assert (
        table["true renderings"]["spectrum_distance"] == 0.0 < table[row.name]["spectrum_distance"]
    )
