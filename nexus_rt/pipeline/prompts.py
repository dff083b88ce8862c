"""Prompt lists: a text file, JSON, JSON lines, or VR-Bench's prompt files, as items with a name, a
seed and a size."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, NexusError, shorten, shown
from nexus_rt.core.fields import LIST, Field
from nexus_rt.core.limits import MAX_SEED
from nexus_rt.core.paths import as_path
from nexus_rt.core.size import parse_sides
from nexus_rt.method.plan_text import check_plan
from nexus_rt.pipeline import settings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
OWN: dict[str, type | tuple[type, ...]] = {  # an entry's fields that are no settings
    "prompt": str,
    "id": (str, int),
    "seed": int,
    "size": str,
    "negative": str,
}


@dataclass(frozen=True)
class Item:
    """One clip to make.

    seed None: the run's. settings: of a call, under its names, that go before the run's.
    """

    id: str
    prompt: str
    seed: int | None = None
    negative: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def list_settings() -> dict[str, Field]:
    """The settings that an entry may have, by the names that it has them under."""
    return {f.flag: f for f in settings.fields(LIST).values()}


def read_prompts(path: str | Path) -> list[Item]:
    """The items of a list.

    A `.txt` file has a prompt a line (empty lines and those that begin with # are left out) and
    names them by their place; `.json` is an array of objects (or of strings), or VR-Bench's object
    of categories; `.jsonl` an object a line. A folder is read as all its `.json` files. An object's
    fields are prompt, and if wanted id, seed, size ("832x480"), negative, and settings of a call
    under the names of the command line's options (`list_settings`). A text of an item that is no
    Unicode (half a surrogate pair) is the item's own failure when it is made.

    Raises:
        InputError: no such file, one that breaks this (with the place and what was expected), no
            prompts, an id twice.
    """
    path = as_path("path", path)
    items = [item for file in prompt_files(path) for item in _file(file)]
    check_ids([item.id for item in items], path)
    return items


def prompt_files(path: Path) -> list[Path]:
    """The file, or a folder's `.json` files in order of name."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} holds no .json files; expected prompt lists.", code="missing")
    return files


def check_ids(ids: list[str], path: Path) -> None:
    """Raise unless there are ids, each once."""
    if not ids:
        raise InputError(
            f"{path} holds no prompts; expected at least one.", code="missing", param="prompt"
        )
    twice = next((name for name, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise InputError(
            f"{path}: id {twice!r} is there twice; every clip needs a name of its own.",
            code="duplicate",
            param="id",
        )


def read_text(path: Path) -> str:
    """A list's text, whichever editor saved it."""
    try:
        return documents.read_bytes(path, InputError).decode("utf-8-sig")
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({shorten(error)}); expected a .txt, .json or .jsonl list of"
            " prompts.",
            code=error.code if isinstance(error, InputError) else "unreadable",
        ) from None


def _file(path: Path) -> list[Item]:
    text = read_text(path)
    if path.suffix == ".txt":
        # at line feeds alone: U+2028 and U+0085 are text
        lines = [line.strip() for line in text.split("\n")]
        lines = [line for line in lines if line and not line.startswith("#")]
        # an id stays as the list grows
        return [Item(f"{i:04}", line) for i, line in enumerate(lines)]
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(
            f"{path} ends in {path.suffix or 'nothing'}; expected .txt, .json or .jsonl.",
            code="unsupported",
        )
    if path.suffix == ".jsonl":
        rows = [
            (line, f"{path}, line {n}")
            for n, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
        return [
            _item(parse_json(line, place, any_text=True), place, i)
            for i, (line, place) in enumerate(rows)
        ]
    document = parse_json(text, str(path), any_text=True)
    if isinstance(document, list):
        return [_item(row, f"{path}: [{i}]", i) for i, row in enumerate(document)]
    if not isinstance(document, dict):
        raise InputError(
            f"{path} holds a {type(document).__name__}; expected an array of prompts, or VR-Bench's"
            " categories.",
            code="invalid_type",
        )
    return [
        _item({"id": row["id"], "prompt": row["prompt_en"]}, place, i)
        for name, category in document.items()
        for i, (row, place) in enumerate(category_prompts(category, f"{path}: {name}"))
    ]


def parse_json(text: str, where: str, any_text: bool = False) -> Any:
    """The value, or an `InputError` that names the place; any_text: as in `documents.parse`."""
    return documents.parse(text, where, InputError, "mend it", any_text)


def category_prompts(document: Any, where: str) -> list[tuple[dict[str, Any], str]]:
    """The rows under `prompts` of one of VR-Bench's categories, each with its place; `id` and
    `prompt_en` are there.

    Raises:
        InputError: they are not; names the field's place and what was expected.
    """
    rows = document.get("prompts") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise InputError(
            f"{where}.prompts is {type(rows).__name__}; expected an array, as in VR-Bench's files.",
            code="invalid_type",
            param="prompts",
        )
    placed = []
    for i, row in enumerate(rows):
        place = f"{where}.prompts[{i}]"
        if not isinstance(row, dict):
            raise InputError(
                f"{place} is a {type(row).__name__}; expected an object.", code="invalid_type"
            )
        for name in ("id", "prompt_en"):
            value = row.get(name)
            if (
                isinstance(value, bool)
                or not isinstance(value, (str, int))
                or not str(value).strip()
            ):
                raise InputError(
                    f"{place}.{name} is {shown(value)}; expected text.",
                    code="missing" if value is None or isinstance(value, str) else "invalid_type",
                    param=name,
                )
        placed.append((row, place))
    return _mended(placed, where)


def _mended(rows: list[tuple[dict[str, Any], str]], where: str) -> list[tuple[dict[str, Any], str]]:
    """Rows whose ids are each there once: of two prompts under one id the one that stands between
    its neighbours' numbers (021 between 020 and 022) gets its number, with a warning, where only
    one can be meant.

    A published file holds an id twice, its generation-only twin the right one.
    """
    ids = [str(row["id"]) for row, _ in rows]
    for name, count in Counter(ids).items():
        if count == 1:
            continue
        places = [i for i, other in enumerate(ids) if other == name]
        choices = [(i, new) for i in places if (new := _between(ids, i)) is not None]
        texts = {str(rows[i][0]["prompt_en"]) for i in places}
        if count != 2 or len(choices) != 1 or len(texts) != 2:
            raise InputError(
                f"{where}: id {name!r} is there twice; every clip needs a name of its own.",
                code="duplicate",
                param="id",
            )
        i, new = choices[0]
        message = (
            f"{rows[i][1]}.id is {name!r}, which its category holds twice; read as {new!r}, by its"
            " place."
        )
        warnings.warn(message, stacklevel=4)
        ids[i] = new
        rows[i] = ({**rows[i][0], "id": new}, rows[i][1])
    return rows


def _between(ids: list[str], place: int) -> str | None:
    """The id that a place's neighbours leave for it, where it is another than it has and free."""
    near = ids[max(0, place - 1) : place + 2]
    parts = [m for i in near if (m := re.fullmatch(r"(.*?)(\d+)", i))]
    if place == 0 or len(parts) < 2 or len(parts) < len(near):
        return None
    before, own, after = parts[0], parts[1], parts[2] if len(parts) > 2 else None
    number = int(before[2]) + 1
    new = f"{own[1]}{number:0{len(own[2])}}"
    if before[1] != own[1] or new in ids:
        return None
    if after is None:  # the last: its number is the next where the others count without a gap
        known = [int(m[2]) for i in ids[:-1] if (m := re.fullmatch(r"(.*?)(\d+)", i))]
        return new if len(known) > 2 and all(b - a == 1 for a, b in pairwise(known)) else None
    return new if after[1] == own[1] and int(after[2]) == number + 1 else None


def check_name(value: Any, where: str) -> str:
    """An id that can be a file's name."""
    if not NAME.fullmatch(str(value)):
        raise InputError(
            f"{where}.id is {shown(value)}; expected a file's name: letters, digits, '.',"
            " '_' and '-', at most 120.",
            param="id",
        )
    return str(value)


def _item(row: Any, where: str, index: int) -> Item:
    """An item of a list's entry; where: its place, for errors."""
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise InputError(
            f"{where} is a {type(row).__name__}; expected an object with a prompt.",
            code="invalid_type",
        )
    known = list_settings()
    if unknown := sorted(set(row) - set(OWN) - set(known)):
        raise InputError(
            f"{where} sets an unknown {shown(unknown[0])}; expected {', '.join((*OWN, *known))}.",
            code="unknown_name",
            param=shorten(unknown[0], 80),
        )
    row = {name: value for name, value in row.items() if value is not None}
    for name, kind in OWN.items():
        _check_type(row.get(name), kind, name, where)
    if not row.get("prompt", "").strip():
        raise InputError(
            f"{where}.prompt is {shown(row.get('prompt'))}; expected text.",
            code="missing",
            param="prompt",
        )
    if not -1 <= row.get("seed", 0) <= MAX_SEED:
        raise InputError(
            f"{where}.seed is {row['seed']}; expected -1 to {MAX_SEED}.",
            code="out_of_range",
            param="seed",
        )
    name = check_name(row.get("id", f"{index:04}"), where)
    own = _sides(row["size"], where) if "size" in row else {}
    for flag, one in known.items():
        if flag in row:
            own[one.name] = _setting(one, row[flag], where)
    return Item(name, row["prompt"].strip(), row.get("seed"), row.get("negative"), own)


def _check_type(
    value: Any, kind: type | tuple[type, ...], name: str, where: str, words: str | None = None
) -> None:
    """Raise an `InputError` unless a field is absent or of a type."""
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return
    types = {str: "text", int: "a whole number", (str, int): "text or a whole number"}
    raise InputError(
        f"{where}.{name} is {shown(value)}; expected {words or types[kind]}.",
        code="invalid_type",
        param=name,
    )


def _sides(text: str, where: str) -> dict[str, int]:
    """The settings of an entry's size."""
    known = settings.fields()
    try:
        sides = dict(zip(("width", "height"), parse_sides(text), strict=True))
        return {name: known[name].checked(side) for name, side in sides.items()}
    except InputError:
        raise InputError(
            f"{where}.size is {shown(text)}; expected WIDTHxHEIGHT, such as 832x480.",
            param="size",
        ) from None


def _setting(known: Field, value: Any, where: str) -> Any:
    """An entry's setting as a call takes it."""
    if known.kind == "any":
        _check_type(value, str, known.flag, where)
        if not value.strip():
            raise InputError(
                f"{where}.{known.flag} is empty; expected text, or none of it.",
                code="missing",
                param=known.flag,
            )
    elif known.nested:
        names = ", ".join(known.kind.__struct_fields__)
        _check_type(value, dict, known.flag, where, f"an object of some of {names}")
    try:
        if known.name == "plan":
            check_plan(value)
        return replace(known, name=known.flag).checked(value)
    except NexusError as error:
        raise InputError(f"{where}: {error}", code=error.code, param=error.param) from None
