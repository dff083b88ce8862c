"""More cases of what the default run shows: CI and `pytest -m ""` run them too."""

import pytest
from hypothesis import HealthCheck, given, settings


def more(*cases):
    """Cases of one parameter, marked `exhaustive`."""
    return [pytest.param(case, marks=pytest.mark.exhaustive) for case in cases]


def cases(few, many, *strategies):
    """`given`, with `few` examples; the group `exhaustive` tries `many`."""

    def decorated(test):
        @pytest.mark.parametrize("examples", [few, *more(many)])
        def run(examples):
            kept = settings(
                max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck)
            )
            kept(given(*strategies)(test))()

        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        return run

    return decorated
