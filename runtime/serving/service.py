"""One bundle as it is served: the engine, what it counts, and how much its requests hold."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from leanvlm.runtime.errors import ContextOverflowError, InputError, QueueFullError
from leanvlm.runtime.manifest import MANIFEST
from leanvlm.runtime.serving.config import MEGABYTE, ServeConfig
from leanvlm.runtime.serving.engine import Ended, Engine, Event, Failed, Question
from leanvlm.runtime.serving.images import RemotePolicy
from leanvlm.runtime.serving.metrics import Metrics
from leanvlm.runtime.serving.runners import Runner
from leanvlm.runtime.session import Session, user_message
from leanvlm.runtime.text import Message

PAGE = Path(__file__).with_name("page")
PROBE = "jackdaws"


class Room:
    """Bytes that requests hold together, from their bodies' first to their answers' last; used on the event loop alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Hold some more.

        Raises:
            QueueFullError: It is too much.
        """
        if self.held + size > self._limit:
            raise QueueFullError(f"the requests in hand take {self._limit // MEGABYTE} MB already; ask again later")
        self.held += size

    def give(self, size: int) -> None:
        """Hold so much less."""
        self.held -= size


class Service:
    """A session that is served.

    Attributes:
        session: Stays the caller's, who closes it behind `stop`.
        config: How it is served.
        engine: Answers.
        metrics: Of all requests.
        room: What they hold.
        remote: Which images are fetched.
        name: Of the model.
        created: When the bundle was written, in seconds since 1970.
        context: Positions that a prompt and its answer may take together.
        prompt_limit: Those of a prompt.
        ready: Whether a first answer has come.
        left_out: Roles whose messages the model's template passes over.

    Raises:
        InputError: The configuration names a budget that the bundle does not have, or what is no host.
    """

    def __init__(self, session: Session, config: ServeConfig, runner: Runner) -> None:
        session.manifest.budget(config.budget)
        self.session = session
        self.config = config
        self.name = config.name or session.folder.resolve().name
        self.created = int((session.folder / MANIFEST).stat().st_mtime)
        self.context = runner.capacity or session.manifest.decoder.context_length
        self.prompt_limit = min(config.max_prompt_tokens or self.context, self.context)
        self.left_out = left_out(session)
        self.remote = RemotePolicy(config.allow_remote_images, config.body_bytes)
        self.room = Room(config.held_bytes)
        self.engine = Engine(session, runner, config.max_queue)
        self.metrics = Metrics(self.engine)
        self.ready = False

    def warm_up(self) -> None:
        """Ask for a first answer, which opens the graphs, and do not wait for it."""
        picture = np.full((64, 64, 3), 127, np.uint8)
        options = self.session.settings.options(max_new_tokens=2)
        question = Question([user_message("What is in the image?", 1)], [picture], options, self.config.budget)
        self.engine.ask(question, self._warmed)

    def _warmed(self, event: Event) -> None:
        # Where a picture does not fit the context, other prompts may.
        small = isinstance(event, Failed) and isinstance(event.error, ContextOverflowError)
        if isinstance(event, Failed):
            print(f"leanvlm: the first answer failed: {event.error}", file=sys.stderr, flush=True)
        self.ready = self.ready or small or isinstance(event, Ended)

    def stop(self, grace: float | None = None) -> None:
        """Answer nothing new and end what runs; see `Engine.stop`."""
        self.ready = False
        self.engine.stop(self.config.grace if grace is None else grace)

    def models(self) -> dict[str, Any]:
        """Return what is served, in OpenAI's shape, with what a client can choose from."""
        manifest = self.session.manifest
        own = {
            "budgets": sorted(manifest.budgets),
            "default_budget": manifest.budget(self.config.budget),
            "unpruned": manifest.tokens_per_crop,
            "target": manifest.target,
            "precision": manifest.precision,
            "max_images": self.config.max_images,
            "context": self.context,
        }
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "leanvlm", "leanvlm": own}
        return {"object": "list", "data": [model]}


def left_out(session: Session) -> frozenset[str]:
    """Return the roles whose messages a model's template passes over without a word."""
    user, own = user_message("Why?", 0), {"role": "system", "content": [{"type": "text", "text": PROBE}]}
    said = {**own, "role": "assistant"}
    conversations: dict[str, Sequence[Message]] = {"system": [own, user], "assistant": [user, said, user]}
    found = set()
    for role, messages in conversations.items():
        with suppress(InputError):  # A template that refuses them says so itself, and will again.
            found |= set() if PROBE in session.template.render(messages) else {role}
    return frozenset(found)


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return the page's files by path, with their types."""
    kinds = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
    files = sorted(path for path in PAGE.glob("*") if path.suffix in kinds) if PAGE.is_dir() else []
    named = {"/" if path.name == "index.html" else f"/{path.name}": path for path in files}
    return {name: (path.read_bytes(), kinds[path.suffix]) for name, path in named.items()}
