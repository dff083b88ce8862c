"""What clients ask for: the body of `POST /v1/videos`, resolved and checked before it is queued.

The fields of OpenAI's API, and those that NexusRT has besides; whatever else is sent is refused by
name. A form's texts become the types of JSON first, so that both are checked alike.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from nexus_rt.checks import number, whole
from nexus_rt.errors import InputError, shorten, shown
from nexus_rt.serve.problems import Problem, unknown_parameter, wrong
from nexus_rt.size import ClipSize, parse_sides
from nexus_rt.video import frame_rate

MAX_PROMPT = 32_000  # characters, OpenAI's limit
PRIORITIES = (-10, 10)
WHOLE = ("num_frames", "seed", "num_inference_steps", "priority")
NUMBERS = ("guidance_scale", "guidance_scale_2", "shift", "deadline")
TEXTS = ("prompt", "model", "negative_prompt", "plan", "solver", "rewrite")
FIELDS = (*TEXTS, *WHOLE, *NUMBERS, "seconds", "size", "fps", "lora")
STEPS = re.compile(r"(?:\b(?:small|large|bridge):|/|\bsteps=)([0-9]{1,9})")  # in a plan's text
CALL = ("plan", "num_inference_steps", "guidance_scale", "guidance_scale_2", "shift", "solver")
INPUTS = ("input_reference", "image", "image_url", "video", "input_image", "characters")
SECONDS = re.compile(r"\s*[0-9]{1,9}(\.[0-9]{1,9})?\s*")
LORA = re.compile(r"(?:(small|large):)?([\w.-]{1,200}?)(?:@(-?\d{1,3}(?:\.\d{1,6})?))?")


@dataclass(frozen=True)
class ClipRequest:
    """A job: everything that decides what its clip is, and when it runs.

    seconds: as it is answered. plan: words, None for the pair's own. loras: "small:NAME@SCALE" or
        "large:NAME@SCALE".
    """

    prompt: str
    model: str
    width: int
    height: int
    num_frames: int
    fps: str
    seconds: str
    seed: int
    negative_prompt: str | None = None
    plan: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    shift: float | None = None
    solver: str | None = None
    rewrite: str | None = None
    loras: tuple[str, ...] = ()
    priority: int = 0
    deadline: float | None = None

    @classmethod
    def stored(cls, row: Mapping[str, Any]) -> ClipRequest:
        """A request as the store keeps it."""
        return cls(**{**row, "loras": tuple(row["loras"])})

    def as_row(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def size(self) -> ClipSize:
        return ClipSize(self.width, self.height, self.num_frames)

    @property
    def options(self) -> dict[str, Any]:
        """Of the pipeline's call, for every sample of a batch alike."""
        call = {n: v for n in CALL if (v := getattr(self, n)) is not None}
        return {**self.size.options, **call}

    @property
    def batch_key(self) -> str:
        """Requests of the same key can be denoised together."""
        return repr((sorted(self.options.items()), self.loras, self.rewrite))


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
    """A form's text as the number that a field wants, or as it is for the checks to refuse."""
    kind = int if name in WHOLE else float if name in NUMBERS else None
    if kind is None or len(text) > 40:
        return text
    try:
        return kind(text)
    except ValueError:
        return text


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
        raise wrong(name, f"{name} is {shown(value)}; expected text.")
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
        raise wrong(name, f"{name} is {shown(value)}; expected text.")
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
        raise wrong("seconds", f"seconds is {shown(value)}; expected a number such as '5'.")
    frames = float(seconds * rate)
    count = max(0, round((frames - 1) / temporal)) * temporal + 1
    return (value.strip() if isinstance(value, str) else f"{seconds:g}"), count


def _loras(value: Any, known: list[str], generators: tuple[str, ...]) -> tuple[str, ...]:
    """`lora`: names of the configured folder, "NAME", "NAME@SCALE" or "small:NAME@SCALE"."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or len(several) > 16:
        raise wrong("lora", f"lora is {shown(value)}; expected a name, or a list of names.")
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


@dataclass(frozen=True)
class RequestLimits:
    """What a request is read against, of the server and of its pair.

    models: names that may be asked for. defaults: the pair's `Defaults`. temporal: frames a latent
        frame. generators: those that are loaded. loras: names. fps: where a request says nothing.
        deadline, max_size, max_steps: the most that may be asked.
    """

    models: tuple[str, ...]
    defaults: Any
    temporal: int
    generators: tuple[str, ...]
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
    body = check_fields(body, FIELDS)
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
    fps = str(rate.numerator) if rate.denominator == 1 else str(rate)
    for name in WHOLE:
        if name in body:
            low, high = PRIORITIES if name == "priority" else (-1, 2**64 - 1)
            body[name] = _checked(name, whole, name, body[name], low, high)
    for name in NUMBERS:
        if name in body:
            body[name] = _checked(name, number, name, body[name], -1e9, 1e9)
    plan = _text(body, "plan")
    counts = [("num_inference_steps", body.get("num_inference_steps", 0))]
    counts += [("plan", int(digits)) for digits in STEPS.findall(plan or "")]
    counts += [("plan", (plan or "").count(","))]  # of listed noise levels
    for name, count in counts:  # before a plan of so many steps is made
        if count > known.max_steps:
            raise wrong(
                name, f"{name} has {count} steps; this server takes at most {known.max_steps}."
            )
    if "deadline" in body:
        _checked("deadline", number, "deadline", body["deadline"], 1.0, known.deadline)
    if "seconds" in body and "num_frames" in body:
        raise wrong(
            "seconds", "seconds and num_frames both say how long; leave one of the two out."
        )
    if "seconds" in body:
        seconds, frames = _seconds(body["seconds"], rate, known.temporal)
    else:
        frames = body.get("num_frames", known.defaults.num_frames)
        seconds = f"{frames / float(rate):g}"
    width, height = known.defaults.width, known.defaults.height
    if "size" in body:
        if not isinstance(body["size"], str):
            raise wrong("size", f"size is {shown(body['size'])}; expected such as '832x480'.")
        width, height = _checked("size", parse_sides, body["size"])
    if width * height * max(1, frames) > math.prod(known.max_size):
        raise wrong(
            "size",
            f"{width}x{height} with {frames} frames is more than this server makes; expected at"
            f" most the pixels of {known.max_size}.",
            "clip_too_large",
        )
    return ClipRequest(
        prompt=prompt,
        model=model,
        width=width,
        height=height,
        num_frames=frames,
        fps=fps,
        seconds=seconds,
        seed=secrets.randbits(32) if body.get("seed", -1) == -1 else body["seed"],
        negative_prompt=_text(body, "negative_prompt"),
        plan=plan,
        num_inference_steps=body.get("num_inference_steps"),
        guidance_scale=body.get("guidance_scale"),
        guidance_scale_2=body.get("guidance_scale_2"),
        shift=body.get("shift"),
        solver=_text(body, "solver"),
        rewrite=check_prompt(body["rewrite"], "rewrite") if "rewrite" in body else None,
        loras=_loras(body["lora"], known.loras, known.generators) if "lora" in body else (),
        priority=body.get("priority", 0),
        deadline=body.get("deadline"),
    )


def read_remix(body: Any, source: ClipRequest) -> ClipRequest:
    """The request of a `POST /v1/videos/{id}/remix` body: the source's, with another prompt.

    Raises:
        Problem: 400 with the field at fault.
    """
    fields = check_fields(body, ("prompt",))
    rewrite = source.rewrite if source.rewrite in (None, "auto", "off") else None
    return replace(source, prompt=check_prompt(fields.get("prompt")), rewrite=rewrite)
