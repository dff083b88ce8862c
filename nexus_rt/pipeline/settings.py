"""A call's settings, written down once.

`CallSettings` has a field for each. From it come the keywords of `NexusPipeline.__call__`, a pair's
`Defaults`, the command line's options, the fields of prompt lists and of the server's requests,
the metadata of a clip and the JSON schema. A new setting is one field here and the code that uses
it. Prompts, tensors and callbacks are arguments of the call beside the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from nexus_rt.core.checks import instance
from nexus_rt.core.errors import InputError, UnknownArgument, shown
from nexus_rt.core.fields import (
    GENERATE,
    LIST,
    REWRITING,
    SERVER,
    Field,
    described,
    fields_of,
    object_schema,
)
from nexus_rt.core.limits import (
    GAMMA_W,
    GENERATORS,
    GUIDANCE_SCALE,
    MAX_FRAMES,
    MAX_GAMMA_W,
    MAX_GUIDANCE,
    MAX_SEQUENCE_LENGTH,
    MAX_SHIFT,
    MAX_SIDE,
    MAX_STEPS,
    MAX_TIMEOUT,
    MAX_VIDEOS,
    MIN_GAMMA_W,
    MIN_SHIFT,
    MIN_TIMEOUT,
    PLAN,
    REWRITE_TIMEOUT,
    Scale,
)
from nexus_rt.method.blend_config import BlendConfig

if TYPE_CHECKING:
    from typing_extensions import Self

GUIDANCE_SETTINGS = {"small": "guidance_scale", "large": "guidance_scale_2"}


def is_off(rewrite: Any) -> bool:
    """Whether a call's `rewrite` is the word for none."""
    return isinstance(rewrite, str) and rewrite == "off"


class CallSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a call, by the names of diffusers' `WanPipeline` where it has them.

    None is the pair's own value (`Defaults`).

    Raises:
        InputError: a value of another type, or outside its range.
    """

    height: Annotated[
        int | None,
        described(
            "height of the frames", 1, MAX_SIDE, unit="pixels", default=480, pair=True, fronts=()
        ),
    ] = None
    width: Annotated[
        int | None,
        described(
            "width of the frames", 1, MAX_SIDE, unit="pixels", default=832, pair=True, fronts=()
        ),
    ] = None
    num_frames: Annotated[
        int | None,
        described(
            "number of frames, 4k+1",
            1,
            MAX_FRAMES,
            flag="frames",
            metavar="N",
            default=81,
            pair=True,
        ),
    ] = None
    num_inference_steps: Annotated[
        int | None,
        described(
            "denoising steps of both generators",
            1,
            MAX_STEPS,
            flag="steps",
            metavar="N",
            default=50,
            pair=True,
        ),
    ] = None
    guidance_scale: Annotated[
        Scale | None,
        described(
            "guidance scale of the small generator, and of the large one unless that has its own:"
            " v_u + G (v_c - v_u); 1 is no guidance; HIGH,LOW are those of two experts",
            -MAX_GUIDANCE,
            MAX_GUIDANCE,
            flag="guidance",
            metavar="G",
            default=GUIDANCE_SCALE,
            pair=True,
        ),
    ] = None
    guidance_scale_2: Annotated[
        Scale | None,
        described(
            "guidance scale of the large generator (default: the pair's, else the small one's)",
            -MAX_GUIDANCE,
            MAX_GUIDANCE,
            flag="guidance_2",
            metavar="G",
            pair=True,
        ),
    ] = None
    num_videos_per_prompt: Annotated[
        int, described("videos of each prompt", 1, MAX_VIDEOS, fronts=())
    ] = 1
    output_type: Annotated[
        Literal["np", "pt", "pil", "latent"],
        described("type of the frames: np, pt, pil, or latent for undecoded latents", fronts=()),
    ] = "np"
    max_sequence_length: Annotated[
        int,
        described(
            "tokens of a prompt that the text encoder reads", 1, MAX_SEQUENCE_LENGTH, fronts=()
        ),
    ] = MAX_SEQUENCE_LENGTH
    plan: Annotated[
        Any,
        described(
            "plan: which generator runs at which step",
            metavar="PLAN",
            default=PLAN,
            pair=True,
        ),
    ] = None
    shift: Annotated[
        float | None,
        described(
            "shift of the time grid; 3.0 suits small frames",
            MIN_SHIFT,
            MAX_SHIFT,
            default=5.0,
            pair=True,
        ),
    ] = None
    blend: Annotated[BlendConfig | None, described("frequency split of the blend")] = None
    energy: Annotated[
        Literal["none", "reference", "progressive"] | None,
        described("energy rule of the blend, instead of the plan's"),
    ] = None
    gamma_w: Annotated[
        float | None,
        described(
            f"exponent of the gate in the plans reference and auto (Wan: {GAMMA_W})",
            MIN_GAMMA_W,
            MAX_GAMMA_W,
        ),
    ] = None
    solver: Annotated[
        Literal["unipc", "euler", "lcm"] | None,
        described("solver of every step (Wan: unipc); lcm draws noise anew at each", pair=True),
    ] = None
    as_published: Annotated[
        bool,
        described(
            "defaults and numerics of the published scripts: plan reference, 50 steps, shift 5,"
            " guidance 6 (their s = 5)"
        ),
    ] = False
    rewrite: Annotated[
        Any,
        described(
            "text that the large generator reads instead of the prompt: auto (the understanding"
            " model's answer), off, or a text of your own (default: the pair's)",
            metavar="TEXT",
            pair=True,
            fronts=(REWRITING, LIST, SERVER),
        ),
    ] = None
    rewrite_timeout: Annotated[
        float,
        described(
            "time for rewriting, after which the prompt is kept",
            MIN_TIMEOUT,
            MAX_TIMEOUT,
            metavar="S",
            unit="seconds",
            fronts=(REWRITING,),
        ),
    ] = REWRITE_TIMEOUT
    reuse_parity: Annotated[
        bool,
        described(
            "compute what the plan reuses as well, and report the error of every reused step",
            fronts=(GENERATE,),
        ),
    ] = False
    timesteps: Annotated[
        tuple[float, ...] | None,
        described(
            "timesteps to walk, before the shift, falling, such as 999,750,500,250",
            metavar="T,T,...",
        ),
    ] = None
    small_steps: Annotated[
        int | None,
        described(
            "steps of the small generator's whole schedule, where it has one of its own",
            1,
            MAX_STEPS,
            metavar="N",
            pair=True,
        ),
    ] = None
    large_steps: Annotated[
        int | None,
        described(
            "steps of the large generator's whole schedule, where it has one of its own",
            1,
            MAX_STEPS,
            metavar="N",
            pair=True,
        ),
    ] = None

    def __post_init__(self) -> None:
        for field in fields_of(type(self)).values():
            value = getattr(self, field.name)
            if value is not None or not field.optional:
                msgspec.structs.force_setattr(self, field.name, field.checked(value))

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """The settings among a call's arguments by name."""
        return cls(**{n: v for n, v in arguments.items() if n in cls.__struct_fields__})

    @classmethod
    def named(cls, call: str, arguments: Mapping[str, Any]) -> Self:
        """Settings by name, for a call that takes nothing else.

        Raises:
            UnknownArgument: a name that is no setting.
        """
        for name in arguments:
            if name not in cls.__struct_fields__:
                raise UnknownArgument(
                    f"{call} has no argument {shown(name)}: expected settings of a call, such as"
                    " shift.",
                    param=name,
                )
        return cls(**arguments)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not a call's default, by name."""
        defaults = dict(zip(self.__struct_fields__, self.__struct_defaults__, strict=True))
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        same = lambda a, b: a is b or (type(a) is type(b) and a == b)
        return {n: v for n, v in values.items() if not same(v, defaults[n])}

    @property
    def rewrites(self) -> bool:
        """Whether a text is asked for that the large generator reads instead of the prompt."""
        return self.rewrite is not None and not is_off(self.rewrite)

    def for_prompts(self, count: int) -> Self:
        """The settings of a call of several prompts, where the time for rewriting is a prompt's."""
        return self.replace(rewrite_timeout=min(MAX_TIMEOUT, count * self.rewrite_timeout))

    def replace(self, **changes: Any) -> Self:
        """The same with other values."""
        return msgspec.structs.replace(self, **changes)


