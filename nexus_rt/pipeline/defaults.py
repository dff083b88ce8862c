"""A pair's defaults: what its `model_index.json` sets, over the shift and the solver of its
schedulers, over Wan's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nexus_rt.core.errors import InputError, ModelError, choose, shown
from nexus_rt.core.fields import fields_of
from nexus_rt.core.log import chose
from nexus_rt.core.size import ClipSize
from nexus_rt.loading.pair_folder import PairFolders, StatedDefaults, read_stated
from nexus_rt.loading.scheduler import Scheduler
from nexus_rt.method.latents import LatentGrid
from nexus_rt.pipeline.request import make_request
from nexus_rt.pipeline.settings import CallSettings, Defaults


def pair_defaults(stated: StatedDefaults) -> Defaults:
    """The settings that a pair uses where a call says nothing.

    Raises:
        ModelError: a default that is unknown, or that no call can use.
    """
    defaults = _scheduled(stated.scheduler)
    if stated.index is None:
        return defaults
    defaults = defaults.replace(**_checked(stated))
    try:
        make_request(CallSettings(), defaults)
        choose("rewrite", defaults.rewrite or "off", ("auto", "off"))
        LatentGrid(1, 1, (1, 1, 1)).check(ClipSize.of_defaults(defaults))
    except InputError as error:
        raise ModelError(f"{stated.index} sets a default that no call can use: {error}") from error
    return defaults


def _checked(stated: StatedDefaults) -> dict[str, Any]:
    """The values of a `model_index.json` as `Defaults` keeps them."""
    values, where = stated.values, stated.index
    if unknown := values.keys() - set(Defaults.names()):
        raise ModelError(
            f"{where} sets an unknown default {shown(sorted(unknown)[0])}; expected some of"
            f" {', '.join(Defaults.names())}.",
            code="unknown_name",
        )
    for name, field in fields_of(Defaults).items():
        if name in values and values[name] is None and field.default is not None:
            raise ModelError(
                f"{where} sets {name} to null; expected a value, or leave it out.",
                code="invalid_type",
                param=name,
            )
    try:
        made = Defaults(**values)
    except InputError as error:
        raise ModelError(
            f"{where} sets a default that no call can use: {error}", code=error.code
        ) from error
    return {name: getattr(made, name) for name in values}


def _scheduled(scheduler: Scheduler | None) -> Defaults:
    """Wan's defaults with the shift and the solver of a folder's scheduler."""
    if scheduler is None:
        return Defaults()
    chose("shift", f"{scheduler.shift:.6g}", str(scheduler.where), once=True)
    chose("solver", scheduler.solver, str(scheduler.where), once=True)
    return Defaults.of({"shift": scheduler.shift, "solver": scheduler.solver})


def pair_index(root: Path | None, defaults: Defaults) -> Path | dict[str, Any] | None:
    """What the `model_index.json` beside exported engines says: the pair's own file where that sets
    these defaults, else them; None where they are Wan's."""
    own = None if root is None else root / "model_index.json"
    if own is not None and own.is_file():
        if pair_defaults(read_stated(own.parent)) == defaults:
            return own
    elif defaults == Defaults():
        return None
    values = {n: v for n in Defaults.names() if (v := getattr(defaults, n)) is not None}
    return {"_class_name": "NexusPipeline", "defaults": values}


def exported_pair(root: Path, engines: dict[str, Any]) -> tuple[PairFolders, Defaults]:
    """The encoders and the VAE beside exported engines, and the pair's defaults: a size they were
    built for.

    Raises:
        ModelError: the engines are not of one latent space.
    """
    architectures = [e.folder.manifest.architecture for e in engines.values()]
    for field in ("in_channels", "out_channels", "patch_size", "text_dim"):
        values = {str(a[field]) for a in architectures}
        if len(values) > 1:
            raise ModelError(
                f"{root}: the engines are not of one latent space: their {field} are"
                f" {' and '.join(values)}.",
                code="mismatch",
                param=field,
            )
    at = lambda part: root / part if (root / part / "config.json").is_file() else None
    indexed = (root / "model_index.json").is_file()
    stated = read_stated(root) if indexed else StatedDefaults()
    defaults = pair_defaults(stated)
    sizes = [
        b
        for b in next(iter(engines.values())).buckets
        if all(b in e.buckets for e in engines.values())
    ]
    if not sizes:
        each = "; ".join(f"{n}: {', '.join(map(str, e.buckets))}" for n, e in engines.items())
        raise ModelError(
            f"{root}: the engines have no size in common ({each}); export both with the same"
            " --sizes.",
            code="mismatch",
            param="buckets",
        )
    if (defaults.width, defaults.height, defaults.num_frames) not in sizes:
        defaults = defaults.replace(**sizes[0].options)
    text = root if at("text_encoder") else None
    steering = at("understanding"), at("connector")
    return PairFolders({}, at("vae"), text, *steering, stated), defaults
