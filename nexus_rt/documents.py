"""JSON from files and servers, read by one function with limits, and checked against a schema
before anything uses it.

A schema is a `msgspec.Struct` or any annotated type; what it does not allow is an error that names
the file, the field and what was expected. Sizes and depth are bounded, so that a hostile document
costs neither memory nor time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nexus_rt.errors import ModelError, NexusError, cut

T = TypeVar("T")
MAX_BYTES = 64 * 2**20  # tokenizers of 30 MB exist
MAX_DEPTH = 64


def read_bytes(path: Path, error: type[NexusError] = ModelError, limit: int = MAX_BYTES) -> bytes:
    """A file's bytes; errors name it.

    Raises:
        error: no file, one that cannot be read, or above `limit` bytes.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(
                f"{path} has {size} bytes; a document of its kind has at most {limit}: it is"
                " something else."
            )
        return path.read_bytes()
    except OSError as problem:
        raise error(
            f"{path} cannot be read ({problem.strerror or problem}); check the path, or get the"
            " file again."
        ) from None


def parse(
    data: bytes | str,
    where: str,
    error: type[NexusError] = ModelError,
    remedy: str = "get the file again",
) -> Any:
    """Parsed JSON of at most `MAX_DEPTH` levels; NaN, Infinity, numbers beyond float64 and doubled
    keys are refused.

    Raises:
        error: it is not JSON; says where.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(
            text, parse_constant=_no_constant, parse_int=_whole, object_pairs_hook=_once
        )
    except (ValueError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else cut(problem)
        words = "cannot be read as" if error is ModelError else "is not"
        raise error(f"{where} {words} JSON ({reason}); {remedy}.") from None
    if _deeper(value, MAX_DEPTH):
        raise error(f"{where} is nested more than {MAX_DEPTH} levels deep; {remedy}.")
    return value


def check(
    value: Any,
    kind: type[T],
    where: str,
    error: type[NexusError] = ModelError,
    remedy: str = "get the file again",
) -> T:
    """`value` as a `kind`: a msgspec schema, whose words say what was expected where.

    Raises:
        error: it breaks the schema.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, RecursionError) as problem:
        reason = str(problem).replace("`$.", "`").replace("- at `$`", "").strip()
        raise error(f"{where} is not as expected: {cut(reason)}; {remedy}.") from None
    except NexusError as problem:  # a schema's own check
        raise error(f"{where}: {cut(problem)}") from None


def read(
    path: Path,
    kind: type[T],
    error: type[NexusError] = ModelError,
    remedy: str = "get the file again",
) -> T:
    """A JSON file as a `kind`; errors as `read_bytes`, `parse` and `check`."""
    return check(
        parse(read_bytes(path, error), str(path), error, remedy), kind, str(path), error, remedy
    )


def read_object(
    path: Path, error: type[NexusError] = ModelError, remedy: str = "download the folder again"
) -> dict[str, Any]:
    """A JSON object, whatever its fields."""
    value = parse(read_bytes(path, error), str(path), error, remedy)
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _whole(text: str) -> int:
    if len(text) > 40:  # transformers writes 10^30 for a length without a limit
        raise ValueError(f"{text[:12]}... has {len(text)} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(
            f"key {next(n for n in names if names.count(n) > 1)[:80]!r} is there twice"
        )
    return document


def _deeper(value: Any, levels: int) -> bool:
    """Whether a parsed document has more levels than that, without recursion."""
    layer = [value]
    for _ in range(levels):
        layer = [
            x
            for v in layer
            if isinstance(v, (dict, list))
            for x in (v.values() if isinstance(v, dict) else v)
        ]
        if not layer:
            return False
    return True
