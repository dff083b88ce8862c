"""Who may use the server: pages and programs by Host and Origin, clients by their API key."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import Request

from nexus_rt.core.errors import shown
from nexus_rt.serve.problems import Problem
from nexus_rt.serve.settings import Settings, is_loopback


def bearer(authorization: str) -> str | None:
    """The key of an Authorization header; None where it is of another scheme."""
    kind, _, key = authorization.partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


def check_origin(request: Request) -> None:
    """A server without keys answers programs of this machine, and no page of another site that a
    browser of this machine shows.

    Raises:
        Problem: 403.
    """
    host = request.headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        raise Problem(
            403,
            "host_not_allowed",
            f"host {shown(host)} is not this machine's; without API keys the server answers"
            " localhost alone.",
        )
    origin = request.headers.get("origin")
    own = {f"{scheme}://{host}".lower() for scheme in ("http", "https")}
    if origin is not None and origin.lower() not in own:
        raise Problem(403, "origin_not_allowed", "pages of other sites may not use this server.")


def owner_of(request: Request, settings: Settings) -> str:
    """The name of the queue that a request belongs to.

    Raises:
        Problem: 401; no key, or a wrong one.
    """
    owner = settings.owner(bearer(request.headers.get("authorization", "")))
    if owner is None:
        raise Problem(
            401,
            "invalid_api_key",
            "no API key, or a wrong one; send Authorization: Bearer KEY.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return owner
