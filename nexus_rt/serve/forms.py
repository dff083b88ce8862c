"""A form's or a query's fields as JSON has them: what a text becomes is its field's kind."""

from __future__ import annotations

import json
import re
from typing import Any

from nexus_rt.core.errors import shorten
from nexus_rt.core.fields import SERVER
from nexus_rt.core.limits import MAX_STEPS
from nexus_rt.pipeline import settings
from nexus_rt.serve.problems import wrong
from nexus_rt.serve.requests import INPUTS, OWN, no_input

MAX_DIGITS = 40  # characters of a number


def from_form(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A form's fields as JSON would have them; "lora" and "lora[]" may come again.

    Raises:
        Problem: a file, or a field that comes twice.
    """
    body: dict[str, Any] = {}
    for field, value in fields:
        key = re.sub(r"\[\d*\]$", "", field)
        name = shorten(key, 80)
        if not isinstance(value, str):
            if key in INPUTS:
                raise no_input(key)
            raise wrong(name, f"{name} is a file; expected text.")
        if key == "lora":
            body.setdefault("lora", []).append(value)
            continue
        if key in body:
            raise wrong(name, f"{name} was sent twice; send it once.")
        body[key] = _typed(key, value)
    return body


def _typed(name: str, text: str) -> Any:
    """A form's text as JSON would have it, or as it is for the checks to refuse."""
    field = settings.fields(SERVER).get(name)
    kind = OWN.get(name, str) if field is None else field.kind
    try:
        if kind is bool:
            return {"true": True, "false": False}.get(text.lower(), text)
        if kind in (int, float):
            return kind(_digits(text))
        if kind in ("scale", "numbers") and text.count(",") <= MAX_STEPS:
            numbers = [float(_digits(part)) for part in text.split(",")]
            return numbers[0] if kind == "scale" and len(numbers) == 1 else numbers
        if field is not None and field.nested:
            return json.loads(text)
    except (ValueError, RecursionError):
        pass
    return text


def _digits(text: str) -> str:
    """A text that is short enough to be a number; Python takes long over a million digits."""
    if len(text) > MAX_DIGITS:
        raise ValueError("longer than a number")
    return text
