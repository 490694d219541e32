"""What goes wrong with a request, as OpenAI's API says it: a status and a body of one form.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Routes raise `RequestError`, or let the engine's own errors through; `describe` makes the one of the
other. Called by `app.py` for answers and by `stream.py` for events of a stream that has begun.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from cyclewise.engine.request import SamplingParams
from cyclewise.errors import (
    ContextLengthError,
    CyclewiseError,
    DeadlineError,
    EngineError,
    InvalidParameterError,
    OverloadedError,
    TemplateError,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
}
_PARAMETERS = [each.name for each in fields(SamplingParams)] + ["priority"]


class RequestError(CyclewiseError):
    """A request that is not answered, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """param  the field of the request that is wrong, like `messages[0].content`
        code   a word for programs
        """
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """What the client is told."""
        kind = _TYPES.get(self.status, "server_error")
        message = str(self)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A request that is wrong in itself."""
    return RequestError(400, message, param=param, code=code)


def describe(error: BaseException, param: str | None = None) -> RequestError:
    """Any error as one of a request.

    param  the field that it is about where the error does not say
    """
    match error:
        case RequestError():
            return error
        case OverloadedError():
            headers = {"retry-after": str(max(1, round(error.retry_after)))}
            return RequestError(429, str(error), code="rate_limit_exceeded", headers=headers)
        case ContextLengthError():
            return bad(str(error), param, "context_length_exceeded")
        case InvalidParameterError():
            first = str(error).partition(" ")[0]  # a parameter's name, as a rule
            return bad(str(error), param or (first if first in _PARAMETERS else None))
        case TemplateError():
            return bad(str(error), param or "messages")
        case DeadlineError():
            return RequestError(408, str(error), param="timeout", code="timeout")
        case EngineError():
            return RequestError(503, str(error), code="engine_unavailable")
        case _:
            return RequestError(500, "the server failed to answer; its log says more")
