"""Errors as HTTP answers them, in OpenAI's shape: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from nexus_rt.core.errors import MAX_MESSAGE_CHARS, shorten, shown

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
INTERNAL_ERROR = ("internal_error", "the server failed; its log says why.")  # code and message


def printable(text: str) -> str:
    """A message that UTF-8 can carry, and no longer than one."""
    return text[:MAX_MESSAGE_CHARS].encode("utf-8", "backslashreplace").decode()


class Problem(Exception):
    """A request that is not served.

    status: HTTP's. code: for programs. param: the field at fault. retry_after: seconds after which
        the same request may be served.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, printable(message)
        self.param = None if param is None else printable(param)
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": "server_error" if self.status >= 500 else kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class JobFailed(Exception):
    """A job that ended without a clip; code: what clients branch on, such as "cancelled"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, printable(message)


class WorkerLost(Exception):
    """The process that ran a job is gone; the job can be begun again."""


def wrong(param: str | None, message: str, code: str = "invalid_value") -> Problem:
    """400 for a field; message: "PARAM is ...; expected ..."."""
    return Problem(400, code, message, param)


def unexpected(param: str, value: Any, expected: str) -> Problem:
    """400 for a field of another value than the expected one."""
    return wrong(param, f"{param} is {shown(value)}; expected {expected}.")


def unknown_parameter(name: str, known: str) -> Problem:
    """400 for a field that there is not; known: those that there are, in words."""
    return wrong(
        shorten(name, 80),
        f"unknown parameter {shown(name)}; expected {known}.",
        "unknown_parameter",
    )


def no_video(video_id: str) -> Problem:
    """404 for an id that is not there, or is another key's."""
    return Problem(
        404, "video_not_found", f"there is no video {video_id[:80]!r}; it may have expired."
    )
