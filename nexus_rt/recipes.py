"""How few-step generators are run: the steps, shift, guidance and solver they were distilled for.

A recipe is named, or read from where a publisher may write one: the string `nexus_rt.recipe` in a
safetensors header (of a generator's single file, or of a LoRA), a JSON object of `Recipe`'s fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from nexus_rt import documents
from nexus_rt.errors import InputError, ModelError, choose
from nexus_rt.loading.experts import GeneratorSource, transformers_of
from nexus_rt.loading.lora import Lora
from nexus_rt.loading.stored import read_metadata
from nexus_rt.solver import SOLVERS, listed_grid

METADATA = "nexus_rt.recipe"


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
            if self.solver is not None:
                choose("solver", self.solver, SOLVERS)
            if self.timesteps is not None:
                listed_grid(self.timesteps, self.shift or 1.0)
                if self.steps not in (None, len(self.timesteps)):
                    raise InputError(f"{self.steps} steps of {len(self.timesteps)} timesteps")
            for name, value, low, high in (
                ("steps", self.steps, 1, 1000),
                ("shift", self.shift, 1e-3, 1000),
                ("guidance_scale", self.guidance_scale, -1000, 1000),
            ):
                if value is not None and not low <= value <= high:
                    raise InputError(f"{name} is {value:g}, expected from {low:g} to {high:g}")
        except InputError as error:
            raise ModelError(f"{where}: its recipe cannot be used: {error}") from error
        return self


RECIPES = {
    # LightX2V's configs/distill: denoising_step_list, sample_shift, no guidance, Euler
    "lightx2v-4step": Recipe(4, (1000, 750, 500, 250), 5.0, 1.0, "euler"),
    # FastVideo's FastWan: dmd_denoising_steps, which are sigmas of 1000, noise drawn anew
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


def with_recipes(defaults: Any, recipes: Mapping[str, Recipe | None]) -> Any:
    """A pair's `Defaults` where its generators "small" and "large" have recipes."""
    values: dict[str, Any] = {}
    for generator in ("small", "large"):
        recipe = recipes.get(generator)
        if recipe is None:
            continue
        values |= {
            f"{generator}_{name}": getattr(recipe, name)
            for name in ("steps", "timesteps", "shift", "solver")
            if getattr(recipe, name) is not None
        }
        if recipe.guidance_scale is not None:
            values["guidance_scale" if generator == "small" else "guidance_scale_2"] = (
                recipe.guidance_scale
            )
        if recipe.plan is not None and generator == "large":
            values["plan"] = recipe.plan
    if "guidance_scale" in values and "guidance_scale_2" not in values:
        # a small generator's recipe is not the large one's
        own = defaults.guidance_scale_2
        values["guidance_scale_2"] = defaults.guidance_scale if own is None else own
    return replace(defaults, **values)


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
                f" {generator}= too."
            )
        if name is not None:
            found[generator] = named_recipe(name)
        elif generator in generators:
            own = [f for f in transformers_of(generators[generator]).values() if f.is_file()]
            merged = [lora.path for lora in loras.get(generator, ())]
            found[generator] = stored_recipe([*own, *merged])
    return found
