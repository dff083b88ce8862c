"""The old name of `nexus_rt.cli.options`; it goes with the next release."""

import warnings

from nexus_rt.cli.options import TABLE, Rule, check_options, given_options

__all__ = ["TABLE", "Rule", "check_options", "given_options"]

warnings.warn(
    "nexus_rt.options is now nexus_rt.cli.options; import from there.",
    DeprecationWarning,
    stacklevel=2,
)
