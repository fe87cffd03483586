"""One chat request and its answer: the body read within its limits, asked, and told as it comes, until the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, suppress
from time import perf_counter
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from leanvlm.runtime.answer import Answer, TokenChance
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.details import begun_details, ended_details, upright_size
from leanvlm.runtime.serving.engine import Begun, Ended, Event, Failed, Piece, Question
from leanvlm.runtime.serving.images import check_images, fetch, from_data_uri
from leanvlm.runtime.serving.problems import RequestError, problem_of
from leanvlm.runtime.serving.protocol import Asked, read_request
from leanvlm.runtime.serving.replies import DONE, Reply, event, to_json
from leanvlm.runtime.serving.service import Room, Service

# Parsing and decoding so many bytes takes about a millisecond; a thread costs a tenth of one.
INLINE = 1 << 18
# In which what is too large is still taken in, so that the client reads why before its connection ends.
LINGER_SECONDS = 2.0
STREAM_HEADERS = {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def answer(service: Service, request: Request) -> Response:
    """Answer a chat request.

    Raises:
        LeanVLMError: It cannot be answered; nothing was sent.
    """
    with ExitStack() as stack:
        start = perf_counter()
        hold = stack.enter_context(Hold(service.room))
        try:
            asked, images = await _read(service, request, hold)
            events = stack.enter_context(Events(service, _question(service, request, asked, images, start)))
            teller = Teller(service, asked, images, events)
            if not asked.stream:
                return Response(to_json(await or_gone(request.receive, teller.whole())), media_type="application/json")
            await or_gone(request.receive, teller.begin())
            return EventStream(teller, stack.pop_all())
        except ClientGone:
            return Response(status_code=499)


def _question(service: Service, request: Request, asked: Asked, images: list[bytes], start: float) -> Question:
    client = request.client.host if request.client else ""
    limits = service.config.max_seconds, service.prompt_limit
    return Question(asked.messages, images, asked.options, asked.budget, client, start, *limits)


async def _read(service: Service, request: Request, hold: Hold) -> tuple[Asked, list[bytes]]:
    """Read a request and its images."""
    config = service.config
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site can send other types without being asked whether it may.
        raise RequestError("send the body as Content-Type: application/json", code="unsupported_media_type", status=415)
    try:
        body = await asyncio.wait_for(read_body(request, config, hold), config.body_seconds)
    except asyncio.TimeoutError as error:
        message = f"the body took over {config.body_seconds:g} s to come in"
        raise RequestError(message, code="body_timeout", status=408) from error
    asked = await _aside(len(body), lambda: read_request(body, service))
    images = []
    for param, address in asked.addresses:
        with Named(param):
            images.append(await _picture(address, service, len(body), hold))
    if images:
        with Named("messages"):
            await _aside(sum(map(len, images)), lambda: check_images(images, config.max_pixels))
    return asked, images


async def _picture(address: str, service: Service, size: int, hold: Hold) -> bytes:
    if _is_remote(address):
        return await fetch(address, service.remote, hold.take)
    return await _aside(size, lambda: from_data_uri(address, service.config.body_bytes))


def _is_remote(address: str) -> bool:
    return address[:6].lower().startswith(("http:", "https:"))


async def _aside(size: int, work: Callable[[], Result]) -> Result:
    """Do work on so many bytes, in a thread where it would hold others up."""
    return work() if size <= INLINE else await asyncio.to_thread(work)


class Named:
    """Names the field of a request that an InputError is about."""

    def __init__(self, param: str) -> None:
        self._param = param

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InputError) and not isinstance(error, RequestError):
            raise RequestError(str(error), self._param, "invalid_image") from error


class Hold:
    """What one request holds of the room for all."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self._room.give(self._size)
        self._size = 0

    def take(self, size: int) -> None:
        """Hold some more; raises QueueFullError."""
        self._room.take(size)
        self._size += size


async def read_body(request: Request, config: ServeConfig, hold: Hold) -> bytes:
    """Read a body, however it comes, and no more of it than is allowed.

    Raises:
        RequestError: It is too large.
        QueueFullError: The requests in hand take too much together.
        ClientGone: It ends before its end.
    """
    too_large = RequestError(
        f"the body has more than {config.max_body_mb:g} MB; send smaller pictures", code="body_too_large", status=413
    )
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > config.body_bytes:
        raise too_large
    body = bytearray()
    coming = _parts(request.receive)
    async for part in coming:
        body += part
        if len(body) > config.body_bytes:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_discard(coming, config.body_bytes), LINGER_SECONDS)
            raise too_large
        hold.take(len(part))
    return bytes(body)


