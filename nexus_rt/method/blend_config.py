"""How velocities are split into bands and shared: the settings of the blend."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from nexus_rt.core.errors import InputError
from nexus_rt.core.fields import described, fields_of

MIN_WIDTH, MAX_WIDTH, MAX_ORDER = 1e-6, 1e6, 100  # of sigma and rho, and of Butterworth's order


class BlendConfig(msgspec.Struct, frozen=True):
    """How velocities are split and shared.

    `gaussian` is the published split; `fft` (circular) and `dct` (even reflection) are the
    progressive handoff. All low-passes have gain 1/sqrt(2) at their cutoff; the ideal one drops
    from 1 to 0 there.
    """

    split: Annotated[
        Literal["gaussian", "fft", "dct"], described("frequency split; gaussian is the paper's")
    ] = "gaussian"
    lowpass: Annotated[
        Literal["gaussian", "butterworth", "ideal"], described("low-pass of fft and dct")
    ] = "gaussian"
    order: Annotated[int, described("order of the Butterworth low-pass", 1, MAX_ORDER)] = 2
    gamma_hf: Annotated[
        float, described("small generator's share of the high frequencies", 0.0, 1.0)
    ] = 0.7
    sigma_min: Annotated[
        float,
        described("width of the gaussian filter at w = 0, in latent cells", MIN_WIDTH, MAX_WIDTH),
    ] = 0.35
    sigma_max: Annotated[
        float,
        described("width of the gaussian filter at w = 1, in latent cells", MIN_WIDTH, MAX_WIDTH),
    ] = 0.7
    rho_min: Annotated[
        float,
        described("cutoff of fft and dct at w = 0, as a fraction of Nyquist", MIN_WIDTH, MAX_WIDTH),
    ] = 0.1
    rho_max: Annotated[
        float,
        described("cutoff of fft and dct at w = 1, as a fraction of Nyquist", MIN_WIDTH, MAX_WIDTH),
    ] = 0.9

    def __post_init__(self) -> None:
        for field in fields_of(type(self)).values():
            value = field.checked(getattr(self, field.name))
            msgspec.structs.force_setattr(self, field.name, value)
        for low, high in (("sigma_min", "sigma_max"), ("rho_min", "rho_max")):
            if getattr(self, low) > getattr(self, high):
                raise InputError(
                    f"{low} is {getattr(self, low)} and {high} {getattr(self, high)}; expected"
                    f" {low} <= {high}.",
                    code="out_of_range",
                    param=low,
                )

    def sigma(self, w: float) -> float:
        """Standard deviation of the Gaussian at weight w, in latent cells."""
        return self.sigma_min + (self.sigma_max - self.sigma_min) * w

    def cutoff(self, w: float) -> float:
        """Cutoff of the fft and dct splits at weight w, as a fraction of Nyquist; it closes as the
        handoff proceeds."""
        return self.rho_min + (self.rho_max - self.rho_min) * w
