"""A server of a session in this process, behind a real socket, and clients of it."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from leanvlm.runtime import Session
from leanvlm.runtime.serving.app import create_app
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.runners import InTurn, Runner
from leanvlm.runtime.serving.server import address_of, bind, make_server
from leanvlm.runtime.serving.service import Service

JSON = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"
LONG = 60.0


@dataclass
class Served:
    """A server that runs.

    Attributes:
        address: Where.
        service: What is served.
    """

    address: str
    service: Service

    def client(self, key: str = "none") -> openai.OpenAI:
        """Return a client that asks once."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=LONG)

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection."""
        place = urlsplit(self.address)
        return http.client.HTTPConnection(place.hostname or "", place.port, timeout=LONG)

    def ask(
        self, path: str = CHAT, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Send a request and return status, headers in lower case, and body."""
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method or ("GET" if body is None else "POST"), path, data, {**JSON, **(headers or {})})
        response = connection.getresponse()
        found = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        connection.close()
        return found

    def metric(self, name: str) -> float:
        """Return a number of /metrics, such as `leanvlm_running`."""
        lines = self.ask("/metrics")[2].decode().splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)


@contextmanager
def served(session: Session, config: ServeConfig | None = None, runner: Runner | None = None) -> Iterator[Served]:
    """Serve a session on any free port, from a thread."""
    config = config or ServeConfig()
    sockets = bind(config.host, 0)
    app = create_app(session, config, runner)
    server = make_server(app)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        found = Served(address_of(config.host, sockets), app.state.service)
        until(lambda: server.started and found.ask("/health/ready")[0] == 200)
        yield found
    finally:
        server.should_exit = True
        thread.join()
        for one in sockets:
            one.close()


def until(true: Callable[[], bool], seconds: float = LONG) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def image_part(file: bytes, kind: str = "png") -> dict[str, Any]:
    """Return the part of a message that is an image."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(file).decode()}"}}


def text_part(text: str) -> dict[str, Any]:
    """Return the part of a message that is text."""
    return {"type": "text", "text": text}


class Gated(InTurn):
    """Answers one after another, and goes on only while `gate` is set; counts its steps."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.steps = 0
        self.gate = threading.Event()
        self.gate.set()

    def step(self, drafts: Any) -> dict[int, Exception]:
        """Add a token, once the gate is open."""
        self.gate.wait(LONG)
        self.steps += 1
        return super().step(drafts)
