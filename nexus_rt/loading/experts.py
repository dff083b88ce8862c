"""Generators made of two experts, as Wan2.2-T2V-A14B: one for high noise, one for low."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nexus_rt.core.checks import number
from nexus_rt.core.errors import InputError, ModelError, NexusError, shorten
from nexus_rt.core.paths import as_path
from nexus_rt.loading.config import read_optional
from nexus_rt.loading.locate import transformer_folder
from nexus_rt.method.step import EXPERTS

BOUNDARY = 0.875  # of Wan2.2-T2V-A14B (wan/configs/wan_t2v_A14B.py; diffusers' boundary_ratio)
ORIGINAL = ("high_noise_model", "low_noise_model")


@dataclass(frozen=True)
class ExpertFolders:
    """Folders or files of two experts. boundary: the share of the 1000 training timesteps from
    which up the first of them runs."""

    high: Path
    low: Path
    boundary: float = BOUNDARY

    @property
    def folders(self) -> tuple[Path, Path]:
        """The transformers', high noise first."""
        return self.high, self.low


GeneratorSource = Path | ExpertFolders


def find_experts(folder: Path) -> ExpertFolders | None:
    """The experts in a folder: `transformer/` and `transformer_2/` with `boundary_ratio` in its
    `model_index.json`, or `high_noise_model/` and `low_noise_model/`; None where it is of one
    transformer.

    Raises:
        ModelError: one expert without the other, or a boundary that is none.
    """
    if not folder.is_dir():
        return None
    first, second = (folder / name for name in ORIGINAL)
    if first.is_dir() or second.is_dir():
        if not (first.is_dir() and second.is_dir()):
            lost = second if first.is_dir() else first
            raise ModelError(
                f"{folder} lacks {lost.name}/, the other expert; download the folder again, or name"
                " the one expert's folder to run it alone.",
                code="missing",
            )
        return ExpertFolders(first, second)
    if not (folder / "transformer_2").is_dir():
        return None
    boundary = read_optional(folder / "model_index.json").get("boundary_ratio")
    if boundary is None:
        raise ModelError(
            f"{folder} holds transformer_2/ and its model_index.json no boundary_ratio; expected"
            f" the timestep where it takes over, such as {BOUNDARY}.",
            code="missing",
            param="boundary_ratio",
        )
    return ExpertFolders(
        folder / "transformer",
        folder / "transformer_2",
        check_boundary(boundary, f"{folder}/model_index.json's boundary_ratio", ModelError),
    )


def check_boundary(value: Any, name: str, error: type[NexusError] = InputError) -> float:
    """A boundary between 0 and 1.

    Raises:
        error: it is none.
    """
    try:
        number(name, value, 0.0, 1.0)
    except InputError as problem:
        raise error(str(problem), code=problem.code, param="boundary_ratio") from None
    if not 0 < value < 1:
        raise error(
            f"{name} is {value}; expected a share between 0 and 1, such as {BOUNDARY}.",
            code="out_of_range",
            param="boundary_ratio",
        )
    return float(value)


def split_source(source: Any) -> tuple[Any, ...]:
    """What a caller names as a generator: one folder, file or hub id; or two of them, a tuple or
    "HIGH,LOW" (unless that is the name of something here).

    Raises:
        InputError: a tuple of another length, or an empty half.
    """
    if isinstance(source, str) and "," in source and not as_path("source", source).exists():
        source = tuple(part.strip() for part in source.split(","))
    if not isinstance(source, (tuple, list)):
        return (source,)
    if len(source) != 2 or not all(source):
        raise InputError(
            f"a generator of {len(source)} parts ({shorten(source, 120)}); expected one folder"
            f" or file,"
            " or two: the expert for high noise, then the one for low.",
            code="mismatch",
        )
    return tuple(source)


def with_boundary(source: GeneratorSource, boundary: float | None) -> GeneratorSource:
    """The same generator with another boundary, where one is asked for and it has experts."""
    if boundary is None or not isinstance(source, ExpertFolders):
        return source
    return replace(source, boundary=boundary)


def transformers_of(source: GeneratorSource) -> dict[str, Path]:
    """The transformers of a generator: by expert, or one under ""."""
    if isinstance(source, ExpertFolders):
        pairs = zip(EXPERTS, source.folders, strict=True)
        return {name: transformer_folder(folder) for name, folder in pairs}
    return {"": transformer_folder(source)}
