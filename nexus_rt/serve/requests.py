"""What clients ask for: the body of `POST /v1/videos`, resolved and checked before it is queued.

The fields of OpenAI's API, the server's own, and the settings of a call that a server takes
(`nexus_rt.pipeline.settings`); whatever else is sent is refused by name. A form's texts become the
types of JSON first (`nexus_rt.serve.bodies`), so that both are checked alike.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

import msgspec

from nexus_rt.core.amounts import frame_rate
from nexus_rt.core.checks import number, whole
from nexus_rt.core.errors import InputError, shown
from nexus_rt.core.fields import SERVER, Field
from nexus_rt.core.limits import MAX_SEED, MAX_STEPS
from nexus_rt.core.size import ClipSize, parse_sides
from nexus_rt.pipeline import settings
from nexus_rt.pipeline.request import PairProfile
from nexus_rt.pipeline.settings import CallSettings
from nexus_rt.serve.problems import Problem, unexpected, unknown_parameter, wrong

MAX_PROMPT = 32_000  # characters, OpenAI's limit
MAX_NUMBER = 1e9  # of a number in a body, either sign, before the range of its field is looked at
PRIORITIES = (-10, 10)
OWN = {  # the server's own fields, and what a form's text becomes
    "prompt": str,
    "model": str,
    "negative_prompt": str,
    "size": str,
    "seconds": str,
    "fps": str,
    "seed": int,
    "lora": str,
    "priority": int,
    "deadline": float,
}
SIZES = ("width", "height", "num_frames")  # settings that a request always has
SENT_AS = {"width": "size", "height": "size"}  # fields of requests by the call's settings
STEPS = re.compile(r"(?:\b(?:small|large|bridge):|/|\bsteps=)([0-9]{1,9})")  # in a plan's text
INPUTS = ("input_reference", "image", "image_url", "video", "input_image", "characters")
SECONDS = re.compile(r"\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*")
LORA = re.compile(r"(?:(small|large):)?([\w.-]{1,200}?)(?:@(-?\d{1,3}(?:\.\d{1,6})?))?")


def field_names() -> tuple[str, ...]:
    """The fields of `POST /v1/videos` and of the query of `GET /v1/plan`."""
    return (*OWN, *settings.fields(SERVER))


@dataclass(frozen=True)
class ClipRequest:
    """A job: everything that decides what its clip is, and when it runs.

    settings: the call's, the clip's size among them. seconds: as it is answered. loras:
        "small:NAME@SCALE" or "large:NAME@SCALE".
    """

    prompt: str
    model: str
    settings: CallSettings
    fps: str
    seconds: str
    seed: int
    negative_prompt: str | None = None
    loras: tuple[str, ...] = ()
    priority: int = 0
    deadline: float | None = None

    @classmethod
    def stored(cls, row: Mapping[str, Any]) -> ClipRequest:
        """A request as the store keeps it.

        Raises:
            TypeError, KeyError, InputError: another version's.
        """
        names = settings.CallSettings.__struct_fields__
        own = {n: v for n, v in row.items() if n not in names}
        made = settings.CallSettings.of(row)
        return cls(**{**own, "settings": made, "loras": tuple(row["loras"])})

    def as_row(self) -> dict[str, Any]:
        """The request as the store keeps it: fields and settings side by side."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return {**own, **self.call}

    @property
    def size(self) -> ClipSize:
        return ClipSize(*(getattr(self.settings, name) for name in SIZES))

    @property
    def call(self) -> dict[str, Any]:
        """The settings that the request has, in JSON's types."""
        return {**self.size.options, **msgspec.to_builtins(self.settings.given)}

    @property
    def batch_key(self) -> str:
        """Requests of the same key can be denoised together."""
        return repr((sorted(self.call.items()), self.loras))


def no_input(param: str) -> Problem:
    """400 for an image or a video."""
    return wrong(
        param,
        f"{param} is an image or video input, and this server turns text into video alone; leave"
        " it out.",
        "unsupported_input",
    )


