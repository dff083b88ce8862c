"""Fuzzing of plans' texts, recipes and fronts: what is read is exact, finite and within bounds."""

import contextlib
import json
import re

import numpy as np

from nexus_rt.core.errors import NexusError
from nexus_rt.method.plan_text import check_plan, parse_plan
from nexus_rt.method.solver import make_solver
from nexus_rt.method.time_grid import time_grid
from nexus_rt.pipeline.front import from_front
from nexus_rt.pipeline.recipes import METADATA, Recipe, stored_recipe, with_recipes
from nexus_rt.pipeline.request import make_plan
from nexus_rt.pipeline.settings import CallSettings, Defaults
from tests import published

GRID = time_grid(20, 3.0)
TEXTS = [
    "reference gamma-w=0.5 energy=none",
    "handoff=sigma:0.9,bridge=2",
    "handoff=0.3",
    "auto=0.02 large-solver=euler",
    "small:30% bridge:2 large:*@1",
    "small:8@3[0:40%]/guidance-every=2 large:12@2/every=2/solver=euler",
    "small:4/10 bridge:2/8 large:4/adaptive=0.05/shift=3 shift=5",
    "small:10 renoise=0.75 large:4@2[1:3] energy=none solver=lcm",
    "large steps=20 shift=3 large-boundary=0.9",
    "large sigmas=0.9,0.5,0.1,0 timesteps=900,500,100",
]
PIECES = [
    *"0123456789:/@[]%=,.*- \n\x00",
    "9" * 400,
    "9" * 5000,
    "1e400",
    "1e-400",
    "1e-40",
    "1e30",
    "-1",
    "nan",
    "inf",
    "0x10",
    "1_0",
    "\u0663",
    "\u2028",
    "\ud800",
    "\udce9",
    "@",
    "[0:100%]",
    "/every=2",
    "/shift=1e-40",
    "renoise=0.5 ",
    " steps=4",
    " shift=2",
    " solver=lcm",
    " energy=none",
    " sigmas=0.9,0",
    "large:4/4 " * 400,
    "bridge:1 ",
]


def mutated_text(text, rng):
    """A plan's text with one to four pieces put in, taken out, doubled or joined to another's."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0:  # another number
            numbers = list(re.finditer(r"[0-9.]+", text))
            number = rng.choice(numbers) if numbers else None
            value = rng.choice((*PIECES, "1", "2.5", "0.1", "40", "7", "1e-5", "0.50"))
            text = text[: number.start()] + value + text[number.end() :] if number else value
        elif kind == 1 and rng.random() < 0.5:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif kind == 1:
            text = text[:at] + text[min(end, at + 6) :]
        elif kind == 2:
            text = text[:at] + rng.choice(PIECES) + text[at + 1 :]
        elif kind == 3:
            text = text[:end] + text[at:]
        else:
            text = text[:at] + rng.choice(TEXTS)[at:]
    return text


def check(plan):
    """A plan that was read: its text is the plan, its numbers can be computed with."""
    assert parse_plan(plan.text, time_grid(3)) == plan, plan.text
    levels = np.array(plan.grid.sigmas, np.float32)
    assert np.isfinite(levels).all() and 1 <= len(plan) <= 100_000
    if len(plan) <= 2000:
        table = make_solver("euler", plan.grid).table
        assert np.isfinite([x for s in table for x in s.predictor]).all()
    for step in plan.steps[:: max(1, len(plan) // 100)]:
        scales = [step.scale(g, 1.0) for g in ("small", "large")]
        assert np.isfinite([step.w, step.sigma, step.timestep, *scales]).all()
        assert max(map(abs, scales)) <= 1000


def make_targets(work, kind):
    """Targets "plan texts", "recipes" and "fronts". kind: `tests.fuzz.Target`."""

    class Texts(kind):
        def mutant(self, rng):
            text = mutated_text(rng.choice(TEXTS), rng)
            return text.encode("utf-8", "surrogatepass")

    text_file = work / "plan.txt"
    text_file.write_text(TEXTS[0])

    def read_text():
        text = text_file.read_bytes().decode("utf-8", "surrogatepass")
        check_plan(text)
        check(parse_plan(text, GRID))
        with contextlib.suppress(NexusError):  # of another number of steps
            check(make_plan(CallSettings(plan=text), Defaults()))

    recipe = {
        "steps": 4,
        "timesteps": [1000, 750, 500, 250],
        "shift": 5.0,
        "guidance_scale": 1.0,
        "solver": "euler",
        "plan": "small:4/10 large:3@1/solver=euler",
    }
    recipe_file = work / "recipe.json"
    recipe_file.write_text(json.dumps(recipe))

    def read_recipe():
        text = recipe_file.read_bytes().decode("utf-8", "replace")
        lora = published.save({}, work / "lora.safetensors", {METADATA: text})
        made = stored_recipe([lora])
        assert isinstance(made, Recipe)
        for generator in ("small", "large"):
            pair = with_recipes(Defaults(), {generator: made})
            for plan in (None, generator, "small:40%@3[0:50%] large:*/guidance-every=2"):
                check(make_plan(CallSettings(plan=plan), pair))

    row = {"plan": "small:4/10 large:4", "ms": 900, "score": 0.5, "low": 0.4, "high": 0.6}
    front = {
        "front": [row, {**row, "plan": "large", "ms": 4000.5, "count": 6, "wall_ms": 1.0}],
        "tried": 3,
        "judge": "pixels",
        "budget_ms": 5000.0,
        "default": {**row, "rewrite": "auto", "search_score": 0.25},
        "costs": {"small": 1.0, "large_guided": 2.0},
        "settings": {"rungs": [6, 18]},
    }
    front_file = work / "front.json"
    front_file.write_text(json.dumps(front))

    def read_front():
        for budget in ("1000", "1e9" if front_file.stat().st_size % 7 == 0 else "1000000000ms"):
            chosen = from_front(f"@{front_file}:{budget}")
            assert 0 <= chosen.ms <= 1e9 and np.isfinite([chosen.score, chosen.ms]).all()
            check_plan(chosen.plan)

    return [
        Texts("plan texts", text_file, read_text, text=False),
        kind("recipes", recipe_file, read_recipe),
        kind("fronts", front_file, read_front),
    ]
