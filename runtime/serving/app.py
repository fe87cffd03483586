"""The HTTP application: OpenAI's chat endpoint over a session, and what watches it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from leanvlm.runtime.errors import LeanVLMError
from leanvlm.runtime.serving.access import Guard, read_key, respond
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.exchange import answer
from leanvlm.runtime.serving.metrics import CONTENT_TYPE
from leanvlm.runtime.serving.problems import SERVER, Problem, RequestError, problem_of
from leanvlm.runtime.serving.replies import to_json
from leanvlm.runtime.serving.runners import Runner, open_runner
from leanvlm.runtime.serving.service import Service, page_files
from leanvlm.runtime.session import Session

# The page is from here alone, and may show what the user drops on it and sees with the camera.
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob: mediastream:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {"content-security-policy": CONTENT_POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
# FastAPI sends traces where the environment says so; nothing leaves this machine. Older versions do not know the word.
QUIET = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
# Some programs look whether a path is there before they read it.
READ = ["GET", "HEAD"]
_log = logging.getLogger(__name__)


def create_app(session: Session, config: ServeConfig | None = None, runner: Runner | None = None) -> FastAPI:
    """Make the application that serves a session; whoever runs it (uvicorn, Ray Serve) runs its lifespan too.

    Args:
        session: Stays the caller's, who closes it behind the application's end.
        config: How it is served; a host that is not this machine's own is asked by any name.
        runner: How answers advance; None is as the configuration says.

    Raises:
        InputError: The key's file cannot be used, or the budget or the rows are not the bundle's.
    """
    config = config or ServeConfig()
    key = read_key(config.api_key_file) if config.api_key_file else None
    service = Service(session, config, runner or open_runner(session, config.rows, config.context))
    page = page_files()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.warm_up()
        yield
        await asyncio.to_thread(service.stop)

    extra: dict[str, Any] = {"telemetry": QUIET}
    # Its own pages of documentation come from other hosts.
    app = FastAPI(title="LeanVLM", openapi_url=None, redirect_slashes=False, lifespan=lifespan, **extra)
    app.state.service = service
    app.add_middleware(Guard, config=config, key=key, metrics=service.metrics, page=frozenset(page))
    _add_errors(app)
    _add_watching(app, service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        return await answer(service, request)

    @app.api_route("/v1/models", methods=READ, response_model=None)
    async def models() -> Response:
        return Response(to_json(service.models()), media_type="application/json")

    @app.api_route("/v1/models/{name}", methods=READ, response_model=None)
    async def model(name: str) -> Response:
        if name != service.name:
            raise RequestError(
                f"the model {name!r} is not here; this server has {service.name!r}", None, "model_not_found", 404
            )
        return Response(to_json(service.models()["data"][0]), media_type="application/json")

    @app.api_route("/{name}", methods=READ, response_model=None)
    async def file(name: str) -> Response:
        return _file(page, f"/{name}")

    @app.api_route("/", methods=READ, response_model=None)
    async def index() -> Response:
        return _file(page, "/")

    return app


def _file(page: dict[str, tuple[bytes, str]], path: str) -> Response:
    if path not in page:
        raise HTTPException(404)
    content, kind = page[path]
    return Response(content, media_type=kind, headers=PAGE_HEADERS)


def _add_watching(app: FastAPI, service: Service) -> None:
    """Add what programs ask that start, stop and watch the server."""

    @app.api_route("/health", methods=READ, response_model=None)
    async def health() -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    @app.api_route("/health/ready", methods=READ, response_model=None)
    async def ready() -> Response:
        if service.ready and service.engine.alive:
            return Response(b'{"status":"ready"}', media_type="application/json")
        return respond(Problem(503, "the server is loading or shutting down", SERVER, headers={"retry-after": "1"}))

    @app.api_route("/metrics", methods=READ, response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _add_errors(app: FastAPI) -> None:
    """Say every error in OpenAI's shape."""

    @app.exception_handler(LeanVLMError)
    async def known(request: Request, error: LeanVLMError) -> Response:
        problem = problem_of(error)
        if problem.status == 500:
            _log.error("a request failed: %s", error)
        return respond(problem)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        words = {404: "there is nothing at this path", 405: "this path takes another method"}
        return respond(Problem(error.status_code, words.get(error.status_code, str(error.detail)), headers=error.headers or {}))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return respond(problem_of(error))
