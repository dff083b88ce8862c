"""A call's settings against a pair's own: what is generated, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nexus_rt.core.errors import InputError, shorten, shown
from nexus_rt.core.limits import GAMMA_W, GENERATORS
from nexus_rt.core.size import BuiltSizes, ClipSize
from nexus_rt.method.blend_config import BlendConfig
from nexus_rt.method.guidance import Guidance
from nexus_rt.method.latents import LatentGrid
from nexus_rt.method.plan import Plan
from nexus_rt.method.plan_options import (
    SCHEDULE,
    base_name,
    has_clocks,
    has_schedule,
    real,
    split_words,
)
from nexus_rt.method.plan_scaling import scaled, with_own_steps, with_shifts
from nexus_rt.method.plan_text import parse_plan
from nexus_rt.method.solver import check_solver
from nexus_rt.method.time_grid import TimeGrid, listed_grid, time_grid
from nexus_rt.pipeline.settings import GUIDANCE_SETTINGS, CallSettings, Defaults

BLEND = BlendConfig()  # the published split
SOLVER = "unipc"  # Wan's, where neither the call nor the pair names one
PUBLISHED_PLAN = "reference"


@dataclass(frozen=True)
class GenerationRequest:
    """What a call generates; every field is a valid value.

    settings: the call's own, for what needs no resolving.
    """

    size: ClipSize
    plan: Plan
    guidance: Guidance
    blend: BlendConfig
    solver: str
    settings: CallSettings

    @property
    def published(self) -> bool:
        """Whether the published scripts' numerics are asked for (float64 timesteps, float32
        residual stream, pixels by truncation)."""
        return self.settings.as_published


@dataclass(frozen=True)
class PairProfile:
    """What requests are checked against, without the models: a pair's defaults, its grid, the
    generators that are loaded, the boundaries of those of two experts, the sizes that engines were
    built for, and whether an understanding model is there."""

    defaults: Defaults
    grid: LatentGrid
    generators: tuple[str, ...] = GENERATORS
    boundaries: Mapping[str, float] = field(default_factory=dict)
    built_sizes: tuple[BuiltSizes, ...] = ()
    understands: bool = True


def make_request(
    settings: CallSettings, defaults: Defaults, boundaries: Mapping[str, float] | None = None
) -> GenerationRequest:
    """A call's settings against a pair's defaults.

    boundaries: of the generators of two experts, by name.

    Raises:
        InputError: names the setting, what it was and what is expected.
    """
    s, own = settings, _pair(settings, defaults)
    default = own.solver or SOLVER
    size = ClipSize(*(_value(n, s, own) for n in ("width", "height", "num_frames")))
    # a solver of the call's goes before what a generator was distilled for
    lone = own if s.solver is None else own.replace(small_solver=None, large_solver=None)
    try:
        plan = _with_solver(make_plan(settings, lone), s.solver, default)
    except InputError as error:
        if error.param not in CallSettings.__struct_fields__:  # a word of the plan's text
            error.param = "plan"
        raise
    return GenerationRequest(
        size,
        plan.with_experts(boundaries or {}),
        make_guidance(settings, defaults),
        s.blend or BLEND,
        s.solver or default,
        settings,
    )


def check_request(request: GenerationRequest, pair: PairProfile) -> None:
    """Raise unless a pair's models can make what a request asks for.

    Raises:
        InputError: a size that the models do not make or engines were not built for, a generator
            that is not loaded, a schedule that the solver cannot walk, two scales for one
            transformer, or a rewrite that nothing reads.
    """
    check_size(request.size, pair)
    check_schedule(request)
    plan, settings = request.plan, request.settings
    if absent := [g for g in plan.generators if g not in pair.generators]:
        raise InputError(
            f"plan {plan.name!r} runs the {absent[0]} generator, which was not loaded; pass"
            f" {absent[0]}=.",
            code="missing",
            param="plan",
        )
    for name in plan.generators:
        if isinstance(scale := getattr(request.guidance, name), tuple) and (
            name not in pair.boundaries
        ):
            setting = GUIDANCE_SETTINGS[name]
            raise InputError(
                f"the {name} generator has one transformer and {setting} is {scale}, a scale for"
                " each of two experts; pass one number for it.",
                code="unsupported",
                param=setting,
            )
    if settings.rewrites and "large" not in plan.generators:
        raise InputError(
            f"rewrite is what the large generator reads, and plan {plan.name!r} does not run it;"
            " leave rewrite out, or pass another plan.",
            code="conflict",
            param="rewrite",
        )


def check_schedule(request: GenerationRequest) -> None:
    """Raise an `InputError` unless the request's solver can walk its plan."""
    try:
        check_solver(request.solver, request.plan.grid)
    except InputError as error:
        if request.settings.solver is None:
            error.param = "timesteps" if request.settings.timesteps is not None else "plan"
        raise


