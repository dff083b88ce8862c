"""The procedural world: a caption grammar and the renderer that draws what a caption says.

A scene is one textured shape that moves over a plain background. Every word of a caption is decided
by one field of `Scene`; what no word decides (radius, start, how far it travels, texture phase) is
drawn from `numpy.random.Generator`. Frames are float32 RGB in [-1, 1], shape [T, 3, H, W],
anti-aliased from signed distances, so that edges and textures carry the high frequencies a large
generator is there to draw.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (0.90, 0.13, 0.13),
    "green": (0.13, 0.75, 0.20),
    "blue": (0.16, 0.32, 0.95),
    "yellow": (0.96, 0.86, 0.10),
    "purple": (0.70, 0.18, 0.85),
    "cyan": (0.12, 0.82, 0.88),
}
TEXTURES = ("plain", "striped", "dotted")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
BACKGROUNDS = {
    "black": (0.04, 0.04, 0.06),
    "white": (0.94, 0.94, 0.92),
    "grey": (0.52, 0.52, 0.54),
    "sand": (0.80, 0.70, 0.50),
}
FRAMES, SIZE = 17, 64
TEXTURE_PERIOD = 7.0  # pixels of a 64-pixel frame
DARK = 0.45  # the second tone of a texture, as a share of the first
RADIUS = (13.0, 16.0)  # pixels of a 64-pixel frame
ROUGH_EDGE = 3.0  # width in pixels of a rough picture's edges; a fine one's are one pixel wide


@dataclass(frozen=True)
class Scene:
    """What a caption decides."""

    shape: str
    colour: str
    texture: str
    motion: str
    background: str


def all_scenes() -> list[Scene]:
    """Every scene of the grammar, in a fixed order."""
    return [Scene(*c) for c in itertools.product(SHAPES, COLOURS, TEXTURES, MOTIONS, BACKGROUNDS)]


def held_out(scene: Scene) -> bool:
    """True for about a tenth of the (shape, colour, motion) triples: never trained on, always
    tested on."""
    key = f"{scene.shape}/{scene.colour}/{scene.motion}".encode()
    return hashlib.sha256(key).digest()[0] < 26


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The caption of a scene; with `rng`, one of its paraphrases."""
    look = scene.colour if scene.texture == "plain" else f"{scene.texture} {scene.colour}"
    still = scene.motion == "still"
    forms = (
        (
            f"a {look} {scene.shape} {'stays still' if still else 'moves ' + scene.motion} on a"
            f" {scene.background} background"
        ),
        (
            f"a {look} {scene.shape} {'staying still' if still else 'moving ' + scene.motion},"
            f" {scene.background} background"
        ),
        (
            f"on a {scene.background} background, a {look} {scene.shape}"
            f" {'stays still' if still else 'moves ' + scene.motion}"
        ),
    )
    return forms[0] if rng is None else forms[int(rng.integers(len(forms)))]


def loose_caption(
    scene: Scene, rng: np.random.Generator, fillers: tuple[str, ...] = ()
) -> tuple[str, tuple[bool, ...]]:
    """A caption as people write them: some leave a field out, some carry words that say nothing.

    Returns the text and which fields (in `Scene`'s order) it says.
    """
    shape, colour, texture, motion, background = mentioned = tuple(rng.random(5) > 0.15)
    look = f"{scene.texture} " if texture and scene.texture != "plain" else ""
    parts = ["a", look + (scene.colour if colour else ""), scene.shape if shape else "shape"]
    if motion:
        parts.append("stays still" if scene.motion == "still" else f"moves {scene.motion}")
    ground = f"on a {scene.background} background" if background else ""
    parts = [ground, ",", *parts] if ground and rng.random() < 0.3 else [*parts, ground]
    text = " ".join(" ".join(parts).split()).replace(" ,", ",")
    if fillers and rng.random() < 0.5:
        words = text.split()
        for _ in range(int(rng.integers(1, 7))):
            words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(fillers)))
        text = " ".join(words)
    return text, mentioned


def sample_scene(rng: np.random.Generator, training: bool = True) -> Scene:
    """A random scene; in training never a held-out one."""
    while True:
        scene = Scene(
            *(str(rng.choice(list(v))) for v in (SHAPES, COLOURS, TEXTURES, MOTIONS, BACKGROUNDS))
        )
        if not (training and held_out(scene)):
            return scene


