"""The reasoning grammar: every phrase means what it says, by its own arithmetic and world
knowledge, and tests are held out."""

import itertools

import numpy as np
import pytest

from nexus_rt.bench.shapes import riddles, world
from nexus_rt.bench.shapes.riddles import make_prompts


def test_sums_add_up():
    rng = np.random.default_rng(0)
    for shape, total in riddles.CORNERS.items():
        seen = set()
        for _ in range(200):
            phrase = riddles.shape_phrase(shape, "sum", rng)
            a, sign, b = phrase.removeprefix("the shape with ").removesuffix(" corners").split()
            a, b = riddles.NUMBERS.index(a), riddles.NUMBERS.index(b)
            assert (a + b if sign == "plus" else a - b) == total and min(a, b) >= 0
            seen.add((a, sign, b))
        assert len(seen) >= 2


def test_negations_and_opposites_name_the_wrong_thing_too():
    rng = np.random.default_rng(1)
    for _ in range(100):
        for shape in world.SHAPES:
            words = riddles.shape_phrase(shape, "negation", rng).split()
            assert shape in words and words[-1] != shape and words[-1] in world.SHAPES
        for colour in world.COLOURS:
            words = [w.strip(",") for w in riddles.colour_phrase(colour, "negation", rng).split()]
            named = [w for w in words if w in world.COLOURS]
            assert colour in named and len(set(named)) == 2
            wrong = next(c for c in named if c != colour)
            assert words[words.index(wrong) - 1] in ("not", "but")
    for motion, other in (("left", "right"), ("right", "left"), ("up", "down"), ("down", "up")):
        assert (
            riddles.motion_phrase(motion, "opposite", rng) == f"moves the opposite way of {other}"
        )
        assert riddles.motion_phrase(motion, "twice", rng).endswith(
            f"opposite of the opposite way of {motion}"
        )


@pytest.mark.parametrize("colour", world.COLOURS)
def test_mixtures_follow_paint_ink_and_light(colour):
    """Light adds the primaries red, green and blue; ink takes away with cyan, magenta and yellow;
    paint as taught."""
    light = {frozenset(("red", "green")): "yellow", frozenset(("green", "blue")): "cyan"}
    ink = {
        frozenset(("magenta", "yellow")): "red",
        frozenset(("cyan", "yellow")): "green",
        frozenset(("cyan", "magenta")): "blue",
    }
    paint = {frozenset(("blue", "yellow")): "green", frozenset(("red", "blue")): "purple"}
    for a, b, medium in riddles.COLOUR_MIXTURES[colour]:
        assert {"light": light, "ink": ink, "paint": paint}[medium][frozenset((a, b))] == colour


def test_no_riddle_says_its_answer_outright():
    """Outside negation, double opposites and `still`'s own words, the answer's word is not in the
    phrase."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene = world.sample_scene(rng, training=False)
        for kind in ("definition", "likeness", "sum"):
            assert scene.shape not in riddles.shape_phrase(scene.shape, kind, rng).split()
        for kind in ("likeness", "mixture"):
            assert scene.colour not in riddles.colour_phrase(scene.colour, kind, rng).split()
        for kind in ("opposite", "physics", "compass"):
            assert scene.motion not in riddles.motion_phrase(scene.motion, kind, rng).split()


def test_held_out_triples_are_balanced_and_never_trained_on():
    triples = list(itertools.product(*riddles.KINDS.values()))
    held = [t for t in triples if riddles.held_out(t)]
    assert len(triples) == 60 and len(held) == 12
    for i in range(3):  # every kind is met in training and in testing
        assert (
            {t[i] for t in held}
            == {t[i] for t in triples}
            == {t[i] for t in triples if t not in held}
        )
    rng = np.random.default_rng(3)
    assert not any(riddles.held_out(riddles.sample_kinds(rng)) for _ in range(500))
    assert all(riddles.held_out(riddles.sample_kinds(rng, training=False)) for _ in range(200))
    assert all(riddles.held_out(p.kinds) for p in make_prompts("riddles", 11, 60))


def test_prompts_of_a_seed_are_always_the_same():
    assert (
        make_prompts("riddles", 11, 5)
        == make_prompts("riddles", 11, 9)[:5]
        != make_prompts("riddles", 12, 5)
    )


def test_the_grammars_words_are_all_known():
    rng, known = np.random.default_rng(4), {*riddles.words(), *world.BACKGROUNDS}
    for _ in range(500):
        text = riddles.riddle(world.sample_scene(rng), riddles.sample_kinds(rng), rng).text
        assert set(text.replace(",", " ,").replace(".", " .").split()) <= known


def test_loose_captions_say_what_they_claim_to():
    rng = np.random.default_rng(5)
    counts = np.zeros(5)
    for _ in range(300):
        scene = world.sample_scene(rng)
        text, said = world.loose_caption(scene, rng, ("sky", "map"))
        words = text.replace(",", " ").split()
        counts += said
        assert (scene.shape in words) == said[0] and (scene.colour in words) == said[1]
        assert (scene.background in words) == said[4]
        if scene.texture != "plain":
            assert (scene.texture in words) == said[2]
        assert (scene.motion in words) == said[3]
    assert (counts > 220).all() and (counts < 290).all()
