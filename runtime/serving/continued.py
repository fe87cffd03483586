"""A stream that another server goes on with: what was sent already is compared, and left out.

Greedy answers, and those with a seed, come again as they were, event for event, on hardware of one kind. Where they do not,
the stream is not gone on with: a client never gets two halves of different answers.
"""

from __future__ import annotations

import json
from typing import Any

DATA, END = b"data: ", b"\n\n"
# What differs between two answers to one question.
OWN = ("id", "created")
TIMES = "leanvlm"


class DiffersError(Exception):
    """The answer that came again is another one."""


class ContinuedStream:
    """The events of one stream, whoever sends them; messages hold whole events."""

    def __init__(self) -> None:
        self._sent: list[Any] = []
        self._at = 0
        self._own: dict[str, Any] = {}

    def restart(self) -> None:
        """Say that the answer comes again from its beginning."""
        self._at = 0

    def take(self, message: bytes) -> bytes:
        """Return what of a message is new to the client, possibly nothing.

        Raises:
            DiffersError: An event is not what was sent in its place.
        """
        new = b""
        for block in message.split(END)[:-1]:
            event = _parse(block)
            known = _comparable(event)
            if self._at == len(self._sent):
                new += self._as_own(event, block) + END
                self._sent.append(known)
            elif self._sent[self._at] != known:
                raise DiffersError
            self._at += 1
        return new

    def _as_own(self, event: Any, block: bytes) -> bytes:
        """Return an event under the name that the first one gave the stream."""
        if not isinstance(event, dict):
            return block
        own = {name: event[name] for name in OWN if name in event}
        self._own = self._own or own
        return block if own == self._own else DATA + json.dumps({**event, **self._own}, separators=(",", ":")).encode()


def _parse(block: bytes) -> Any:
    text = block.removeprefix(DATA)
    return json.loads(text) if text.startswith(b"{") else text


def _comparable(event: Any) -> Any:
    """Return an event without what differs from one answer to the next; of what stands beside OpenAI's fields only the fact."""
    if not isinstance(event, dict):
        return event
    return {name: name == TIMES or value for name, value in event.items() if name not in OWN}
