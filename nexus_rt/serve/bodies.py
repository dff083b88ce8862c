"""Request bodies, read with limits on bytes and seconds; a form's or a query's fields as JSON has
them: what a text becomes is its field's kind."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from nexus_rt.core import documents
from nexus_rt.core.errors import InputError, shorten
from nexus_rt.core.fields import SERVER
from nexus_rt.core.limits import MAX_STEPS
from nexus_rt.pipeline import settings
from nexus_rt.serve.problems import Problem, wrong
from nexus_rt.serve.requests import INPUTS, OWN, no_input

SECONDS = 60.0  # that a body may take to come
DRAINED = 64 * 2**20  # bytes that are read and dropped, so that a client hears why
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
MAX_FIELDS = 64
MAX_DIGITS = 40  # characters of a number


async def _read(request: Request, most: int) -> tuple[bytes, bool]:
    """At most `most` bytes of a body, and whether there were more."""
    kept, total = bytearray(), 0
    async for chunk in request.stream():
        total += len(chunk)
        if len(kept) < most + 1:
            kept += chunk[: most + 1 - len(kept)]
        if total > DRAINED:
            break
    return bytes(kept[:most]), total > most


async def read_body(request: Request, most: int) -> Any:
    """The fields of a JSON or form body.

    Raises:
        Problem: 400 malformed, 408 too slow, 413 too large, 415 of another kind.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
    kind = kind.lower()
    if kind not in (*FORMS, "application/json"):
        raise Problem(
            415,
            "unsupported_media_type",
            f"content type {kind[:80]!r} is not read here; send application/json or"
            " multipart/form-data.",
        )
    try:
        data, more = await asyncio.wait_for(_read(request, most), SECONDS)
    except asyncio.TimeoutError:
        raise Problem(
            408, "body_timeout", f"the body did not come within {SECONDS:g} seconds."
        ) from None
    except ClientDisconnect:
        raise Problem(400, "disconnected", "the client went away.") from None
    if more:
        for name in INPUTS if kind == FORMS[0] else ():
            if f'name="{name}"'.encode() in data:
                raise no_input(name)
        raise Problem(413, "body_too_large", f"the body has more than {most} bytes; send less.")
    if kind == "application/json":
        try:
            # half a surrogate pair is left to the checks, which name its field
            return documents.parse(data, "the body", InputError, "send a JSON object", True)
        except InputError as error:
            raise Problem(400, "invalid_json", str(error)) from error
    request._body = data  # what was read is what the form is parsed from
    try:
        async with request.form(max_files=8, max_fields=MAX_FIELDS, max_part_size=most) as form:
            return from_form(list(form.multi_items()))
    except HTTPException as error:
        raise Problem(400, "invalid_form", f"the form cannot be read: {error.detail}") from error
    except (ValueError, KeyError, AssertionError, LookupError) as error:
        raise Problem(
            400,
            "invalid_form",
            "the form cannot be read; send multipart/form-data with a boundary.",
        ) from error


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
