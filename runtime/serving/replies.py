"""Answers in OpenAI's shape: one object, or chunks of it as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from leanvlm.runtime.answer import Answer, TokenChance
from leanvlm.runtime.text import TextTokenizer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """Writes the answer to one request.

    Attributes:
        model: Its name.
        tokenizer: Of the model, for the texts of single tokens.
        logprobs: Whether the request wants them.
        counted: Whether chunks say `usage`, as OpenAI's do where it is asked for.
        id: Of the answer.
        created: Seconds since 1970.
    """

    model: str
    tokenizer: TextTokenizer
    logprobs: bool = False
    counted: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer, chances: Sequence[TokenChance], details: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return a finished answer.

        Args:
            answer: It.
            chances: Of the tokens of its text.
            details: What the field `leanvlm` holds.
        """
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._chances(chances),
            "finish_reason": answer.finish_reason,
        }
        body = {**self._head("chat.completion"), "choices": [choice], "usage": usage(answer)}
        return body if details is None else {**body, "leanvlm": details}

    def first(self, details: Mapping[str, Any] | None) -> bytes:
        """Return the chunk before any text."""
        return self._chunk({"role": "assistant", "content": ""}, (), None, details)

    def piece(self, text: str, chances: Sequence[TokenChance]) -> bytes:
        """Return the chunk of a piece of text."""
        return self._chunk({"content": text}, chances)

    def last(self, reason: str, chances: Sequence[TokenChance], details: Mapping[str, Any] | None) -> bytes:
        """Return the chunk that says why the answer ended."""
        return self._chunk({}, chances, reason, details)

    def count(self, answer: Answer) -> bytes:
        """Return the chunk that counts tokens, behind the last one of the answer itself."""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)})

    def _chunk(
        self,
        delta: Mapping[str, Any],
        chances: Sequence[TokenChance],
        reason: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": self._chances(chances), "finish_reason": reason}
        body: dict[str, Any] = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.counted:
            body["usage"] = None
        if details is not None:
            body["leanvlm"] = details
        return event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chances(self, chances: Sequence[TokenChance]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {**self._chance(one.token, one.logprob), "top_logprobs": [self._chance(*pair) for pair in one.top]}
            for one in chances
        ]
        return {"content": content, "refusal": None}

    def _chance(self, token: int, logprob: float) -> dict[str, Any]:
        text, known = token_text(self.tokenizer, token)
        # JSON has no infinity; OpenAI's stands for what is nearly impossible.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(known) if known is not None else None}


def usage(answer: Answer) -> dict[str, Any]:
    """Count tokens: of the prompt what the decoder read, kept image tokens included; of the answer its end token too."""
    generated = len(answer.token_ids)
    details = {
        "cached_tokens": answer.timings.reused_positions,
        "image_tokens": sum(image.kept for image in answer.images),
        "image_tokens_unpruned": sum(image.total for image in answer.images),
    }
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": answer.prompt_tokens + generated,
        "prompt_tokens_details": details,
    }


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: TextTokenizer, token: int) -> tuple[str, bytes | None]:
    """Return the text of a token by itself, and its bytes where they are known.

    A decoder leaves the space out that a text begins with, so what counts is what a second token of its kind adds.
    """
    written = str(tokenizer.tokenizer.id_to_token(token) or "")
    if token in tokenizer.byte_ids:
        return written, bytes([int(written[3:5], 16)])
    once, twice = (tokenizer.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
    text = twice[len(once) :] if twice.startswith(once) and len(twice) > len(once) else once
    # A part of a character has no text of its own.
    return (written, None) if not text or "\ufffd" in text else (text, text.encode())


def to_json(body: Mapping[str, Any]) -> bytes:
    """Return JSON in one line of ASCII: some readers of events take other ends of lines in a text for ends of lines."""
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


def event(body: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"
