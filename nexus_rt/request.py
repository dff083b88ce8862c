"""What a call asks for, resolved against a pair's defaults and checked before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import Tensor

from nexus_rt.checks import callback_tensors, number, switch, whole
from nexus_rt.errors import InputError, choose, shorten, shown
from nexus_rt.guidance import Guidance
from nexus_rt.latents import Generators
from nexus_rt.plan import (
    GAMMA_W,
    GENERATORS,
    MAX_GAMMA_W,
    MAX_GUIDANCE,
    MIN_GAMMA_W,
    Plan,
    Scale,
)
from nexus_rt.plan_text import parse_plan, scaled, with_own_steps, with_shifts
from nexus_rt.plan_words import SCHEDULE, base_name, has_clocks, has_schedule, real, split_words
from nexus_rt.prompts import MAX_FRAMES
from nexus_rt.size import ClipSize
from nexus_rt.solver import (
    MAX_SHIFT,
    MAX_STEPS,
    MIN_SHIFT,
    SOLVERS,
    TimeGrid,
    listed_grid,
    time_grid,
)
from nexus_rt.upfb import BlendConfig

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
MAX_VIDEOS, MAX_SIDE = 256, 16_384
TIMEOUT = 60.0  # seconds for rewriting all prompts of a call


@dataclass(frozen=True)
class Schedule:
    """A call's own words on steps.

    timesteps: the list to walk, before the shift. small_steps, large_steps: of the generators'
    whole schedules, of which a plan gives each a share.
    """

    timesteps: Sequence[float] | None = None
    small_steps: int | None = None
    large_steps: int | None = None

    def __post_init__(self) -> None:
        timesteps = self.timesteps
        if timesteps is None:
            return
        try:
            listed = [float(t) for t in islice(timesteps, MAX_STEPS + 1)]
        except Exception:  # no list, or what its items raise
            listed = None
        if listed is None or isinstance(timesteps, (str, bytes)):
            raise InputError(
                f"timesteps are {shown(timesteps)}; expected a descending list of numbers, such as"
                " [1000, 750, 500, 250]."
            )
        object.__setattr__(self, "timesteps", tuple(listed))


@dataclass(frozen=True)
class GenerationRequest:
    """A call's settings; every field is a valid value.

    published: the published scripts' numerics (float64 timesteps, float32 residual stream, pixels
        by truncation).
    reuse_parity: compute reused steps as well, and report their errors.
    """

    size: ClipSize
    plan: Plan
    guidance: Guidance
    blend: BlendConfig
    solver: str
    output_type: str
    videos_per_prompt: int = 1
    published: bool = False
    reuse_parity: bool = False


@dataclass(frozen=True)
class CallInputs:
    """What a call computes from: prompts or embeddings, noise, and the callback. Shapes are checked
    against the request later.

    embeds: the texts and the two contexts under the call's own names, None for those to be made of
        the prompt.
    rewrite, rewrite_timeout: what the large generator reads instead of the prompt, and the seconds
        for finding it (`nexus_rt.rewriting`).
    tensors: names of what the callback is given.
    """

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    embeds: dict[str, Tensor | None]
    latents: Tensor | None
    generator: Generators
    callback: Callable[..., Any] | None
    tensors: Sequence[str]
    max_sequence_length: int
    rewrite: Any = None
    rewrite_timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        number("rewrite_timeout", self.rewrite_timeout, 1e-3, 1e6)
        object.__setattr__(self, "tensors", callback_tensors(self.callback, self.tensors))


# Of the published inference scripts: s = 5.0 of v_c + s (v_c - v_u) is g = 6.0, both generators at
# every step.
PUBLISHED: dict[str, Any] = {
    "plan": "reference",
    "num_inference_steps": 50,
    "guidance_scale": 6.0,
    "shift": 5.0,
    "gamma_w": 0.3,
    "solver": "unipc",
    "blend": BlendConfig(split="gaussian", gamma_hf=0.7, sigma_min=0.35, sigma_max=0.7),
}


def make_plan(
    defaults: Any,
    plan: str | Plan | None = None,
    num_inference_steps: int | None = None,
    shift: float | None = None,
    energy: str | None = None,
    gamma_w: float | None = None,
    published: bool = False,
    schedule: Schedule = Schedule(),
) -> Plan:
    """The plan that these arguments mean for a pair with such `Defaults`; None is the pair's own,
    or the published.

    Raises:
        InputError: an unknown plan, numbers outside their range, arguments that say different
            numbers of steps, gamma_w for a plan without the gate, or an argument that the plan's
            text sets to another value.
    """
    if energy is not None and not isinstance(energy, str):
        raise InputError(f"energy is {shown(energy)}; expected a name.")
    if isinstance(plan, Plan):
        given = {"num_inference_steps": num_inference_steps, "shift": shift, "gamma_w": gamma_w}
        given |= vars(schedule)
        if extra := [name for name, value in given.items() if value is not None]:
            raise InputError(
                f"{extra[0]} is the plan's own where a Plan is passed; make the plan with it."
            )
        return plan.with_energy(energy)
    if plan is not None and not isinstance(plan, str):
        raise InputError(
            f"plan is {shown(plan)}; expected a Plan, or its words, such as 'handoff=0.3'."
        )
    own = vars(defaults) if not published else {**vars(defaults), **PUBLISHED}
    steps = own["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    steps = whole("num_inference_steps", steps, 1, MAX_STEPS)
    scale = own["shift"] if shift is None else shift
    number("shift", scale, MIN_SHIFT, MAX_SHIFT)
    words = own["plan"] if plan is None else plan
    _check_options(words, num_inference_steps, shift, energy, gamma_w)
    if published and words.strip() != "reference":
        raise InputError(
            f"plan {shorten(words, 80)!r} is not as published: both generators run at every step"
            f" there;"
            " leave it out."
        )
    if gamma_w is not None:
        number("gamma_w", gamma_w, MIN_GAMMA_W, MAX_GAMMA_W)
        if base_name(words) not in ("reference", "auto"):
            raise InputError(
                f"gamma_w shapes the gate, and plan {shorten(words, 80)!r} has none; use"
                f" 'reference' or"
                " 'auto'."
            )
    asked = num_inference_steps is not None
    if published and schedule != Schedule():
        raise InputError(
            "timesteps, small_steps and large_steps are not as published: leave them or"
            " as_published out."
        )
    own_schedule = None
    if not published:
        shifts = _own(defaults, "shift") if shift is None else {}  # the call's goes before them
        own_schedule = _few_steps(defaults, words, asked, scale, shifts, schedule)
    if own_schedule is not None:
        words, grid = own_schedule
    else:
        if has_clocks(words) and asked:
            words = _with_steps(words, steps, own_plan=plan is None)
        grid = time_grid(steps, scale, float64_timesteps=published)
    made = parse_plan(words, grid, GAMMA_W if gamma_w is None else gamma_w).with_energy(energy)
    return made if published else made.with_solvers(_own(defaults, "solver"))


def _check_options(
    words: str,
    num_inference_steps: int | None,
    shift: float | None,
    energy: str | None,
    gamma_w: float | None,
) -> None:
    """Raise where a plan's text sets an option to another value than the call."""
    options = split_words(words)[1]
    sigmas = options.get("sigmas", "").count(",")
    if sigmas and num_inference_steps not in (None, sigmas):
        raise InputError(
            f"num_inference_steps is {num_inference_steps}, and plan {shorten(words, 80)!r} has"
            f" {sigmas} steps; leave one of the two out."
        )
    for name, key, value in (
        ("num_inference_steps", "steps", num_inference_steps),
        ("shift", "shift", shift),
        ("gamma_w", "gamma-w", gamma_w),
    ):
        if value is not None and key in options and real(options[key], key) != value:
            raise InputError(
                f"{name} is {shorten(value, 40)}, and plan {shorten(words, 80)!r} sets {key}="
                f"{shorten(options[key], 40)}; leave one of the two out."
            )
    if energy is not None and options.get("energy", energy) != energy:
        raise InputError(
            f"energy is {shorten(energy, 40)!r}, and plan {shorten(words, 80)!r} sets"
            f" {shorten(options['energy'], 40)!r}; leave one of the two out."
        )


