"""How a server is set up: where it listens, and how much one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.generation import MAX_NEW_TOKENS
from leanvlm.runtime.preprocess import MAX_PIXELS
from leanvlm.runtime.serving.engine import MAX_QUEUE

MEGABYTE = 1 << 20
# Seconds, or MB; more is not a limit.
MOST = 1e6


@dataclass(frozen=True)
class ServeConfig:
    """What a server does; the defaults suit one machine that serves itself.

    Attributes:
        host: Address or name that it listens on.
        port: 0 takes any free one.
        api_key_file: Holds the key that clients must send; None wants none.
        name: What the model is called; None is the bundle's folder.
        budget: Image tokens kept per crop where a request says nothing; None is the bundle's default.
        rows: Answers that are worked on at once; None is what is usual on the device.
        context: Positions of a prompt and its answer; None is what is usual, with rows, or the model's.
        max_queue: Requests that wait at most.
        max_connections: At once.
        max_body_mb: Of one request.
        max_held_mb: Of all requests that are being read, wait or are answered.
        max_images: Of one request.
        max_pixels: Of all images of a request together.
        max_prompt_tokens: Positions of a prompt, kept image tokens included; None is what the model's context holds.
        max_new_tokens: Tokens of an answer, at most.
        default_new_tokens: The same where a request says nothing; as `leanvlm run`, but at most a quarter of the context.
        max_seconds: From a request's first byte to its answer's last.
        body_seconds: In which a request must have come in.
        allow_remote_images: Hosts from which images are fetched; none: images come with the request.
        grace: Seconds that running answers may take once the server is told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    name: str | None = None
    budget: int | None = None
    rows: int | None = None
    context: int | None = None
    max_queue: int = MAX_QUEUE
    max_connections: int = 256
    max_body_mb: float = 32
    max_held_mb: float = 256
    max_images: int = 8
    max_pixels: int = MAX_PIXELS
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 1024
    default_new_tokens: int = MAX_NEW_TOKENS
    max_seconds: float = 300
    body_seconds: float = 30
    allow_remote_images: tuple[str, ...] = ()
    grace: float = 30

    def __post_init__(self) -> None:
        """Check the numbers; raises InputError."""
        if not 0 <= self.port <= 65535:
            raise InputError(f"port {self.port} is not possible; give 1 to 65535, or 0 for any free one")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise InputError(f"max_pixels {self.max_pixels} is not possible; give 1 to {MAX_PIXELS}")
        for name, least in (("max_queue", 1), ("max_connections", 1), ("max_images", 0), ("max_new_tokens", 1), ("grace", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} {getattr(self, name)} is not possible; give at least {least}")
        for name in ("max_body_mb", "max_held_mb", "max_seconds", "body_seconds"):
            # Written so that NaN fails too.
            if not 0 < getattr(self, name) <= MOST:
                raise InputError(f"{name} {getattr(self, name):g} is not possible; give more than 0, up to {MOST:g}")
        if self.grace > MOST:
            raise InputError(f"grace {self.grace:g} is not possible; give 0 to {MOST:g}")
        if self.name is not None and not self.name.strip():
            raise InputError("the model's name is empty; leave --name out for the folder's")
        for name in ("max_prompt_tokens", "rows", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} {value} is not possible; give at least 1")
        if self.max_held_mb < self.max_body_mb:
            raise InputError(f"max_held_mb {self.max_held_mb:g} is less than one request may have, {self.max_body_mb:g} MB")

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def body_bytes(self) -> int:
        """Bytes of one request at most."""
        return int(self.max_body_mb * MEGABYTE)

    @property
    def held_bytes(self) -> int:
        """Bytes of all requests at most."""
        return int(self.max_held_mb * MEGABYTE)
