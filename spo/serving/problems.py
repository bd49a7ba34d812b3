"""What a client is told when a request cannot be answered: OpenAI's error shape and a status."""

from __future__ import annotations

from typing import Any


class _Problem(Exception):
    """Ends a request with a status; not an `SpoError`, since nothing is wrong with the server."""


class Problem(_Problem):
    """A refusal in OpenAI's shape.

    Args:
        status: HTTP status.
        code: short machine-readable cause, e.g. "model_not_found".
        message: for people: what was expected, what came, what to do.
        retry_after_s: seconds after which asking again makes sense.
    """

    def __init__(
        self, status: int, code: str, message: str, *, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers
