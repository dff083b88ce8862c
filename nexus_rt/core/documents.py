"""JSON from files and servers, read by one function with limits, and checked against a schema
before anything uses it.

A schema is a `msgspec.Struct` or any annotated type; what it does not allow is an error that names
the file, the field and what was expected. Sizes, depth and digits are bounded, so that a hostile
document costs neither memory nor time, and its text is Unicode: JSON's escapes can spell half a
surrogate pair, which no file name, log or reply can hold.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from nexus_rt.core.errors import InputError, ModelError, NexusError, is_text, shorten, shown

T = TypeVar("T")
MAX_BYTES = 64 * 2**20  # tokenizers of 30 MB exist
MAX_DEPTH = 64
MAX_DIGITS = 40  # of a whole number: transformers writes 10^30 for a length without a limit
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate, of a pair or alone
# what msgspec says -> our code; the place and the field that it names
SCHEMA_CODES = (
    (r"Object missing required field", "missing"),
    (r"Object contains unknown field|Invalid enum value", "unknown_name"),
    (r"Expected `.*` of length <=", "too_large"),
    (r"Expected `(int|float)` (<|>)", "out_of_range"),
    (r"Expected `[^`]*`(, got| - at|$)", "invalid_type"),
)
FIELD = re.compile(r"Object (?:missing required|contains unknown) field `([^`]*)`")
PLACE = re.compile(r"- at `\$\.?([^`]*)`$")
MAX_FLOAT = 1100  # characters of another number: float64's longest exact decimal has 1,075


def read_bytes(path: Path, error: type[NexusError] = ModelError, limit: int = MAX_BYTES) -> bytes:
    """A file's bytes, or what comes out of a pipe; errors name it.

    Raises:
        error: no file, one that cannot be read, a device, or above `limit` bytes.
    """
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            raise OSError(0, "it is a folder" if stat.S_ISDIR(kind) else "it is a device")
        with open(path, "rb") as file:
            data = file.read(limit + 1)  # a file may grow, and a pipe has no size
    except (OSError, ValueError) as problem:  # ValueError: NUL, or half a surrogate pair
        reason = shorten(getattr(problem, "strerror", None) or problem)
        raise error(
            f"{shorten(path)} cannot be read ({reason}); check the path, or get the file again.",
            code="not_found" if isinstance(problem, FileNotFoundError) else "unreadable",
        ) from None
    if len(data) > limit:
        raise error(
            f"{path} has more than {limit} bytes, the most that a document of its kind has: it is"
            " something else.",
            code="too_large",
        )
    return data


def parse(
    data: bytes | str,
    where: str,
    error: type[NexusError] = ModelError,
    remedy: str = "get the file again",
    any_text: bool = False,
) -> Any:
    """Parsed JSON of at most `MAX_DEPTH` levels; NaN, Infinity, numbers beyond float64, doubled
    keys and halves of surrogate pairs are refused.

    any_text: halves of surrogate pairs stay, for a list of prompts, whose items fail one by one.

    Raises:
        error: it is not JSON; says where.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(
            text,
            parse_constant=_no_constant,
            parse_int=_whole,
            parse_float=_real,
            object_pairs_hook=_once,
        )
    except (ValueError, RecursionError) as problem:
        reason = (
            "it is nested too deeply" if isinstance(problem, RecursionError) else shorten(problem)
        )
        words = "cannot be read as" if error is ModelError else "is not"
        deep = "too_large" if isinstance(problem, RecursionError) else "unreadable"
        code = getattr(problem, "code", deep)
        raise error(f"{where} {words} JSON ({reason}); {remedy}.", code=code) from None
    if _deeper(value, MAX_DEPTH):
        raise error(
            f"{where} is nested more than {MAX_DEPTH} levels deep; {remedy}.", code="too_large"
        )
    if not any_text and (HALF.search(text) or not is_text(text)):
        _refuse_odd(value, where, error, remedy)
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
        error: it breaks the schema, or holds what no JSON document does (see `parse`).
    """
    _refuse_odd(value, where, error, remedy)
    try:
        return msgspec.convert(value, kind, strict=True)
    except NexusError as problem:  # a schema's own check
        raise error(
            f"{where}: {shorten(problem)}", code=problem.code, param=problem.param
        ) from None
    # a schema's own check computes with what it is given
    except (ValueError, TypeError, ArithmeticError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        reason = reason.replace("`$.", "`").replace("- at `$`", "").strip()
        code, param = _broken(problem)
        raise error(
            f"{where} is not as expected: {shorten(reason)}; {remedy}.", code=code, param=param
        ) from None


def _broken(problem: Exception) -> tuple[str, str | None]:
    """The code and the field of a schema's refusal, read off msgspec's words: it has no other
    form of them."""
    if isinstance(cause := problem.__cause__, NexusError):  # of a schema's own check
        return cause.code, cause.param
    if isinstance(problem, RecursionError):
        return "too_large", None
    words = str(problem)
    place = match[1] if (match := PLACE.search(words)) else ""
    field = match[1] if (match := FIELD.match(words)) else ""
    code = next((code for begin, code in SCHEMA_CODES if re.match(begin, words)), "invalid_value")
    return code, shorten(".".join(filter(None, (place, field))), 120) or None


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
        raise error(
            f"{path} holds a {type(value).__name__}; expected a JSON object.", code="invalid_type"
        )
    return value


def _no_constant(name: str) -> float:
    raise InputError(f"{name} is no JSON number", code="not_finite")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise InputError(f"{text[:12]}... has {len(text)} digits", code="too_large")
    return int(text)


def _real(text: str) -> float:
    if len(text) > MAX_FLOAT:
        raise InputError(f"{text[:12]}... has {len(text)} characters", code="too_large")
    value = float(text)
    if math.isinf(value):
        raise InputError(f"{shorten(text, 40)} is beyond float64", code="out_of_range")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        known: set[str] = set()
        twice = next(k for k, _ in pairs if k in known or known.add(k))  # type: ignore[func-returns-value]
        raise InputError(f"key {shown(twice)} is there twice", code="duplicate")
    return document


def _refuse_odd(value: Any, where: str, error: type[NexusError], remedy: str) -> None:
    """Raise where a document of JSON's types holds what none may."""
    if (odd := _odd(value)) is not None:
        code, words = odd
        raise error(f"{where} {words}; {remedy}.", code=code)


def _odd(value: Any) -> tuple[str, str] | None:
    """The code and the words for what a document holds that none may, without recursion."""
    layer = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: dict[int, Any] = {}  # by identity: an object that holds itself is looked at once
        for one in layer:
            if isinstance(one, str):
                if not is_text(one):
                    half = f"holds {shown(one)}, half a surrogate pair, which is no text"
                    return "invalid_value", half
            elif isinstance(one, int):
                if abs(one) >= 10**MAX_DIGITS:
                    return "too_large", f"holds a whole number of more than {MAX_DIGITS} digits"
            elif isinstance(one, float):
                if not math.isfinite(one):
                    return "not_finite", f"holds {one}, which is no JSON number"
            elif isinstance(one, dict):
                inner |= {id(v): v for v in (*one.keys(), *one.values())}
            elif isinstance(one, (list, tuple)):
                inner |= {id(v): v for v in one}
        if not inner:
            return None
        layer = list(inner.values())
    return "too_large", f"is nested more than {MAX_DEPTH} levels deep"


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
