"""Who may ask: by the key that a request carries, and the host that it names."""

from __future__ import annotations

import hmac
import re
import stat
import warnings
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leanvlm.runtime.errors import InputError, LeanVLMWarning
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.metrics import Metrics
from leanvlm.runtime.serving.problems import Problem
from leanvlm.runtime.serving.replies import to_json

MAX_KEY = 4096
OPEN = frozenset({"/health", "/health/ready"})
"""Paths that want no key, beside those of the page, which asks for it."""
COUNTED = OPEN | {"/v1/chat/completions", "/v1/models", "/metrics"}
"""Paths that are counted by name, beside those of the page; others together, since anyone may ask for any."""
HEADERS = [(b"x-content-type-options", b"nosniff")]


def read_key(path: Path) -> bytes:
    """Read the key that clients must send.

    Raises:
        InputError: The file cannot be read, is empty, or holds what no header can.
    """
    try:
        with path.open("rb") as file:
            key = file.read(MAX_KEY + 1).strip()
            readable = stat.S_IMODE(path.stat().st_mode) & 0o077
    except OSError as error:
        raise InputError(f"the key file {path} cannot be read: {error.strerror or error}") from error
    if not key:
        raise InputError(f"the key file {path} is empty; write a key of letters and digits into it")
    if len(key) > MAX_KEY or not re.fullmatch(rb"[!-~]+", key):
        raise InputError(f"the key file {path} holds no key: one word of letters and digits, {MAX_KEY} at most")
    if readable:
        warnings.warn(f"the key file {path} can be read by others: chmod 600 {path}", LeanVLMWarning, stacklevel=1)
    return key


class Access:
    """Who may ask: who has the key, and names a host that this is.

    A page of another site can make a browser ask this machine by a name that it lets point here (DNS rebinding); the
    browser then names that site as the host.

    Args:
        config: Of the server.
        key: That clients must send; None wants none.
        page: Paths that want none either.
    """

    def __init__(self, config: ServeConfig, key: bytes | None, page: frozenset[str]) -> None:
        self._open = OPEN | page
        self._key = key
        hosts = {"localhost", "127.0.0.1", "[::1]", config.host.lower(), f"[{config.host.lower()}]"}
        self._hosts = hosts if config.loopback else None

    def refused(self, scope: Scope) -> Problem | None:
        """Return why a request is refused, by its head alone; None lets it in."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        headers = dict(scope["headers"])
        return _ambiguous(scope, headers) or self._unwanted(path, headers)

    def _unwanted(self, path: str, headers: dict[bytes, bytes]) -> Problem | None:
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1").lower())
        if self._hosts is not None and host not in self._hosts:
            message = "this server answers only to the name of this machine itself; start it with --host for others"
            return Problem(403, message, code="host_not_allowed")
        if self._key is None or path in self._open:
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key):
            return None
        message = "the key is missing or wrong; send it as Authorization: Bearer KEY"
        return Problem(
            401, message, code="invalid_api_key", kind="authentication_error", headers={"www-authenticate": "Bearer"}
        )


class Guard:
    """Wraps the application: refuses who may not ask, and counts requests by status."""

    def __init__(self, app: ASGIApp, config: ServeConfig, key: bytes | None, metrics: Metrics, page: frozenset[str]) -> None:
        self._app = app
        self._access = Access(config, key, page)
        self._counted = COUNTED | page
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path if path in self._counted else "other", message["status"]).inc()
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        problem = self._access.refused(scope)
        if problem is None:
            await self._app(scope, receive, counted)
        else:
            await respond(problem)(scope, receive, counted)


def _ambiguous(scope: Scope, headers: dict[bytes, bytes]) -> Problem | None:
    """Refuse a request whose end a proxy may see elsewhere than h11, which lets Transfer-Encoding win (RFC 9112, 6.1)."""
    if b"transfer-encoding" in headers and (b"content-length" in headers or scope.get("http_version") == "1.0"):
        message = "a request has a Content-Length or is chunked, not both"
        return Problem(400, message, code="ambiguous_length", headers={"connection": "close"})
    return None


def respond(problem: Problem) -> Response:
    """Return the response that says what is wrong."""
    return Response(to_json(problem.body), problem.status, dict(problem.headers), "application/json")