class Defaults(CallSettings, frozen=True, kw_only=True):
    """The settings that a pair uses where a call says nothing.

    A pair's `model_index.json` may set them under "defaults"; a generator's
    `scheduler/scheduler_config.json` sets shift and solver below that. A few-step generator has a
    schedule of its own (`nexus_rt.pipeline.recipes`): its shift, its timesteps before the shift,
    its solver.
    """

    small_shift: Annotated[
        float | None,
        described("shift of the small generator's grid", MIN_SHIFT, MAX_SHIFT, fronts=()),
    ] = None
    large_shift: Annotated[
        float | None,
        described("shift of the large generator's grid", MIN_SHIFT, MAX_SHIFT, fronts=()),
    ] = None
    small_timesteps: Annotated[
        tuple[float, ...] | None, described("timesteps of the small generator alone", fronts=())
    ] = None
    large_timesteps: Annotated[
        tuple[float, ...] | None, described("timesteps of the large generator alone", fronts=())
    ] = None
    small_solver: Annotated[
        Literal["unipc", "euler", "lcm"] | None,
        described("solver of the small generator's steps", fronts=()),
    ] = None
    large_solver: Annotated[
        Literal["unipc", "euler", "lcm"] | None,
        described("solver of the large generator's steps", fronts=()),
    ] = None

    def __post_init__(self) -> None:
        for field in fields_of(type(self)).values():
            if getattr(self, field.name) is None and field.default is not None:
                msgspec.structs.force_setattr(self, field.name, field.default)
        super().__post_init__()
        instance("plan", self.plan, str, "a plan's text")
        others = [n for n in self.given if n not in self.names()]
        if others:
            raise InputError(
                f"a pair cannot set {others[0]}; expected some of {', '.join(self.names())}.",
                code="unknown_name",
                param=others[0],
            )

    @classmethod
    def names(cls) -> list[str]:
        """The settings that a pair may have, and those of its generators' schedules."""
        own = [n for n in cls.__struct_fields__ if n not in CallSettings.__struct_fields__]
        return [*(n for n, f in fields_of(cls).items() if f.pair), *own]

    def own(self, name: str) -> dict[str, Any]:
        """What each generator has of its own: "steps", "shift", "timesteps" or "solver"."""
        values = {g: getattr(self, f"{g}_{name}") for g in GENERATORS}
        return {g: v for g, v in values.items() if v is not None}


def fields(front: str | None = None) -> dict[str, Field]:
    """The settings by name, in the call's order: all, or those of one front."""
    every = fields_of(CallSettings)
    return {n: f for n, f in every.items() if front is None or front in f.fronts}


def json_schema(front: str | None = None) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the settings, of one front's or all."""
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, "title": "CallSettings", **object_schema(fields(front).values())}