async def _parts(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        more = message.get("more_body", False)
        yield message.get("body", b"")


async def _discard(parts: AsyncIterator[bytes], most: int) -> None:
    async for part in parts:
        most -= len(part)
        if most < 0:
            return


async def or_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do work while the client waits for it; raises ClientGone when it does no more."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaves(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events:
    """What the engine tells of a question, brought from its thread to the event loop; leaving gives the answer up."""

    def __init__(self, service: Service, question: Question) -> None:
        self._metrics = service.metrics
        self._last: float | None = None
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[tuple[float, Event]] = asyncio.Queue()
        self._over = False
        self._asked = perf_counter()
        self._ticket = service.engine.ask(question, self._hear)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._over:
            self._over = True
            self._metrics.outcomes.labels("cancelled").inc()
            self._ticket.cancel()

    def _hear(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._told.put_nowait, (perf_counter(), event))

    async def next(self) -> list[Event]:
        """Return what was told since the last call, one event at least.

        Raises:
            LeanVLMError: The answer failed, and nothing else was told before that.
        """
        found = [self._count(*await self._told.get())]
        while not self._told.empty():
            found.append(self._count(*self._told.get_nowait()))
        return found

    def _count(self, at: float, event: Event) -> Event:
        if isinstance(event, Begun):
            self._metrics.begun(event.known.timings, at - self._asked)
        elif isinstance(event, Piece):
            if self._last is not None:
                self._metrics.piece(at - self._last)
            self._last = at
        elif isinstance(event, Ended):
            self._over = True
            self._metrics.ended(event.answer)
        elif isinstance(event, Failed):
            self._over = True
            self._metrics.outcomes.labels("failed").inc()
        return event


class Teller:
    """Tells an answer in OpenAI's shape, as one object or chunk by chunk."""

    def __init__(self, service: Service, asked: Asked, images: list[bytes], events: Events) -> None:
        self._manifest = service.session.manifest
        self._asked = asked
        self._events = events
        self._sizes = [upright_size(image) for image in images] if asked.details else []
        logprobs = asked.options.top_logprobs is not None
        self._reply = Reply(service.name, service.session.tokenizer, logprobs, asked.usage)
        self._begun: dict[str, Any] | None = None
        self._waiting: list[Event] = []
        self._given = 0

    async def begin(self) -> None:
        """Wait until the images are encoded; raises LeanVLMError if there will be no answer."""
        first, *self._waiting = await self._events.next()
        if isinstance(first, Failed):
            raise first.error
        if self._asked.details and isinstance(first, Begun):
            self._begun = begun_details(first.known, self._sizes, self._manifest, self._asked.budget)

    async def whole(self) -> dict[str, Any]:
        """Return the finished answer; raises LeanVLMError."""
        await self.begin()
        chances: list[TokenChance] = []
        while True:
            for one in self._waiting:
                if isinstance(one, Failed):
                    raise one.error
                if isinstance(one, Piece):
                    chances += self._taken(one)
                if isinstance(one, Ended):
                    return self._reply.whole(one.answer, [*chances, *self._rest(one.answer)], self._details(one.answer))
            self._waiting = await self._events.next()

    async def write(self, send: Send) -> None:
        """Send the chunks of an answer that was begun, those together that are there together."""
        data, over = self._reply.first(self._begun), False
        while True:
            for one in self._waiting:
                data += self._told(one)
                over = over or isinstance(one, Ended | Failed)
            await send({"type": "http.response.body", "body": data, "more_body": not over})
            if over:
                return
            data, self._waiting = b"", await self._events.next()

    def _told(self, one: Event) -> bytes:
        if isinstance(one, Piece):
            return self._reply.piece(one.text, self._taken(one))
        if isinstance(one, Failed):
            return event(problem_of(one.error).body)
        if isinstance(one, Ended):
            details = ended_details(one.answer) if self._asked.details else None
            last = self._reply.last(one.answer.finish_reason, self._rest(one.answer), details)
            return last + (self._reply.count(one.answer) if self._asked.usage else b"") + DONE
        return b""

    def _taken(self, piece: Piece) -> tuple[TokenChance, ...]:
        self._given += len(piece.chances)
        return piece.chances

    def _rest(self, answer: Answer) -> tuple[TokenChance, ...]:
        """Return the chances of tokens without text at the end of an answer; what has ended it is no part of it."""
        return answer.chances[self._given :] if answer.finish_reason == "length" else ()

    def _details(self, answer: Answer) -> dict[str, Any] | None:
        return None if self._begun is None else {**self._begun, **ended_details(answer)}


class EventStream(Response):
    """The chunks of an answer; whatever it holds is let go of at its end, or when the client goes away."""

    def __init__(self, teller: Teller, stack: ExitStack) -> None:
        super().__init__(headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._teller = teller
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        with self._stack, suppress(ClientGone):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await or_gone(receive, self._teller.write(send))
