"""The world and its checker: the checker must be right on true pictures and fail on wrong ones."""

import numpy as np
import pytest
from scipy import ndimage

from nexus_rt.bench.shapes import checker, world


def clip(scene, seed=0, **kwargs):
    return (
        world.render(scene, np.random.default_rng(seed), **kwargs).transpose(0, 2, 3, 1) + 1
    ) / 2


def some_scenes(count, seed=5):
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, training=False) for _ in range(count)]


def test_every_word_of_a_caption_is_a_field():
    for scene in world.all_scenes()[::7]:
        for form in range(3):
            text = world.caption(
                scene, type("Fixed", (), {"integers": lambda self, n, k=form: k})()
            )
            for word in (scene.shape, scene.colour, scene.background, scene.motion):
                assert word in text
            assert (scene.texture in text) == (scene.texture != "plain")


def test_held_out_scenes_are_never_trained_on():
    rng = np.random.default_rng(0)
    assert not any(world.held_out(world.sample_scene(rng)) for _ in range(500))
    share = np.mean([world.held_out(s) for s in world.all_scenes()])
    assert 0.05 <= share <= 0.15


@pytest.mark.parametrize("blur, noise", [(0.0, 0.0), (1.2, 0.03)])
def test_the_checker_reads_true_renderings(blur, noise):
    rng = np.random.default_rng(1)
    for scene in some_scenes(40):
        frames = ndimage.gaussian_filter(clip(scene, 2), (0, blur, blur, 0)) + noise * rng.normal(
            size=(17, 64, 64, 3)
        )
        assert all(checker.look(np.clip(frames, 0, 1)).matches(scene)), scene


def test_the_checker_tells_wrong_from_right():
    scene = world.Scene("circle", "red", "plain", "left", "grey")
    assert checker.look(clip(scene)[::-1]).motion == "right"
    assert checker.look(clip(scene)[..., ::-1]).colour == "blue"
    assert checker.look(np.repeat(clip(scene)[:1], 17, 0)).motion == "still"
    assert checker.look(clip(scene).transpose(0, 2, 1, 3)).motion == "up"


def test_nothing_is_seen_in_nothing():
    for frames in (np.full((17, 64, 64, 3), 0.5), np.random.default_rng(0).random((17, 64, 64, 3))):
        seen = checker.look(frames)
        assert not all(seen.matches(world.Scene("circle", "red", "plain", "left", "grey")))
    assert checker.look(np.full((17, 64, 64, 3), 0.5)) == checker.Seen(None, None, None)


def test_signed_distance_is_a_distance():
    """The distance to a polygon grows by at most the step, and changes sign at the outline."""
    axis = np.linspace(-20, 20, 81, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    for shape in world.SHAPES:
        d = world.signed_distance(shape, x, y, 10.0)
        assert d[40, 40] < 0 < d[0, 0]
        assert (
            np.abs(np.diff(d, axis=0)).max() <= 0.5 + 1e-4
            and np.abs(np.diff(d, axis=1)).max() <= 0.5 + 1e-4
        )


def test_objects_stay_inside_the_frame():
    for scene in some_scenes(30):
        frames = clip(scene, 3)
        for row in (frames[:, 0], frames[:, -1]):  # background only, which is constant along a row
            assert np.abs(row - row[:, :1]).max() <= 1e-6
