"""JSON configs of models as they are stored: read, and refused where they reach for code or are no
model's; and written."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from nexus_rt.core.documents import read_object
from nexus_rt.core.errors import ModelError, shorten

WAN_CLASSES = ("WanTransformer3DModel", "WanModel")  # of a transformer's config.json
# A layer count or width above these is no model's, and building its modules alone would hang or
# exhaust the machine.
MOST_LAYERS, MOST_WIDTH = 1024, 2**24
HARMLESS_LARGE = (
    "theta",
    "max_position",
    "model_max_length",
    "seed",
    "token",
    "length",
    "bytes",
    "size_in",
    "factor",
)


def read_json(path: Path) -> dict:
    """A JSON object, or a `ModelError` that names the file."""
    if not path.is_file():
        raise ModelError(
            f"{path.parent} is not a model folder: it has no {path.name}.", code="not_found"
        )
    return read_object(path)


def warn_unread(config: Mapping[str, Any], known: Collection[str], where: Path) -> None:
    """Warn of a config's fields that are set and that nothing here reads."""
    strange = [f for f, v in config.items() if not f.startswith("_") and f not in known and v]
    if strange:
        warnings.warn(
            f"{where}: fields that are not read here: {shorten(', '.join(strange), 120)}; the"
            f" model of"
            " a fork may compute another clip with them.",
            stacklevel=3,
        )


def write_json(path: Path, value: dict) -> None:
    """Write a JSON object; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    return read_object(path) if path.is_file() else {}


def config_of(source: Path) -> Path | None:
    """The `config.json` of a folder, or beside a file where it is a Wan transformer's; None where
    there is none."""
    path = source / "config.json" if source.is_dir() else source.with_name("config.json")
    if not path.is_file():
        return None
    own = source.is_dir() or read_object(path).get("_class_name") in WAN_CLASSES
    return path if own else None


def check_config(folder: Path, what: str) -> dict[str, Any]:
    """A transformers folder's `config.json` ({} where there is none), refused where it reaches for
    code or is absurd.

    Raises:
        ModelError: an attention implementation from elsewhere, layer counts or widths of no model.
    """
    path = folder / "config.json"
    config = read_optional(path)
    for where, value in _leaves(config):
        key = where.rpartition(".")[2]
        if (
            "implementation" in key
            and isinstance(value, str)
            and not value.replace("_", "").replace("|", "").isalnum()
        ):
            raise ModelError(
                f"{path} sets {where}={shorten(value, 80)!r}, code from elsewhere; this runtime"
                f" runs"
                " none: remove the field.",
                code="unsafe",
                param=shorten(where, 120),
            )
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            layers = any(word in key for word in ("layers", "blocks", "n_layer", "depth"))
            limit = MOST_LAYERS if layers else MOST_WIDTH
            large = not layers and any(word in key for word in HARMLESS_LARGE)
            if not large and (abs(value) > limit or not math.isfinite(value)):
                raise ModelError(
                    f"{path} sets {where}={value:.6g}; expected at most {limit}: the {what} is no"
                    " such model.",
                    code="out_of_range",
                    param=shorten(where, 120),
                )
    return config


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a document with its dotted place."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{where}.{key}" if where else str(key))
    else:
        yield where, value