def check_fields(body: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """A body's fields that have a value.

    Raises:
        Problem: no object, an input of another kind, or a field that is not known.
    """
    if not isinstance(body, dict):
        raise Problem(
            400, "invalid_body", "the body is no object; expected fields such as prompt and size."
        )
    for name in body:
        if name in INPUTS and body[name] is not None:
            raise no_input(name)
        if name not in known and name not in INPUTS:
            raise unknown_parameter(name, f"some of {', '.join(known)}")
    return {k: v for k, v in body.items() if v is not None and k not in INPUTS}


def check_prompt(value: Any, name: str = "prompt") -> str:
    """A prompt of 1 to 32,000 characters.

    Raises:
        Problem: none, empty, too long, or no text.
    """
    if value is None:
        raise wrong(
            name, f"{name} is missing; say what the video should show.", "missing_parameter"
        )
    if not isinstance(value, str):
        raise unexpected(name, value, "text")
    if not value.strip():
        raise wrong(name, f"{name} is empty; say what the video should show.")
    if len(value) > MAX_PROMPT:
        raise wrong(
            name,
            f"{name} has {len(value)} characters; expected at most {MAX_PROMPT}.",
            "string_too_long",
        )
    return _unicode(name, value)


def _unicode(name: str, value: str) -> str:
    try:
        whole_text = b"\0" not in value.encode()
    except UnicodeEncodeError:  # halves of surrogate pairs
        whole_text = False
    if not whole_text:
        raise wrong(name, f"{name} holds characters that are no text; send it as UTF-8.")
    return value


def _text(body: dict[str, Any], name: str) -> str | None:
    """A text that may be left out; an empty one counts as left out, as forms send it."""
    value = body.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > MAX_PROMPT:
        raise unexpected(name, value, "text")
    return _unicode(name, value)


def _checked(name: str, check: Any, *arguments: Any) -> Any:
    """A check's value; its `InputError` as the answer to the field."""
    try:
        return check(*arguments)
    except InputError as error:
        raise wrong(name, str(error)) from error


def _seconds(value: Any, rate: Fraction, temporal: int) -> tuple[str, int]:
    """`seconds` as it is answered, and the frames that last nearest to it, `temporal` k + 1."""
    seconds = math.nan
    if isinstance(value, str):
        seconds = float(value) if SECONDS.fullmatch(value) else math.nan
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(min(value, 1e9))
    if not 0 < seconds <= 3600:
        raise unexpected("seconds", value, "a number such as '5'")
    frames = float(seconds * rate)
    count = max(0, round((frames - 1) / temporal)) * temporal + 1
    return (value.strip() if isinstance(value, str) else f"{seconds:g}"), count


def _loras(value: Any, known: list[str], generators: tuple[str, ...]) -> tuple[str, ...]:
    """`lora`: names of the configured folder, "NAME", "NAME@SCALE" or "small:NAME@SCALE"."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or len(several) > 16:
        raise unexpected("lora", value, "a name, or a list of names")
    made = []
    for one in several:
        match = LORA.fullmatch(one) if isinstance(one, str) else None
        if match is None or match[2] not in known:
            names = ", ".join(known[:20]) or "none: the server has no --lora-dir"
            raise wrong(
                "lora",
                f"lora {shown(one)} is none of this server's; expected NAME or NAME@SCALE"
                f" of {names}.",
                "lora_not_found",
            )
        generator = match[1] or ("large" if "large" in generators else generators[0])
        if generator not in generators:
            raise wrong("lora", f"lora {one!r} is of a generator that is not loaded.")
        made.append(f"{generator}:{match[2]}@{_plain(float(match[3] or 1))}")
    return tuple(made)


def _plain(scale: float) -> str:
    """All digits that a LoRA's scale may have, without an exponent."""
    return f"{scale:.6f}".rstrip("0").rstrip(".")


def _setting(field: Field, value: Any, max_steps: int) -> Any:
    """A setting of a body as a call takes it; None for an empty text, which counts as left out.

    Raises:
        Problem: of another type than JSON's for it, outside its range, or too many steps.
    """
    name = field.name
    if name == "rewrite":  # a text like a prompt
        return check_prompt(value, name)
    if field.kind in (str, "any"):
        value = _text({name: value}, name)
    elif field.kind is int:
        value = _checked(name, whole, name, value, -1, MAX_SEED)
    elif field.kind == "numbers":
        check_steps(name, len(value) if isinstance(value, list) else 0, max_steps)
        value = _numbers(name, value)
    elif field.kind == "scale" and isinstance(value, list):
        value = _numbers(name, value) if len(value) == 2 else value  # `checked` refuses others
    elif field.kind in (float, "scale"):
        value = _number(name, value)
    elif field.nested and not isinstance(value, dict):
        known = ", ".join(field.kind.__struct_fields__)
        raise unexpected(name, value, f"an object of some of {known}")
    if value is None:
        return None
    if field.high == MAX_STEPS:
        check_steps(name, value, max_steps)
    if name == "plan":  # before a plan of so many steps is made
        for count in (*map(int, STEPS.findall(value)), value.count(",")):  # "," of noise levels
            check_steps(name, count, max_steps)
    return _checked(name, field.checked, value)


def _number(name: str, value: Any) -> float:
    return _checked(name, number, name, value, -MAX_NUMBER, MAX_NUMBER)


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise unexpected(name, value, "a list of numbers")
    return tuple(_number(name, one) for one in value)


def check_steps(name: str, count: int, max_steps: int) -> None:
    """Raise a `Problem` where a field asks for more steps than the server takes."""
    if count > max_steps:
        raise wrong(name, f"{name} has {count} steps; this server takes at most {max_steps}.")


@dataclass(frozen=True)
class RequestLimits:
    """What a request is read against, of the server and of its pair.

    models: names that may be asked for. pair: its defaults, its grid, its generators. loras: names.
        fps: where a request says nothing. deadline, max_size, max_steps: the most that may be
        asked.
    """

    models: tuple[str, ...]
    pair: PairProfile
    loras: list[str]
    fps: str
    deadline: float
    max_size: ClipSize
    max_steps: int


def read_create(body: Any, known: RequestLimits) -> ClipRequest:
    """The request of a `POST /v1/videos` body; whether the models make such a clip is asked of
    `Profile.check`.

    Raises:
        Problem: 400 with the field at fault; 404 for a model that is not served.
    """
    body = check_fields(body, field_names())
    prompt = check_prompt(body.get("prompt"))
    model = _text(body, "model") or known.models[0]
    if model not in known.models:
        raise Problem(
            404,
            "model_not_found",
            f"model {shown(model)} is not served here; expected {', '.join(known.models)},"
            " or leave it out.",
            "model",
        )
    rate = _checked("fps", frame_rate, body.get("fps", known.fps))
    for name, low, high in (("seed", -1, MAX_SEED), ("priority", *PRIORITIES)):
        if name in body:
            body[name] = _checked(name, whole, name, body[name], low, high)
    if "deadline" in body:
        body["deadline"] = _number("deadline", body["deadline"])
        _checked("deadline", number, "deadline", body["deadline"], 1.0, known.deadline)
    seconds, size = _clip_size(body, rate, known)
    call = {
        name: _setting(field, body[name], known.max_steps)
        for name, field in settings.fields(SERVER).items()
        if name in body
    }
    return ClipRequest(
        prompt=prompt,
        model=model,
        settings=settings.CallSettings.of({**call, **size.options}),
        fps=str(rate.numerator) if rate.denominator == 1 else str(rate),
        seconds=seconds,
        seed=secrets.randbits(32) if body.get("seed", -1) == -1 else body["seed"],
        negative_prompt=_text(body, "negative_prompt"),
        loras=_loras(body["lora"], known.loras, known.pair.generators) if "lora" in body else (),
        priority=body.get("priority", 0),
        deadline=body.get("deadline"),
    )


def _clip_size(body: dict[str, Any], rate: Fraction, known: RequestLimits) -> tuple[str, ClipSize]:
    """A body's seconds as they are answered, and its size, each the pair's own where it says
    nothing.

    Raises:
        Problem: two fields for one length, a size that the models do not make, or one too large.
    """
    width, height, frames = ClipSize.of_defaults(known.pair.defaults)
    if "seconds" in body and "num_frames" in body:
        raise wrong(
            "seconds", "seconds and num_frames both say how long; leave one of the two out."
        )
    if "seconds" in body:
        seconds, frames = _seconds(body["seconds"], rate, known.pair.grid.time)
    else:
        frames = body.get("num_frames", frames)
        frames = _checked("num_frames", whole, "num_frames", frames, -1, MAX_SEED)
        seconds = f"{frames / float(rate):g}"
    if "size" in body:
        if not isinstance(body["size"], str):
            raise unexpected("size", body["size"], "such as '832x480'")
        width, height = _checked("size", parse_sides, body["size"])
    if width * height * max(1, frames) > math.prod(known.max_size):
        raise wrong(
            "size",
            f"{width}x{height} with {frames} frames is more than this server makes; expected at"
            f" most the pixels of {known.max_size}.",
            "clip_too_large",
        )
    size = ClipSize(width, height, frames)
    try:
        known.pair.grid.check(size)
        for name, value in size.options.items():
            settings.fields()[name].checked(value)
    except InputError as error:
        raise wrong(SENT_AS.get(error.param or "", error.param), str(error)) from error
    return seconds, size


def read_remix(body: Any, source: ClipRequest) -> ClipRequest:
    """The request of a `POST /v1/videos/{id}/remix` body: the source's, with another prompt.

    Raises:
        Problem: 400 with the field at fault.
    """
    prompt = check_prompt(check_fields(body, ("prompt",)).get("prompt"))
    call = source.settings
    if call.rewrite not in (None, "auto", "off"):  # a text that says the other prompt
        call = call.replace(rewrite=None)
    return replace(source, prompt=prompt, settings=call)