def check_size(size: ClipSize, pair: PairProfile) -> None:
    """Raise an `InputError` unless the models make clips of a size, and engines were built for
    it."""
    pair.grid.check(size)
    for built in pair.built_sizes:
        built.check(size)


def _value(name: str, settings: CallSettings, own: Defaults) -> Any:
    """A call's setting, or the pair's own where it says nothing."""
    value = getattr(settings, name)
    return getattr(own, name) if value is None else value


def _pair(settings: CallSettings, defaults: Defaults) -> Defaults:
    """The pair's defaults, or the published scripts' (Wan's own) but for the size."""
    if not settings.as_published:
        return defaults
    size = {n: getattr(defaults, n) for n in ("width", "height", "num_frames")}
    return Defaults.of({**size, "plan": PUBLISHED_PLAN, "solver": SOLVER})


def default_grid(defaults: Defaults, steps: int | None = None) -> TimeGrid:
    """A pair's time grid, or that of another number of steps under its shift."""
    own = CallSettings(num_inference_steps=steps)
    return time_grid(*(_value(n, own, defaults) for n in ("num_inference_steps", "shift")))


def make_guidance(settings: CallSettings, defaults: Defaults) -> Guidance:
    """The guidance scales of a call: a first scale that is given is both generators'."""
    own = _pair(settings, defaults)
    small, large = GUIDANCE_SETTINGS.values()
    if getattr(settings, small) is not None:
        first, second = getattr(settings, small), getattr(settings, large)
    else:
        first, second = getattr(own, small), _value(large, settings, own)
    return Guidance(first, first if second is None else second)


def make_plan(settings: CallSettings, defaults: Defaults) -> Plan:
    """The plan of a call; a setting that says nothing is the pair's own, or the published.

    Raises:
        InputError: an unknown plan, settings that say different numbers of steps, gamma_w for a
            plan without the gate, or a setting that the plan's text has otherwise.
    """
    s, own = settings, _pair(settings, defaults)
    if isinstance(s.plan, Plan):
        for name in ("num_inference_steps", "shift", "gamma_w", *SCHEDULES):
            if getattr(s, name) is not None:
                raise InputError(
                    f"{name} is the plan's own where a Plan is passed; make the plan with it.",
                    code="conflict",
                    param=name,
                )
        return s.plan.with_energy(s.energy)
    if s.plan is not None and not isinstance(s.plan, str):
        raise InputError(
            f"plan is {shown(s.plan)}; expected a Plan, or its words, such as 'handoff=0.3'.",
            code="invalid_type",
            param="plan",
        )
    words = _value("plan", s, own)
    _check_text(words, s)
    if s.as_published:
        _check_published(words, s)
    if s.gamma_w is not None and base_name(words) not in ("reference", "auto"):
        raise InputError(
            f"gamma_w shapes the gate, and plan {shorten(words, 80)!r} has none; use 'reference' or"
            " 'auto'.",
            code="conflict",
            param="gamma_w",
        )
    asked = s.num_inference_steps is not None
    steps, scale = _value("num_inference_steps", s, own), _value("shift", s, own)
    own_schedule = None if s.as_published else _few_steps(own, words, scale, s)
    if own_schedule is not None:
        words, grid = own_schedule
    else:
        if has_clocks(words) and asked:
            words = _with_steps(words, steps, own_plan=s.plan is None)
        grid = time_grid(steps, scale, float64_timesteps=s.as_published)
    gamma_w = GAMMA_W if s.gamma_w is None else s.gamma_w
    made = parse_plan(words, grid, gamma_w).with_energy(s.energy)
    return made if s.as_published else made.with_solvers(own.own("solver"))


SCHEDULES = ("timesteps", *(f"{g}_steps" for g in GENERATORS))  # settings of a schedule of its own


def _check_published(words: str, s: CallSettings) -> None:
    """Raise unless a plan is the published one, with the published schedule."""
    if words.strip() != PUBLISHED_PLAN:
        raise InputError(
            f"plan {shorten(words, 80)!r} is not as published: both generators run at every step"
            " there; leave it out.",
            code="conflict",
            param="plan",
        )
    if any(getattr(s, name) is not None for name in SCHEDULES):
        raise InputError(
            f"{', '.join(SCHEDULES[:-1])} and {SCHEDULES[-1]} are not as published: leave them or"
            " as_published out.",
            code="conflict",
            param="as_published",
        )


