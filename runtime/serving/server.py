"""The application behind a socket: uvicorn, with limits on slow clients, and an end that lets running answers finish."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.service import Service

# In which a connection must have sent a request's headers, and in which what it was sent must go out of our buffers.
HEAD_SECONDS, STALL_SECONDS = 15.0, 30.0
# Clients keep a connection for a few seconds and expect it to be there.
KEEP_ALIVE_SECONDS = 20
BACKLOG = 512


class Connection(H11Protocol):
    """A connection that neither trickles in nor is left unread for ever.

    Attributes:
        most: Connections at once.
    """

    most = ServeConfig.max_connections

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take a connection, or drop it where there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes in."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        for timer in (self._head, self._stall):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Wait until the client has read some of what it was sent, but not for ever."""
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()

    def _watch(self) -> None:
        """Give the next request's headers so much time; none while one is being answered."""
        between = self.cycle is None or self.cycle.response_complete
        if between and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
        elif not between and self._head is not None:
            self._head.cancel()
            self._head = None


class Server(uvicorn.Server):
    """uvicorn's server; told to end, it first tells the engine, so that what waits is refused while what runs goes on.

    Attributes:
        service: What is served.
        greeting: Lines for standard error, once connections are taken.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.greeting: tuple[str, ...] = ()
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections."""
        await super().startup(sockets)
        for line in self.greeting:
            print(f"leanvlm: {line}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end when what runs has ended."""
        loop = asyncio.get_running_loop()
        ending = loop.run_in_executor(None, self.service.stop)
        await super().shutdown(sockets)
        if self.force_exit:
            await loop.run_in_executor(None, self.service.stop, 0.0)
        await ending


def make_server(app: FastAPI) -> Server:
    """Return what runs an application that `create_app` made."""
    service: Service = app.state.service
    config = service.config
    options = uvicorn.Config(
        app,
        http=type("LimitedConnection", (Connection,), {"most": config.max_connections}),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # What has not ended by then was told to by the engine.
        timeout_graceful_shutdown=int(config.grace) + 5,
        backlog=BACKLOG,
    )
    return Server(options, service)


def run(server: Server, sockets: Sequence[socket.socket]) -> None:
    """Serve on sockets of `bind` until a signal comes; then raise what the signal means to the process."""
    server.greeting = greeting(server.service, address_of(server.service.config.host, sockets))
    with _hang_up_ends(server):
        server.run(list(sockets))


@contextmanager
def _hang_up_ends(server: Server) -> Iterator[None]:
    """Let SIGHUP, too, end a server as SIGTERM does, unless it is ignored."""
    number = signal.SIGHUP
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    came: list[int] = []

    def end(number: int, frame: Any) -> None:
        came.append(number)
        server.should_exit = True

    signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)
    if came:
        signal.raise_signal(number)


def bind(host: str, port: int) -> list[socket.socket]:
    """Take a port on every address of a host, and listen to none of them yet.

    Raises:
        InputError: The host is not known or not this machine's, or the port is in use or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"the host {host!r} is not known; give an address of this machine, such as 127.0.0.1") from error
    sockets: list[socket.socket] = []
    failed: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            # All addresses get one port, also where any free one will do.
            taken = (address[0], sockets[0].getsockname()[1], *address[2:]) if sockets else address
            sockets.append(_bound(family, kind, protocol, taken))
        except OSError as error:
            failed = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    if sockets and (failed is None or failed.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        return sockets
    for one in sockets:
        one.close()
    assert failed is not None
    reasons = {
        errno.EADDRINUSE: f"port {port} of {host} is in use; choose another with --port",
        errno.EADDRNOTAVAIL: f"{host} is not an address of this machine",
        errno.EACCES: f"port {port} is not for everybody; choose one from 1024 on",
    }
    raise InputError(reasons.get(failed.errno or 0, f"{host} port {port}: {failed.strerror or failed}")) from failed


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        # A port whose last connections have ended can be taken again at once.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one


def address_of(host: str, sockets: Sequence[socket.socket]) -> str:
    """Return where a browser finds a server."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{sockets[0].getsockname()[1]}"


def greeting(service: Service, address: str) -> tuple[str, ...]:
    """Return what to say once the server is there; loudly if anybody may use it."""
    config = service.config
    there = f"serving {service.name} at {address} (a page; OpenAI's interface at {address}/v1)"
    if config.loopback or config.api_key_file is not None:
        return (there,)
    return there, f"WARNING: whoever reaches {config.host} can use this server; give --api-key-file, or leave --host out"
