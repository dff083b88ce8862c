"""The old name of the command line's parser (`nexus_rt.cli`); it goes with the next release."""

import warnings

from nexus_rt.cli import parser

__all__ = ["parser"]

warnings.warn(
    "nexus_rt.arguments.parser is now nexus_rt.cli.parser; import from there.",
    DeprecationWarning,
    stacklevel=2,
)