def with_solver(plan: Plan, solver: str | None, default: str) -> Plan:
    """A plan as a call's solver walks it (`Plan.walked_by`), or the default one where the call
    names none.

    Raises:
        InputError: as `Plan.walked_by`, or the call names a solver, and each step has another.
    """
    if solver is not None and not any(s.solver in (None, solver) for s in plan.steps):
        raise InputError(
            f"solver is {solver!r}, and plan {shorten(plan.name, 120)!r} sets another at every"
            f" step;"
            " leave one of the two out."
        )
    return plan.walked_by(default if solver is None else solver)


def default_solver(defaults: Any) -> str:
    """What walks a call's steps where it names no solver: a pair's own, else "unipc"."""
    own: str | None = defaults.solver
    return own or str(PUBLISHED["solver"])


def for_solver(defaults: Any, solver: str | None) -> Any:
    """A pair's `Defaults` where a call names a solver: it goes before what a generator was
    distilled for."""
    return defaults if solver is None else replace(defaults, small_solver=None, large_solver=None)


def _own(defaults: Any, name: str) -> dict[str, Any]:
    """What each generator of a pair has of its own: "steps", "shift", "timesteps" or "solver"."""
    values = {g: getattr(defaults, f"{g}_{name}", None) for g in ("small", "large")}
    return {g: v for g, v in values.items() if v is not None}


