"""What goes wrong with a request, and how it is said over HTTP: OpenAI's error object and a status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leanvlm.runtime.errors import (
    ContextOverflowError,
    InputError,
    LeanVLMError,
    QueueFullError,
    ShuttingDownError,
    TimeLimitError,
)
from leanvlm.runtime.records import shorten

INVALID, SERVER = "invalid_request_error", "server_error"
# An answer of the built-in model takes less, one of a large model some more: clients ask again until there is a place.
RETRY_SECONDS = 2


class RequestError(InputError):
    """A request that cannot be answered as it is.

    Args:
        message: One line.
        param: The field that is wrong, such as `messages[0].content`.
        code: A word for programs.
        status: HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


@dataclass(frozen=True)
class Problem:
    """An error as a client sees it.

    Attributes:
        status: HTTP status.
        message: One line.
        kind: OpenAI's `type`.
        param: The field that is wrong.
        code: A word for programs.
        headers: Of the response.
    """

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        error = {"message": shorten(self.message), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


# Of the first that fits; status, type and code.
KINDS: dict[type[LeanVLMError], tuple[int, str, str | None]] = {
    QueueFullError: (503, SERVER, "queue_full"),
    ShuttingDownError: (503, SERVER, "shutting_down"),
    TimeLimitError: (504, SERVER, "time_limit"),
    ContextOverflowError: (400, INVALID, "context_length_exceeded"),
    InputError: (400, INVALID, None),
}


def problem_of(error: Exception) -> Problem:
    """Return how an error is said; of one that is not the client's the details stay here, since they may name files."""
    if isinstance(error, RequestError):
        # The rest of a body that was not read is not waited for.
        headers = {"connection": "close"} if error.status in (408, 413) else {}
        return Problem(error.status, str(error), param=error.param, code=error.code, headers=headers)
    for kind, (status, word, code) in KINDS.items():
        if isinstance(error, kind):
            headers = {"retry-after": str(RETRY_SECONDS)} if status == 503 else {}
            return Problem(status, str(error), word, code=code, headers=headers)
    return Problem(500, "the request failed; the server's log says why", SERVER)
