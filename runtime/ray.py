"""A Ray Serve application around the server's own: `run`, or `serve run leanvlm.runtime.ray:build bundle=FOLDER replicas=2`.

There are two deployments. `Model` opens the bundle and holds the application that `leanvlm serve` runs, so a replica answers as
that does. `Router` stands before it, since Ray gives a request that a dying replica had in hand back as an error: it
reads the request whole, and hands it to another replica.
"""

from __future__ import annotations

import asyncio
import logging
import typing
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leanvlm.runtime.errors import InputError, LeanVLMError, QueueFullError, ShuttingDownError
from leanvlm.runtime.optional import require
from leanvlm.runtime.serving.config import ServeConfig

# Of a request what the application reads; the rest cannot be sent to another process, or is of the connection.
SENT = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client",
    "server",
)  # fmt: skip
# Beyond what `max_queue` of all replicas and `max_held_mb` let in anyway.
ROUTER_REQUESTS = 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayConfig:
    """How a bundle is served on a cluster.

    Attributes:
        bundle: Its folder, under the same path on every machine.
        replicas: Copies of the model.
        max_replicas: Where it is given, there are from `replicas` to so many, as the load asks for.
        target_requests: Requests for each replica that are aimed at then.
        gpus: Of each replica.
        cpus: Likewise, which `threads` should not exceed.
        device: As `leanvlm.load` takes it.
        provider: Likewise.
        threads: Likewise.
        routers: Copies of what stands before the model.
        attempts: Replicas that a request is given to, one after another, where they die.
        serve: As `leanvlm serve` takes it. With `serve run` and YAML, where Ray listens is Ray's `http_options`; `host` then
            says whether others than this machine may ask.
    """

    bundle: Path
    replicas: int = 1
    max_replicas: int | None = None
    target_requests: float = 4
    gpus: float = 0
    cpus: float = 1
    device: str | None = None
    provider: str | None = None
    threads: int | None = None
    routers: int = 1
    attempts: int = 3
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        """Check the numbers; raises InputError."""
        for name in ("replicas", "routers", "attempts"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is not possible; give at least 1")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise InputError(f"max_replicas {self.max_replicas} is less than replicas, {self.replicas}")


def read_config(args: Mapping[str, Any]) -> RayConfig:
    """Make a configuration of an application's arguments, as YAML or the command line gives them.

    Args:
        args: Fields of RayConfig and of ServeConfig, side by side.

    Raises:
        InputError: One is unknown, missing or of another kind.
    """
    own = {name: hint for name, hint in typing.get_type_hints(RayConfig).items() if name != "serve"}
    serve = typing.get_type_hints(ServeConfig)
    unknown = [name for name in args if name not in own and name not in serve]
    if unknown:
        raise InputError(f"{unknown[0]} is no argument of this application; there are {', '.join([*own, *serve])}")
    if "bundle" not in args:
        raise InputError("bundle is missing: give bundle=FOLDER, which `leanvlm export` wrote")
    given = {name: _value(name, value, (own | serve)[name]) for name, value in args.items()}
    asked = {name: value for name, value in given.items() if name in serve}
    return RayConfig(**{name: value for name, value in given.items() if name in own}, serve=ServeConfig(**asked))


def _value(name: str, value: Any, hint: Any) -> Any:
    """Return an argument as its field has it; the command line gives texts."""
    kinds = (
        [kind for kind in typing.get_args(hint) if kind is not type(None)] if typing.get_origin(hint) is not tuple else [tuple]
    )
    kind = (kinds or [hint])[0]
    if value is None:
        return None
    if kind is tuple:
        return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} {value!r} is no {kind.__name__}") from None


def build(args: Mapping[str, Any]) -> Any:
    """Return the application, for `serve run` and for `import_path` of Ray Serve's YAML.

    Args:
        args: As `read_config` takes them.

    Raises:
        InputError: An argument cannot be used.
        MissingExtraError: Ray is not installed.
    """
    config = read_config(args)
    serve: Any = require("ray.serve", "scale")
    scale: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        limits = {"min_replicas": config.replicas, "max_replicas": config.max_replicas}
        scale = {"autoscaling_config": {**limits, "target_ongoing_requests": config.target_requests}}
    model = serve.deployment(Model).options(
        **scale,
        # One more would be refused by the replica itself; these wait in the router, for whichever replica has a place first.
        max_ongoing_requests=config.serve.max_queue,
        max_queued_requests=config.serve.max_queue,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=config.serve.grace + 5,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
    )
    router = serve.deployment(Router).options(
        num_replicas=config.routers, max_ongoing_requests=ROUTER_REQUESTS, ray_actor_options={"num_cpus": 0}
    )
    return router.bind(model.bind(config), config)


def run(args: Mapping[str, Any], *, blocking: bool = True) -> None:
    """Serve here, or on the cluster of `RAY_ADDRESS`, at the `host` and `port` of the arguments; without Ray's dashboard.

    Args:
        args: As `read_config` takes them.
        blocking: Return only when Ctrl-C ends it.

    Raises:
        InputError: An argument cannot be used.
        MissingExtraError: Ray is not installed.
    """
    config, application = read_config(args), build(args)
    ray: Any = require("ray", "scale")
    serve: Any = require("ray.serve", "scale")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(http_options={"host": config.serve.host, "port": config.serve.port})
    serve.run(application, name="leanvlm", route_prefix="/", blocking=blocking)