def _polygon(shape: str) -> np.ndarray:
    """Vertices [K, 2] of a shape of radius 1, y down."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86
    if shape == "triangle":
        angle = np.deg2rad(np.array([-90, 30, 150]))
        return np.stack([np.cos(angle), np.sin(angle)], 1) * 1.18 + np.array([0, 0.18])
    if shape == "star":
        angle = np.deg2rad(-90 + 36 * np.arange(10))
        radius = np.where(np.arange(10) % 2 == 0, 1.22, 0.50)
        return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]
    if shape == "cross":
        a, b = 1.08, 0.36
        return np.array(
            [
                (-b, -a),
                (b, -a),
                (b, -b),
                (a, -b),
                (a, b),
                (b, b),
                (b, a),
                (-b, a),
                (-b, b),
                (-a, b),
                (-a, -b),
                (-b, -b),
            ]
        )
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels (negative inside) of points (x, y) to a shape of `radius` pixels
    around the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    v = _polygon(shape).astype(np.float32) * radius
    d2 = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(v, np.roll(v, -1, 0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        d2 = np.minimum(d2, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -1.0, 1.0).astype(np.float32) * np.sqrt(d2)


def _path(
    motion: str, radius: float, frames: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Centres [T, 2] of the shape, inside the frame from first to last."""
    margin = 1.22 * radius + 1
    free = size - 2 * margin
    travel = min(rng.uniform(0.30, 0.40) * size, free) if frames > 1 else 0.0
    direction = np.array(MOTIONS[motion], np.float32)
    middle = size / 2 + (rng.uniform(-0.5, 0.5, 2) * (free - travel * np.abs(direction)))
    along = np.linspace(-0.5, 0.5, frames) if frames > 1 else np.zeros(1)
    return (middle[None] + along[:, None] * travel * direction[None]).astype(np.float32)


def render(
    scene: Scene,
    rng: np.random.Generator,
    frames: int = FRAMES,
    size: int = SIZE,
    rough: bool = False,
) -> np.ndarray:
    """Draw a scene: float32 [T, 3, H, W] in [-1, 1].

    `rough` draws what a sketch would: soft edges, and a texture's mean tone in its place. The same
    draws of `rng` give the same scene, rough or fine.
    """
    unit = size / 64
    radius = rng.uniform(*RADIUS) * unit
    centres = _path(scene.motion, radius, frames, size, rng)
    phase = rng.uniform(0, TEXTURE_PERIOD * unit, 2)
    grid = np.arange(size, dtype=np.float32) + 0.5
    x = grid[None, None, :] - centres[:, 0, None, None]  # [T, 1, W]
    y = grid[None, :, None] - centres[:, 1, None, None]  # [T, H, 1]
    x, y = np.broadcast_arrays(x, y)
    cover = np.clip(
        0.5 - signed_distance(scene.shape, x, y, radius) / (ROUGH_EDGE * unit if rough else 1.0),
        0,
        1,
    )

    period = TEXTURE_PERIOD * unit
    if scene.texture == "striped":
        wave = np.abs(((x + y) / np.sqrt(2) + phase[0]) % period - period / 2) - period / 4
        tone = np.full_like(x, 0.5) if rough else np.clip(0.5 - wave, 0, 1)
    elif scene.texture == "dotted":
        u, v = ((x + phase[0]) % period) - period / 2, ((y + phase[1]) % period) - period / 2
        tone = (
            np.full_like(x, np.pi * 0.29**2)
            if rough
            else np.clip(0.5 - (np.hypot(u, v) - period * 0.29), 0, 1)
        )
    else:
        tone = np.zeros_like(x)
    light = 1.0 - 0.14 * np.clip(y / radius, -1, 1)
    shade = light * (1 - (1 - DARK) * tone)  # [T, H, W]

    ramp = (1.04 - 0.10 * grid / size)[None, :, None]
    colour = np.asarray(COLOURS[scene.colour], np.float32)[None, :, None, None]
    ground = np.asarray(BACKGROUNDS[scene.background], np.float32)[None, :, None, None]
    image = ground * ramp[:, None] * (1 - cover[:, None]) + colour * shade[:, None] * cover[:, None]
    return (np.clip(image, 0, 1) * 2 - 1).astype(np.float32)
