"""How few-step generators are run: the steps, shift, guidance and solver they were distilled for.

A recipe is named, or read from where a publisher may write one: the string `nexus_rt.recipe` in a
safetensors header (of a generator's single file, or of a LoRA), a JSON object of `Recipe`'s fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from nexus_rt.core import documents
from nexus_rt.core.checks import number, whole
from nexus_rt.core.errors import InputError, ModelError, choose, shown
from nexus_rt.core.limits import MAX_GUIDANCE, MAX_SHIFT, MIN_SHIFT, SOLVERS
from nexus_rt.loading.experts import GeneratorSource, transformers_of
from nexus_rt.loading.formats.safetensors import read_metadata
from nexus_rt.loading.lora import Lora
from nexus_rt.method.plan_text import check_plan
from nexus_rt.method.time_grid import listed_grid
from nexus_rt.pipeline.settings import GUIDANCE_SETTINGS, Defaults

METADATA = "nexus_rt.recipe"
MAX_STEPS = 1000  # that a generator was distilled for


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a generator was distilled for; None where it does not matter.

    steps: of its whole schedule. timesteps: the list it was trained at, before the shift; as many
    as `steps`. plan: of a pair that it is the large generator of.
    """

    steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    plan: str | None = None

    def checked(self, where: str) -> Recipe:
        """The same, its values possible.

        Raises:
            ModelError: one is not; names it.
        """
        try:
            if self.steps is not None:
                whole("steps", self.steps, 1, MAX_STEPS)
            if self.shift is not None:
                number("shift", self.shift, MIN_SHIFT, MAX_SHIFT)
            if self.guidance_scale is not None:
                number("guidance_scale", self.guidance_scale, -MAX_GUIDANCE, MAX_GUIDANCE)
            if self.solver is not None:
                choose("solver", self.solver, SOLVERS)
            if self.plan is not None:
                check_plan(self.plan)
            if self.timesteps is not None:
                self._check_timesteps()
        except InputError as error:
            raise ModelError(
                f"{where}: its recipe cannot be used: {error}", code=error.code, param=error.param
            ) from error
        return self

    def _check_timesteps(self) -> None:
        if not isinstance(self.timesteps, (tuple, list)) or len(self.timesteps) > MAX_STEPS:
            raise InputError(
                f"timesteps are {shown(self.timesteps)}; expected a list of at most {MAX_STEPS}.",
                code="too_large" if isinstance(self.timesteps, (tuple, list)) else "invalid_type",
                param="timesteps",
            )
        for value in self.timesteps:
            number("a timestep", value, 0.0, 1000.0)
        listed_grid(self.timesteps, 1.0 if self.shift is None else self.shift)
        if self.steps not in (None, len(self.timesteps)):
            raise InputError(
                f"steps is {self.steps}, and there are {len(self.timesteps)} timesteps; expected"
                " as many.",
                code="mismatch",
                param="steps",
            )


RECIPES = {
    # LightX2V's configs/distill: denoising_step_list, sample_shift, no guidance, Euler
    "lightx2v-4step": Recipe(4, (1000, 750, 500, 250), 5.0, 1.0, "euler"),
    # FastVideo's FastWan: dmd_denoising_steps, which are sigmas of 1000, noise drawn anew. Of LoRAs
    # and of checkpoints without the gates of its sparse attention, which are refused.
    "fastwan-3step": Recipe(3, (1000, 757, 522), 1.0, 1.0, "lcm"),
}


def named_recipe(name: str) -> Recipe:
    """A recipe of `RECIPES`.

    Raises:
        InputError: there is none of that name.
    """
    return RECIPES[choose("recipe", name, RECIPES)]


def stored_recipe(files: Sequence[Path]) -> Recipe | None:
    """The recipe in the header of the last of some files that has one; None where none has."""
    for file in reversed(files):
        if file.suffix != ".safetensors" or (text := read_metadata(file).get(METADATA)) is None:
            continue
        where = f"{file}: {METADATA}"
        value = documents.parse(text, where)
        recipe: Recipe = documents.check(value, Recipe, where)
        return recipe.checked(str(file))
    return None


def with_recipes(defaults: Defaults, recipes: Mapping[str, Recipe | None]) -> Defaults:
    """A pair's `Defaults` where its generators "small" and "large" have recipes."""
    values: dict[str, Any] = {}
    for generator in ("small", "large"):
        recipe = recipes.get(generator)
        if recipe is None:
            continue
        if recipe.steps is None and recipe.timesteps is not None:
            recipe = msgspec.structs.replace(recipe, steps=len(recipe.timesteps))
        values |= {
            f"{generator}_{name}": getattr(recipe, name)
            for name in ("steps", "timesteps", "shift", "solver")
            if getattr(recipe, name) is not None
        }
        if recipe.guidance_scale is not None:
            values[GUIDANCE_SETTINGS[generator]] = recipe.guidance_scale
        if recipe.plan is not None and generator == "large":
            values["plan"] = recipe.plan
    small, large = GUIDANCE_SETTINGS.values()
    if small in values and large not in values:  # a small generator's recipe is not the large one's
        own = getattr(defaults, large)
        values[large] = getattr(defaults, small) if own is None else own
    return defaults.replace(**values)


def find_recipes(
    generators: Mapping[str, GeneratorSource],
    loras: Mapping[str, Sequence[Lora]],
    names: Mapping[str, str | None],
) -> dict[str, Recipe | None]:
    """The recipe of each generator: the named one, else that of its last LoRA or its own file that
    has one.

    Raises:
        InputError: a name for a generator that is not loaded, or that no recipe has.
    """
    found: dict[str, Recipe | None] = {}
    for generator, name in names.items():
        if name is not None and generator not in generators:
            raise InputError(
                f"{generator}_recipe is {name!r}, and no {generator} generator is loaded; pass"
                f" {generator}= too.",
                code="missing",
                param=generator,
            )
        if name is not None:
            found[generator] = named_recipe(name)
        elif generator in generators:
            own = [f for f in transformers_of(generators[generator]).values() if f.is_file()]
            merged = [lora.path for lora in loras.get(generator, ())]
            found[generator] = stored_recipe([*own, *merged])
    return found
