"""The old name of `nexus_rt.sampling` and `nexus_rt.step_runners`; it goes with the next
release."""

import warnings

from nexus_rt.guidance import GUIDANCE_SCALE
from nexus_rt.sampling import denoise
from nexus_rt.step_runners import CallbackResult, Generator, Prompt
from nexus_rt.step_runners import FiniteCheck as Watch

__all__ = ["GUIDANCE_SCALE", "CallbackResult", "Generator", "Prompt", "Watch", "denoise"]

warnings.warn(
    "nexus_rt.denoise is now nexus_rt.sampling (denoise) and nexus_rt.step_runners (Prompt,"
    " Change); import from there.",
    DeprecationWarning,
    stacklevel=2,
)
