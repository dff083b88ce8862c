"""The reasoning grammar: prompts that never say outright what to show.

A riddle says a scene's shape, colour and motion each in a way that must be worked out; texture and
background are said plainly. `KINDS` are the ways. Literal words that are wrong abound ("the
opposite way of right", "of a star and a cross , the one that is not a star"), so that a model that
reads words without their sense is led astray.

Every phrase is drawn from `numpy.random.Generator`. A fifth of the triples of kinds (shape's,
colour's, motion's) is held out: no model is ever trained on them, and the claim is tested on them
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from nexus_rt.bench.shapes.world import COLOURS, MOTIONS, SHAPES, Scene, caption, sample_scene

T = TypeVar("T")
NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
CORNERS = {"circle": 0, "triangle": 3, "square": 4, "star": 10, "cross": 12}
SHAPE_DEFINITIONS = {
    "circle": ("the shape without any corners", "the shape that is round all over"),
    "triangle": ("the shape with three sides", "the shape with half the corners of a hexagon"),
    "square": ("the shape with four equal sides", "the shape with one more side than a triangle"),
    "star": ("the shape with five points", "the shape with as many points as a hand has fingers"),
    "cross": ("the shape made of two bars", "the shape where two roads meet"),
}
SHAPE_LIKENESS = {
    "circle": ("the shape that rolls", "the shape of a wheel", "the shape of a coin"),
    "triangle": ("the shape of a slice of pizza", "the shape of a pyramid", "the shape of a tent"),
    "square": ("the shape of a chess board", "the shape of a tile", "the face of a dice"),
    "star": (
        "the shape that sheriffs wear",
        "the shape that shines at night",
        "the shape atop a christmas tree",
    ),
    "cross": (
        "the sign of a pharmacy",
        "the sign of first aid",
        "the sign between numbers in a sum",
    ),
}
COLOUR_LIKENESS = {
    "red": ("the colour of blood", "the colour of a tomato", "the colour that says stop"),
    "green": ("the colour of grass", "the colour of a frog", "the colour that says go"),
    "blue": ("the colour of the sky", "the colour of the sea"),
    "yellow": ("the colour of a banana", "the colour of the sun", "the colour of a lemon"),
    "purple": ("the colour of grapes", "the colour of a plum", "the colour of lavender"),
    "cyan": ("the colour of a lagoon", "the colour of a swimming pool"),
}
COLOUR_MIXTURES = {
    "red": (("magenta", "yellow", "ink"),),
    "green": (("blue", "yellow", "paint"), ("cyan", "yellow", "ink")),
    "blue": (("cyan", "magenta", "ink"),),
    "yellow": (("red", "green", "light"),),
    "purple": (("red", "blue", "paint"),),
    "cyan": (("green", "blue", "light"),),
}
PHYSICS = {
    "down": ("as a dropped ball does", "as rain does", "as a stone does in water"),
    "up": ("as a loose balloon does", "as smoke does", "as a bubble does in water"),
    "left": ("as the sun does on a map at noon", "as the words of an arabic line do"),
    "right": ("as the words of an english line do", "as a bar does that shows progress"),
    "still": ("as a mountain does", "as a parked car does", "as a painting on a wall does"),
}
COMPASS = {"left": "west", "right": "east", "up": "north", "down": "south"}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

KINDS = {
    "shape": ("definition", "likeness", "sum", "negation"),
    "colour": ("likeness", "mixture", "negation"),
    "motion": ("opposite", "physics", "compass", "twice", "negation"),
}


@dataclass(frozen=True)
class Riddle:
    """A prompt, what it means, and how it says so."""

    text: str
    scene: Scene
    kinds: tuple[str, str, str]  # of shape, colour, motion; "plain" where it is said outright


def held_out(kinds: tuple[str, str, str]) -> bool:
    """True for twelve of the sixty triples of kinds, each pair of kinds in at most one: never
    trained on, always tested on."""
    if "plain" in kinds:
        return False
    shape, colour, motion = (
        KINDS[field].index(kind) for field, kind in zip(KINDS, kinds, strict=True)
    )
    return (shape + 2 * colour + motion) % 5 == 0


def _sum(total: int, rng: np.random.Generator) -> str:
    """`total` corners as a sum or a difference of small numbers."""
    ways = [(a, "plus", total - a) for a in range(1, total) if total - a >= 1]
    ways += [(b + total, "minus", b) for b in range(1, len(NUMBERS) - total)]
    a, sign, b = ways[int(rng.integers(len(ways)))]
    return f"{NUMBERS[a]} {sign} {NUMBERS[b]}"


def _other(names: Iterable[str], own: str, rng: np.random.Generator) -> str:
    return str(rng.choice([n for n in names if n != own]))


def _one(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _negation(names: Iterable[str], own: str, rng: np.random.Generator) -> str:
    other = _other(names, own, rng)
    return _one(
        (
            f"not {other} but {own}",
            f"{own} and not {other}",
            f"anything but {other} , namely {own}",
        ),
        rng,
    )


def shape_phrase(shape: str, kind: str, rng: np.random.Generator) -> str:
    if kind == "plain":
        return f"a {shape}"
    if kind == "definition":
        return _one(SHAPE_DEFINITIONS[shape], rng)
    if kind == "likeness":
        return _one(SHAPE_LIKENESS[shape], rng)
    if kind == "sum":
        return f"the shape with {_sum(CORNERS[shape], rng)} corners"
    other = _other(SHAPES, shape, rng)
    first, last = (shape, other) if rng.random() < 0.5 else (other, shape)
    return f"of a {first} and a {last} , the one that is not a {other}"


def colour_phrase(colour: str, kind: str, rng: np.random.Generator) -> str:
    if kind == "plain":
        return colour
    if kind == "likeness":
        return _one(COLOUR_LIKENESS[colour], rng)
    if kind == "mixture":
        a, b, medium = _one(COLOUR_MIXTURES[colour], rng)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return f"what {a} and {b} {medium} make together"
    return _negation(COLOURS, colour, rng)


def motion_phrase(motion: str, kind: str, rng: np.random.Generator) -> str:
    """Where it goes; `still` has ways of its own in the kinds that speak of directions."""
    if kind == "plain":
        return "stays still" if motion == "still" else f"moves {motion}"
    if kind == "physics":
        return "moves " + _one(PHYSICS[motion], rng)
    if motion == "still":
        return {
            "opposite": "does the opposite of moving",
            "compass": "moves to where it already is on a map",
            "twice": "moves not at all , twice",
            "negation": f"does not move {_other(MOTIONS, 'still', rng)} nor any other way",
        }[kind]
    if kind == "opposite":
        return f"moves the opposite way of {OPPOSITE[motion]}"
    if kind == "compass":
        return f"moves to the {COMPASS[motion]} on a map"
    if kind == "twice":
        return f"moves the opposite of the opposite way of {motion}"
    return f"moves not {_other(OPPOSITE, motion, rng)} but {motion}"


def riddle(scene: Scene, kinds: tuple[str, str, str], rng: np.random.Generator) -> Riddle:
    """Say a scene by the given kinds."""
    shape = shape_phrase(scene.shape, kinds[0], rng)
    colour = colour_phrase(scene.colour, kinds[1], rng)
    motion = motion_phrase(scene.motion, kinds[2], rng)
    texture = "" if scene.texture == "plain" else f" , {scene.texture}"
    ground = f"on a {scene.background} background"
    forms = (
        f"{shape} , in {colour}{texture} , {motion} {ground}",
        f"{ground} , {shape} , in {colour}{texture} , {motion}",
        f"{shape}{texture} , {motion} . it is in {colour} and {ground}",
    )
    return Riddle(
        " ".join(_one(forms, rng).replace(" ,", ",").replace(" .", ".").split()), scene, kinds
    )


def sample_kinds(
    rng: np.random.Generator, training: bool = True, plain: float = 0.15
) -> tuple[str, str, str]:
    """Kinds for the three fields: in training each plain with a probability, and never a held-out
    triple; in testing always a held-out one."""
    while True:
        shape, colour, motion = (
            "plain" if training and rng.random() < plain else str(rng.choice(k))
            for k in KINDS.values()
        )
        kinds = shape, colour, motion
        if held_out(kinds) != training:
            return kinds


def words() -> list[str]:
    """Every word of the grammar."""
    rng, words = np.random.default_rng(0), dict[str, None]()
    for k in range(6000):
        text = riddle(
            Scene(
                SHAPES[k % 5],
                list(COLOURS)[k % 6],
                "striped" if k % 2 else "dotted",
                list(MOTIONS)[(k // 7) % 5],
                "black",
            ),
            sample_kinds(rng),
            rng,
        ).text
        words |= dict.fromkeys(text.replace(",", " ,").replace(".", " .").split())
    return [*words, *(n for n in NUMBERS if n not in words)]


def make_prompts(kind: str, seed: int, count: int) -> list[Riddle]:
    """Test prompts: "riddles" of held-out triples of kinds, or plain "captions"; the same for a
    seed, always."""
    rng = np.random.default_rng([seed, 7])
    prompts = []
    for _ in range(count):
        scene = sample_scene(rng, training=False)
        if kind == "captions":
            prompts.append(Riddle(caption(scene), scene, ("plain",) * 3))
        else:
            prompts.append(riddle(scene, sample_kinds(rng, training=False), rng))
    return prompts