def _few_steps(
    defaults: Any,
    words: str,
    asked: bool,
    shift: float,
    shifts: dict[str, float],
    schedule: Schedule,
) -> tuple[str, TimeGrid] | None:
    """Words and grid of a plan whose generators have schedules of their own: a list of timesteps,
    or numbers of steps; None where the plan has one schedule for all.

    Args:
        asked: whether a number of steps for all is given. shifts: of the generators that have one
            of their own.
    """
    base, options = split_words(words)
    if schedule.timesteps is not None:
        own = schedule.small_steps is not None or schedule.large_steps is not None
        if has_clocks(words) or own or options.keys() & set(SCHEDULE):
            raise InputError(
                "timesteps are one schedule for both generators; pass a plan without clocks or a"
                " schedule of its own, and neither small_steps nor large_steps."
            )
        if asked:
            raise InputError(
                f"timesteps are {len(schedule.timesteps)} steps; leave num_inference_steps out."
            )
        return words, listed_grid(schedule.timesteps, shift)
    given = {"small": schedule.small_steps, "large": schedule.large_steps}
    for name, value in given.items():
        if value is not None:
            whole(f"{name}_steps", value, 1, MAX_STEPS)
            if asked:
                raise InputError(
                    f"num_inference_steps is for both generators and {name}_steps for one; leave"
                    " one of the two out."
                )
    explicit = any(given.values())
    if has_schedule(words) and not explicit:
        return None
    if "shift" in options:
        shift, shifts = real(options["shift"], "shift"), {}
    lone = base if base in GENERATORS else None
    if lone is not None and not explicit and not asked and "shift" not in options:
        timesteps = _own(defaults, "timesteps").get(lone)
        if timesteps is not None:
            return words, listed_grid(timesteps, shifts.get(lone, shift))
    steps = {g: given[g] if explicit else _own(defaults, "steps").get(g) for g in given}
    if not has_clocks(words) and (explicit or (not asked and any(steps.values()))):
        grid = time_grid(defaults.num_inference_steps, shift)
        runs = parse_plan(words, grid).generators
        for name in given:  # a recipe of a generator that the plan does not run has no part in it
            if not explicit and name not in runs:
                steps[name] = None
        if explicit or any(steps.values()):
            words = with_own_steps(words, grid, steps["small"], steps["large"])
    elif explicit:
        words = with_own_steps(words, time_grid(1, shift), steps["small"], steps["large"])
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
            f" steps, {total} in all; leave one of the two out."
        )
    return words


def make_guidance(
    defaults: Any, guidance_scale: Scale | None, guidance_scale_2: Scale | None, published: bool
) -> Guidance:
    """The guidance scales that these arguments mean for a pair with such `Defaults`; None is the
    pair's own, or the published.

    Raises:
        InputError: a scale outside its range.
    """
    for name, value in (("guidance_scale", guidance_scale), ("guidance_scale_2", guidance_scale_2)):
        if isinstance(value, tuple) and len(value) != 2:
            raise InputError(
                f"{name} has {len(value)} numbers; expected one, or two: of the expert for high"
                " noise and of the one for low."
            )
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                number(name, one, -MAX_GUIDANCE, MAX_GUIDANCE)
    if published and guidance_scale is None:
        guidance_scale = PUBLISHED["guidance_scale"]
    return Guidance.of_call(defaults, guidance_scale, guidance_scale_2)


def make_request(
    defaults: Any,
    *,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    plan: str | Plan | None,
    num_inference_steps: int | None,
    shift: float | None,
    energy: str | None,
    gamma_w: float | None,
    guidance_scale: Scale | None,
    guidance_scale_2: Scale | None,
    blend: BlendConfig | None,
    solver: str | None,
    output_type: str,
    num_videos_per_prompt: int,
    published: bool,
    reuse_parity: bool = False,
    timesteps: Sequence[float] | None = None,
    small_steps: int | None = None,
    large_steps: int | None = None,
) -> GenerationRequest:
    """A call's arguments against a pair's `Defaults`.

    Raises:
        InputError: names the argument, what it was and what is expected.
    """
    d = defaults
    switch("as_published", published)
    own = for_solver(d, solver)
    schedule = Schedule(timesteps, small_steps, large_steps)
    choose("output_type", output_type, OUTPUT_TYPES)
    default = str(PUBLISHED["solver"]) if published else default_solver(d)
    choose("solver", default if solver is None else solver, SOLVERS)
    if blend is not None and not isinstance(blend, BlendConfig):
        raise InputError(f"blend is {shown(blend)}; expected a BlendConfig.")
    size = ClipSize(  # which multiples the sides are of, the pair's VAE says
        whole("width", d.width if width is None else width, 1, MAX_SIDE),
        whole("height", d.height if height is None else height, 1, MAX_SIDE),
        whole(
            "num_frames",
            d.num_frames if num_frames is None else num_frames,
            1,
            MAX_FRAMES,
        ),
    )
    return GenerationRequest(
        size,
        with_solver(
            make_plan(own, plan, num_inference_steps, shift, energy, gamma_w, published, schedule),
            solver,
            default,
        ),
        make_guidance(d, guidance_scale, guidance_scale_2, published),
        blend if blend is not None else PUBLISHED["blend"] if published else BlendConfig(),
        default if solver is None else solver,
        output_type,
        whole("num_videos_per_prompt", num_videos_per_prompt, 1, MAX_VIDEOS),
        published,
        switch("reuse_parity", reuse_parity),
    )
