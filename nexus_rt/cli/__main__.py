"""`python -m nexus_rt.cli`."""

from nexus_rt.cli import entry

entry()
