"""The parts of a pair: which folder each comes from, whether they belong together, and what its
files say of its calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nexus_rt.core.errors import InputError, ModelError, shorten
from nexus_rt.loading import transformer
from nexus_rt.loading.config import read_json
from nexus_rt.loading.experts import (
    ExpertFolders,
    GeneratorSource,
    check_boundary,
    find_experts,
    split_source,
    transformers_of,
    with_boundary,
)
from nexus_rt.loading.locate import find_vae, given_vae, has_text
from nexus_rt.loading.scheduler import Scheduler, find_scheduler, first_scheduler
from nexus_rt.loading.source import resolve
from nexus_rt.loading.vae import vae_space
from nexus_rt.models.wan_config import WanConfig

MINI = Path(__file__).resolve().parents[1] / "mini"


@dataclass(frozen=True)
class StatedDefaults:
    """What a pair's files say of its calls, as it stands there.

    index: its `model_index.json`, None for a pair without one. values: that file's "defaults".
    scheduler: the one that counts of those of its folders.
    """

    index: Path | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Scheduler | None = None


@dataclass(frozen=True)
class PairFolders:
    """Folders of a pair, or files of single parts; None for a part it does not have.

    text: what `nexus_rt.loading.locate.find_text` reads. tokenizer: its folder, where it is not
    beside the text encoder.
    """

    generators: dict[str, GeneratorSource]
    vae: Path | None
    text: Path | None
    understanding: Path | None
    connector: Path | None
    stated: StatedDefaults
    tokenizer: Path | None = None

    def check_width(self, width: int) -> None:
        """Raise unless the small generator reads context tokens of this width."""
        wanted = architecture_of(self.generators["small"]).text_dim
        if width != wanted:
            raise ModelError(
                f"the connector makes tokens of width {width} and the small generator reads"
                f" {wanted}; pair the two that were trained together.",
                code="mismatch",
                param="connector",
            )


def architecture_of(source: GeneratorSource) -> WanConfig:
    """A generator's architecture.

    Raises:
        ModelError: its two experts are not of one.
    """
    configs = {n: transformer.load_config(f) for n, f in transformers_of(source).items()}
    first, *others = configs.values()
    if any(other != first for other in others):
        raise ModelError(
            f"the experts {' and '.join(map(str, transformers_of(source).values()))} are not of one"
            " architecture; pass the two that belong together.",
            code="mismatch",
        )
    return first


def _same_space(folders: Mapping[str, GeneratorSource], vaes: dict[str, Path]) -> None:
    """Raise unless both transformers, and their VAEs where they bring them, live in one latent
    space."""
    configs = {name: architecture_of(f) for name, f in folders.items()}
    different = []
    if len(configs) == 2:
        small, large = configs["small"], configs["large"]
        different = [
            f"{field} ({getattr(small, field)} and {getattr(large, field)})"
            for field in ("in_channels", "out_channels", "patch_size", "text_dim")
            if getattr(small, field) != getattr(large, field)
        ]
    if len(vaes) == 2:
        small_vae, large_vae = vae_space(vaes["small"]), vae_space(vaes["large"])
        different += [
            f"the VAE's {k} ({small_vae[k]} and {large_vae[k]})"
            for k in small_vae
            if small_vae[k] != large_vae[k]
        ]
    for name, folder in vaes.items():
        channels = vae_space(folder)["z_dim"]
        if name in configs and channels != configs[name].in_channels:
            different.append(
                f"the {name} generator's in_channels ({configs[name].in_channels}) and its VAE's"
                f" z_dim ({channels})"
            )
    if different:
        raise ModelError(
            f"not one latent space: they differ in {'; '.join(different)}; pair generators trained"
            " on the same latents.",
            code="mismatch",
        )


def read_stated(root: Path) -> StatedDefaults:
    """The defaults that a pair folder's `model_index.json` sets.

    Raises:
        ModelError: it is of one model and no pair, or its defaults are no object.
    """
    path = root / "model_index.json"
    index = read_json(path)
    if index.get("_class_name") != "NexusPipeline":
        raise ModelError(
            f"{root} holds a {index.get('_class_name')}, one model and no pair; pass it as small="
            " or large=.",
            code="unsupported",
            param="pretrained",
        )
    values = index.get("defaults", {})
    if not isinstance(values, dict):
        raise ModelError(
            f"{path} has defaults that are a {type(values).__name__}; expected an object.",
            code="invalid_type",
            param="defaults",
        )
    return StatedDefaults(path, values)


def _stated(root: Path | None, generators: Mapping[str, tuple[Path, ...]]) -> StatedDefaults:
    """A pair's own defaults, and the scheduler of its generators.

    root: of a pair's folder. generators: their folders or files.
    """
    for sources in generators.values():
        for source in sources:
            _check_pipeline(source)
    large, small = (
        next((s for f in generators.get(n, ()) if (s := find_scheduler(f)) is not None), None)
        for n in ("large", "small")
    )
    stated = StatedDefaults() if root is None else read_stated(root)
    own = None if root is None else find_scheduler(root)
    return replace(stated, scheduler=first_scheduler((large, own, small), stated.values))


PIPELINES = ("WanPipeline", "WanVideoToVideoPipeline")  # of diffusers, with these transformers


def _check_pipeline(folder: Path) -> None:
    """Warn where a generator's `model_index.json` is of another pipeline than Wan's."""
    path = folder / "model_index.json"
    name = read_json(path).get("_class_name") if path.is_file() else None
    if name is not None and name not in (*PIPELINES, "NexusPipeline"):
        warnings.warn(
            f"{path} is of a {shorten(str(name), 80)}; its transformer is run as WanPipeline's: a"
            " few-step model takes its steps and shift from a recipe (small_recipe=,"
            " large_recipe=).",
            stacklevel=3,
        )


def _steering(
    root: Path | None, given: dict[str, Any], small: bool, hub: dict
) -> dict[str, Path | None]:
    """Folders of the understanding model and the connector: as given, else the pair's, else None
    for both."""
    sources = {n: given.get(n) for n in ("understanding", "connector")}
    if root is not None and (root / "connector" / "config.json").is_file() and "small" not in given:
        sources = {n: root / n if s is None else s for n, s in sources.items()}
    absent = [n for n, s in sources.items() if s is None]
    if len(absent) == 1:
        raise InputError(
            f"the understanding model and the connector work together only; pass {absent[0]}= too,"
            " or neither.",
            code="missing",
            param=absent[0],
        )
    if absent or not small:
        return dict.fromkeys(sources)
    folders = {n: resolve(s, (n,), **hub) for n, s in sources.items() if s is not None}
    return {n: f / n if (f / n / "config.json").is_file() else f for n, f in folders.items()}


GENERATOR_FOLDERS = ("transformer", "transformer_2", "high_noise_model", "low_noise_model", "vae")


def _generator(paths: tuple[Path, ...], boundary: float | None) -> GeneratorSource:
    """A generator of the folders or files that were named: one, or two experts."""
    if len(paths) == 2:
        source: GeneratorSource = ExpertFolders(*paths)
    else:
        source = find_experts(paths[0]) or paths[0]
    return with_boundary(source, boundary)


def find_pair(
    pretrained: str | Path | None,
    given: dict[str, Any],
    hub: dict,
    boundary: float | None = None,
) -> PairFolders:
    """Resolve the folders of a pair.

    Args:
        pretrained: a pair's folder or hub id, or None.
        given: folders, files or hub ids under "small", "large", "vae", "text_encoder",
            "tokenizer", "understanding", "connector"; they go before the pair's own.
        hub: options of `resolve`. boundary: of a generator of two experts, where it is not its
            folder's.

    Raises:
        ModelError: a folder is no model, or the generators are not of one latent space.
        InputError: one of understanding model and connector without the other.
    """
    if boundary is not None:
        boundary = check_boundary(boundary, "boundary_ratio")
    chosen: dict[str, tuple[Path, ...]] = {
        n: tuple(resolve(s, GENERATOR_FOLDERS, **hub) for s in split_source(given[n]))
        for n in ("small", "large")
        if n in given
    }
    root, generators = None, chosen
    if pretrained is not None:
        root = resolve(pretrained, ("small", "large", "vae", "understanding", "connector"), **hub)
        own: dict[str, tuple[Path, ...]] = {
            n: (root / n,) for n in ("small", "large") if (root / n).is_dir()
        }
        generators = {**own, **chosen}
        if not generators:
            raise ModelError(
                f"{root} holds neither small/ nor large/; expected a pair's folder.",
                code="missing",
                param="pretrained",
            )
        sources = [(pretrained, root)]
    else:
        names = [n for n in ("large", "small") if n in generators]
        sources = [(split_source(given[n])[0], generators[n][0]) for n in names]
    stated = _stated(root, generators)
    folders = {n: _generator(f, boundary) for n, f in generators.items()}
    if boundary is not None and not any(isinstance(f, ExpertFolders) for f in folders.values()):
        raise InputError(
            "boundary_ratio is where the experts of a generator change over, and no generator here"
            " has two; leave it out.",
            code="unsupported",
            param="boundary_ratio",
        )
    vaes: dict[str, Path] = {
        n: v for n, f in generators.items() if (v := find_vae(f[0])) is not None
    }
    vae = next((v for _, f in sources if (v := find_vae(f)) is not None), None)
    if "vae" in given:
        vae = vaes["given"] = given_vae(resolve(given["vae"], ("vae",), **hub))
    _same_space(folders, vaes)
    text = None
    for source in [given["text_encoder"]] if "text_encoder" in given else [s for s, _ in sources]:
        # of one source only: it is the large part
        folder = resolve(source, ("text_encoder", "tokenizer"), **hub)
        if "text_encoder" in given or has_text(folder):
            text = folder
            break
    tokenizer = None
    if "tokenizer" in given:
        if text is None:
            raise InputError(
                "tokenizer= goes with a text encoder, and none is here; pass text_encoder= too.",
                code="missing",
                param="text_encoder",
            )
        tokenizer = resolve(given["tokenizer"], ("tokenizer",), **hub)
    return PairFolders(
        folders,
        vae,
        text,
        stated=stated,
        tokenizer=tokenizer,
        **_steering(root, given, "small" in folders, hub),
    )