class Model:
    """A replica: a session, and the server's application over it.

    Args:
        config: How it is served.
    """

    async def __init__(self, config: RayConfig) -> None:  # type: ignore[misc]  # Ray waits for it.
        from leanvlm.runtime.serving.app import create_app
        from leanvlm.runtime.session import load

        self._session = load(config.bundle, device=config.device, provider=config.provider, threads=config.threads)
        self._app = create_app(self._session, config.serve)
        self._service = self._app.state.service
        # Its end is that of `__del__`, since Ray calls nothing else.
        self._life = self._app.router.lifespan_context(self._app)
        await self._life.__aenter__()

    def check_health(self) -> None:
        """Tell Ray that this replica answers; it is replaced where it does not."""
        if not self._service.engine.alive:
            raise RuntimeError("the engine has ended")

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """Answer a request.

        Args:
            scope: Of ASGI, `SENT` of it.
            body: The whole of it.

        Yields:
            What the application sends: the response's start and the pieces of its body.
        """
        told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        gone = asyncio.Event()
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            part = next(parts, None)
            if part is None:
                await gone.wait()
            return part or {"type": "http.disconnect"}

        async def send(message: typing.MutableMapping[str, Any]) -> None:
            told.put_nowait(dict(message))

        work = asyncio.ensure_future(self._app(scope, receive, send))
        work.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (message := await told.get()) is not None:
                yield message
        finally:
            # The application gives up what nobody waits for.
            gone.set()
            await asyncio.gather(work, return_exceptions=True)

    def __del__(self) -> None:
        """End the engine, when Ray takes this replica away; it has waited for what runs by then."""
        if service := getattr(self, "_service", None):
            service.stop(0.0)
            self._session.close()


class Router:
    """Reads requests whole, and gives each to a replica, and to another where that dies.

    Asking again is safe: a request leaves nothing behind. One that kills what reads it would do so `attempts` times. A stream
    that had begun goes on where the other replica says the same again up to there, and else ends with an error.

    Args:
        model: Ray's handle of the replicas.
        config: How they serve.
    """

    def __init__(self, model: Any, config: RayConfig) -> None:
        from leanvlm.runtime.serving.access import Access, read_key
        from leanvlm.runtime.serving.service import Room, page_files

        # Asked here too, so that nobody else's requests are held.
        key = None if config.serve.api_key_file is None else read_key(config.serve.api_key_file)
        self._access = Access(config.serve, key, frozenset(page_files()))
        self._model = model.options(method_name="answer", stream=True)
        self._config = config
        self._room = Room(config.serve.held_bytes)
        self._died = require("ray.exceptions", "scale").RayActorError
        self._full = require("ray.serve.exceptions", "scale").BackPressureError

    async def __call__(self, request: Any) -> Any:
        """Answer a request of Ray's proxy with a response of Starlette's."""
        from starlette.responses import Response

        from leanvlm.runtime.serving.access import respond
        from leanvlm.runtime.serving.exchange import ClientGone, Hold, read_body
        from leanvlm.runtime.serving.problems import problem_of

        problem = self._access.refused(request.scope)
        if problem is not None:
            return respond(problem)
        with ExitStack() as stack:
            hold = stack.enter_context(Hold(self._room))
            try:
                body = await read_body(request, self._config.serve, hold)
                scope = {name: request.scope[name] for name in SENT if name in request.scope}
                replies = self._replies(scope, body)
                start, first, told = await anext(replies)
            except ClientGone:
                return Response(status_code=499)
            except LeanVLMError as error:
                return respond(problem_of(error))
            # The request is kept until its answer has ended.
            return _held(start, self._body(start, first, told, replies), stack.pop_all())

    async def _replies(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Reply]:
        """Yield what a replica answers; asked for more, what another does."""
        for attempt in range(1, self._config.attempts + 1):
            told = self._model.remote(scope, body)
            try:
                reply = await anext(told), await anext(told), told
            except self._full as error:
                raise QueueFullError("as many requests wait as may; ask again later") from error
            except self._died:
                _log.warning("a replica died with a request in hand: attempt %d of %d", attempt, self._config.attempts)
                continue
            except BaseException:
                told.cancel()
                raise
            yield reply
        raise ReplicasDiedError

    async def _body(
        self, start: dict[str, Any], first: dict[str, Any], told: Any, replies: AsyncIterator[Reply]
    ) -> AsyncIterator[bytes]:
        """Yield the pieces of a body. A stream that cannot be gone on with says so in a last event, and does not say [DONE]."""
        from leanvlm.runtime.serving.continued import ContinuedStream, DiffersError
        from leanvlm.runtime.serving.problems import problem_of
        from leanvlm.runtime.serving.replies import event

        if not first.get("more_body", False):
            yield first.get("body", b"")
            return
        stream, status = ContinuedStream(), start["status"]
        while True:
            try:
                yield stream.take(first["body"])
                async for message in told:
                    yield stream.take(message.get("body", b""))
                return
            except self._died:
                _log.warning("a replica died with a stream that had begun; another is asked to go on with it")
                stream.restart()
            except DiffersError:
                yield event(problem_of(ReplicasDiedError()).body)
                return
            finally:
                told.cancel()
            try:
                start, first, told = await anext(replies)
                if start["status"] != status:
                    raise ReplicasDiedError
            except LeanVLMError as error:
                yield event(problem_of(error).body)
                return


Reply = tuple[dict[str, Any], dict[str, Any], Any]
"""The start of a response, the first piece of its body, and where the others come from."""


class ReplicasDiedError(ShuttingDownError):
    """What was to answer has died."""

    def __init__(self) -> None:
        super().__init__("what was answering this request has died; ask again")


def _held(start: Mapping[str, Any], body: AsyncIterator[bytes], stack: ExitStack) -> Any:
    """Return a response that lets go of something at its end, or when the client goes away."""
    from starlette.responses import StreamingResponse

    class Held(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            with stack:
                await super().__call__(scope, receive, send)

    response = Held(body, start["status"])
    response.raw_headers = list(start["headers"])
    return response
