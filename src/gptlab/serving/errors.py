"""What a client is told when it does not get what it asked for, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """An answer other than the one asked for.

    Attributes:
        status: of HTTP.
        message: one sentence.
        param: the part of the request that is to blame, or None.
        code: OpenAI's word for it, or None.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent, as JSON."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def busy(most: int) -> Refusal:
    """Say that there are as many texts as the server takes."""
    return Refusal(
        429,
        f"the server is continuing or holding {most} texts, as many as it takes; try again later",
        code="rate_limit_exceeded",
    )


def stopping() -> Refusal:
    """Say that the server is about to end."""
    return Refusal(503, "the server is shutting down", code="shutting_down")
