"""What a diffusers folder says of its schedule: `scheduler/scheduler_config.json`, and which class
its `model_index.json` reads it by.

The shift and the solver become a pair's defaults. What would make other noise levels or other
predictions than are computed here is refused; where another solver walks the same schedule, a
warning says that ours does. docs/checkpoints.md has the table.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_rt.core.checks import number
from nexus_rt.core.documents import parse, read_bytes
from nexus_rt.core.errors import InputError, ModelError, shorten, shown
from nexus_rt.core.limits import TRAIN_STEPS
from nexus_rt.loading.config import read_optional, warn_unread

MAX_SHIFT = 1000.0
# diffusers' class -> its name of the shift, and our solver; None where ours is another one
CLASSES: dict[str, tuple[str, str | None]] = {
    "UniPCMultistepScheduler": ("flow_shift", "unipc"),
    "FlowMatchEulerDiscreteScheduler": ("shift", "euler"),
    "FlowMatchLCMScheduler": ("shift", "lcm"),
    "FlowMatchHeunDiscreteScheduler": ("shift", None),
    "DPMSolverMultistepScheduler": ("flow_shift", None),
    "DPMSolverSinglestepScheduler": ("flow_shift", None),
    "DEISMultistepScheduler": ("flow_shift", None),
    "SASolverScheduler": ("flow_shift", None),
}
STOCHASTIC = "stochastic_sampling"  # of the Euler class: noise drawn anew at every step, our "lcm"
# Fields that decide noise levels or what a prediction is -> their value in a Wan. Absent fields
# have it too.
FIXED: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": TRAIN_STEPS,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "scale_factors": None,
    "thresholding": False,
}
# Fields of UniPC that decide how the same schedule is walked -> their values in our solver.
WALK: dict[str, Any] = {
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "disable_corrector": [],
    "solver_p": None,
}
# Fields that diffusers' classes do not read under flow sigmas, or only beside those of `FIXED`.
UNREAD = {
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "sigma_min",
    "sigma_max",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "upscale_mode",
}
# Of the classes whose solver is not ours: a warning names the class.
OTHER_WALKS = {
    "algorithm_type",
    "euler_at_final",
    "lambda_min_clipped",
    "variance_type",
    "predictor_order",
    "corrector_order",
    "tau_func",
}


@dataclass(frozen=True)
class Scheduler:
    """What a folder's scheduler means here.

    shift: of the noise levels. solver: of `nexus_rt.method.solver.SOLVERS`. where: its file.
    """

    shift: float
    solver: str
    where: Path


def find_scheduler(folder: Path) -> Scheduler | None:
    """The scheduler of a pipeline's folder in diffusers' layout; None where it has none.

    Raises:
        ModelError: a schedule or a kind of prediction that is not computed here; names the field.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return None
    # diffusers writes -Infinity, which is no JSON, for a field that is not read here
    text = re.sub(rb":\s*-Infinity\b", b": null", read_bytes(path))
    config = parse(text, str(path), remedy="download the folder again")
    if not isinstance(config, dict):
        raise ModelError(
            f"{path} holds a {type(config).__name__}; expected a JSON object.", code="invalid_type"
        )
    return read_scheduler(config, _class_of(folder), path)


def _class_of(folder: Path) -> str | None:
    """The scheduler's class in a folder's `model_index.json`, by which diffusers reads it."""
    entry = read_optional(folder / "model_index.json").get("scheduler")
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        return entry[1]
    return None


def read_scheduler(config: Mapping[str, Any], class_name: str | None, where: Path) -> Scheduler:
    """A scheduler's config as diffusers' class would take it.

    Args:
        class_name: where it is not the config's own `_class_name`.

    Raises:
        ModelError: as `find_scheduler`.
    """
    kind = class_name or config.get("_class_name")
    out = (
        "To run its weights on Wan's own schedule, pass the folder's transformer/ as the generator,"
        " and vae= and text_encoder= beside it."
    )
    if not isinstance(kind, str) or kind not in CLASSES:
        raise ModelError(
            f"{where} is of a {shorten(str(kind), 80)}; expected one of {', '.join(CLASSES)}."
            f" {out}",
            code="unsupported",
            param="_class_name",
        )
    name, solver = CLASSES[kind]
    for field, wanted in FIXED.items():
        value = config.get(field, wanted)
        if value != wanted and (value or wanted):
            raise ModelError(
                f"{where} sets {field}={shown(value)}; only {wanted!r} is computed here. {out}",
                code="unsupported",
                param=field,
            )
    shift = config.get(name, 1.0)  # as the classes have it
    try:
        number(f"{where}: {name}", shift, 1e-3, MAX_SHIFT)
    except InputError as error:
        raise ModelError(str(error), code=error.code, param=name) from None
    differs = []
    if solver is None:
        differs.append(f"its class is {kind}")
    elif solver == "unipc":
        differs = [
            f"{field} is {shown(config[field])}"
            for field, ours in WALK.items()
            if config.get(field, ours) != ours
        ]
    elif solver == "euler" and config.get(STOCHASTIC):
        solver = "lcm"
    if differs:
        warnings.warn(
            f"{where}: {', '.join(differs)}; here solver 'unipc' (order 2, bh2) walks the same"
            " schedule.",
            stacklevel=2,
        )
    warn_unread(config, {name, STOCHASTIC, *FIXED, *WALK, *UNREAD, *OTHER_WALKS}, where)
    return Scheduler(float(shift), solver or "unipc", where)


def first_scheduler(
    schedulers: Sequence[Scheduler | None], own: Collection[str] = ()
) -> Scheduler | None:
    """The scheduler that counts of those of a pair's folders, the large generator's first; where
    they differ, a warning says so.

    Args:
        own: fields that the pair itself sets, which go before.
    """
    known = [s for s in schedulers if s is not None]
    for other in known[1:]:
        first = known[0]
        differs = [
            f"{f} {getattr(first, f)} and {getattr(other, f)}"
            for f in ("shift", "solver")
            if f not in own and getattr(first, f) != getattr(other, f)
        ]
        if differs:
            warnings.warn(
                f"{first.where} and {other.where} differ ({', '.join(differs)}); the first counts"
                " for both generators: pass shift= and solver= to set others.",
                stacklevel=2,
            )
    return known[0] if known else None
