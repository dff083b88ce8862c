"""Errors by code: what a test expects of a refusal, whatever its words."""

from __future__ import annotations

from typing import Any

import pytest

from nexus_rt.core.errors import CODES, NexusError


def refuses(code: str, param: str | None = None, kind: type[NexusError] = NexusError) -> Any:
    """A context that expects a `NexusError` of a code, and of a parameter where one is named."""
    assert code in CODES, f"{code} is no code of nexus_rt.core.errors"

    def same(error: BaseException) -> bool:
        assert isinstance(error, NexusError)
        assert error.code == code, f"code {error.code!r} instead of {code!r}: {error}"
        assert param is None or error.param == param, f"param {error.param!r}: {error}"
        return True

    return pytest.raises(kind, check=same)
