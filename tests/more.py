"""More cases of what the default run shows: CI and `pytest -m ""` run them too."""

import pytest


def more(*cases):
    """Cases of one parameter, marked `exhaustive`."""
    return [pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]