def _check_text(words: str, s: CallSettings) -> None:
    """Raise where a plan's text sets an option to another value than the call."""
    options = split_words(words)[1]
    sigmas = options.get("sigmas", "").count(",")
    steps = "num_inference_steps"
    if sigmas and getattr(s, steps) not in (None, sigmas):
        raise InputError(
            f"{steps} is {getattr(s, steps)}, and plan {shorten(words, 80)!r} has {sigmas} steps;"
            " leave one of the two out.",
            code="conflict",
            param=steps,
        )
    for name, key in ((steps, "steps"), ("shift", "shift"), ("gamma_w", "gamma-w")):
        value = getattr(s, name)
        if value is not None and key in options and real(options[key], key) != value:
            raise _conflict(name, f"{value:g}", words, f"{key}={shorten(options[key], 40)}")
    if s.energy is not None and options.get("energy", s.energy) != s.energy:
        raise _conflict("energy", repr(s.energy), words, repr(shorten(options["energy"], 40)))


def _conflict(name: str, value: str, words: str, other: str) -> InputError:
    """The error for a setting that a plan's text has otherwise."""
    return InputError(
        f"{name} is {value}, and plan {shorten(words, 80)!r} sets {other}; leave one of the two"
        " out.",
        code="conflict",
        param=name,
    )


def _with_solver(plan: Plan, solver: str | None, default: str) -> Plan:
    """A plan as a call's solver walks it (`Plan.walked_by`), or the default one where the call
    names none.

    Raises:
        InputError: as `Plan.walked_by`, or the call names a solver, and each step has another.
    """
    if solver is not None and not any(s.solver in (None, solver) for s in plan.steps):
        raise InputError(
            f"solver is {solver!r}, and plan {shorten(plan.name, 120)!r} sets another at every"
            " step; leave one of the two out.",
            code="conflict",
            param="solver",
        )
    return plan.walked_by(default if solver is None else solver)


def _few_steps(
    own: Defaults, words: str, shift: float, s: CallSettings
) -> tuple[str, TimeGrid] | None:
    """Words and grid of a plan whose generators have schedules of their own: a list of timesteps,
    or numbers of steps; None where the plan has one schedule for all."""
    base, options = split_words(words)
    asked = s.num_inference_steps is not None
    shifts = own.own("shift") if s.shift is None else {}  # the call's goes before them
    counts = {g: getattr(s, f"{g}_steps") for g in GENERATORS}
    explicit = any(counts.values())
    if s.timesteps is not None:
        if has_clocks(words) or explicit or options.keys() & set(SCHEDULE):
            raise InputError(
                "timesteps are one schedule for both generators; pass a plan without clocks or a"
                f" schedule of its own, and neither {SCHEDULES[1]} nor {SCHEDULES[2]}.",
                code="conflict",
                param="timesteps",
            )
        if asked:
            raise InputError(
                f"timesteps are {len(s.timesteps)} steps; leave num_inference_steps out.",
                code="conflict",
                param="num_inference_steps",
            )
        return words, listed_grid(s.timesteps, shift)
    if explicit and asked:
        name = next(f"{g}_steps" for g in GENERATORS if counts[g])
        raise InputError(
            f"num_inference_steps is for both generators and {name} for one; leave one of the two"
            " out.",
            code="conflict",
            param=name,
        )
    if has_schedule(words) and not explicit:
        return None
    if "shift" in options:
        shift, shifts = real(options["shift"], "shift"), {}
    lone = base if base in GENERATORS else None
    if lone is not None and not explicit and not asked and "shift" not in options:
        timesteps = own.own("timesteps").get(lone)
        if timesteps is not None:
            return words, listed_grid(timesteps, shifts.get(lone, shift))
    steps = {g: counts[g] if explicit else own.own("steps").get(g) for g in GENERATORS}
    if not has_clocks(words) and (explicit or (not asked and any(steps.values()))):
        grid = time_grid(own.num_inference_steps or 1, shift)
        runs = parse_plan(words, grid).generators
        for name in GENERATORS:  # a recipe of a generator that the plan does not run has no part
            if not explicit and name not in runs:
                steps[name] = None
        if explicit or any(steps.values()):
            words = with_own_steps(words, grid, *steps.values())
    elif explicit:
        words = with_own_steps(words, time_grid(1, shift), *steps.values())
    if has_clocks(words) and shifts and not asked:
        return with_shifts(words, shifts), time_grid(1, shift)
    return (words, time_grid(1, shift)) if explicit or (not asked and any(steps.values())) else None


def _with_steps(words: str, steps: int, own_plan: bool) -> str:
    """A plan with clocks where a number of steps is asked for too: the pair's own plan is scaled to
    it, a plan that was given must have it."""
    if own_plan:
        return scaled(words, steps)
    total = len(parse_plan(words, time_grid(1)))
    if total != steps:
        raise InputError(
            f"num_inference_steps is {steps}, and plan {shorten(words, 80)!r} says each generator's"
            f" steps, {total} in all; leave one of the two out.",
            code="conflict",
            param="num_inference_steps",
        )
    return words
