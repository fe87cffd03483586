"""One peer in a process of its own, in whichever environment it is installed: loads, answers, prints what it measured as JSON.

    python -m bench.beside.worker JOB

Nothing but the standard library is imported before the peer itself. What is written to standard output by libraries goes to
standard error, so that the last line of standard output is the record.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

IMAGE = "<image>"
"""Stands for the picture in a prompt, once."""
FIRST = f"USER: {IMAGE}\nWhat is in the image? Say which things are where, and of which colours they are. ASSISTANT:"
SECOND = f"USER: {IMAGE}\nHow many things are there, and which one is the largest of them all? ASSISTANT:"
# Replies of a chat are given, so that every peer reads the same text.
REPLY = " It is a red cup on a table.</s>"
TURNS = (
    "What is in the image?",
    "What is on the left of it?",
    "What is on the right of it?",
    "Which colour is the largest thing?",
    "How many things are there?",
)


@dataclass(frozen=True)
class Answered:
    """One answer.

    Attributes:
        tokens: Greedy.
        first_ms: From the picture's JPEG bytes and the prompt to the first token.
        steps_ms: Of each further token.
        prompt_tokens: Of the prompt, where the peer tells.
    """

    tokens: list[int]
    first_ms: float
    steps_ms: list[float]
    prompt_tokens: int | None = None


class Peer(Protocol):
    """A program that answers. Its module's class `Peer` is made from the job's options."""

    def answer(self, prompt: str, jpeg: bytes, tokens: int) -> Answered:
        """Answer a prompt with `<image>` in it by so many greedy tokens, end tokens passed over."""
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions of what answers."""
        ...


class Clock:
    """Times tokens as they come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._times = [perf_counter()]

    def add(self, token: int) -> None:
        """Note a token."""
        self._times.append(perf_counter())
        self.tokens.append(int(token))

    def answered(self, prompt_tokens: int | None = None) -> Answered:
        """Return the answer."""
        spent = [1e3 * (b - a) for a, b in zip(self._times, self._times[1:], strict=False)]
        return Answered(self.tokens, spent[0], spent[1:], prompt_tokens)


def conversation(turn: int) -> str:
    """Return the prompt of a chat's turn, counted from 0."""
    said = f"{REPLY}USER: ".join(f"{text} ASSISTANT:" for text in TURNS[: turn + 1])
    return f"USER: {IMAGE}\n{said}"


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load a peer and measure it.

    Args:
        job: `module`, `options`, `pictures`, `tokens`, `chat_tokens`, `repeats`.
    """
    begin = perf_counter()
    peer: Peer = importlib.import_module(job["module"]).Peer(**job["options"])
    load_ms = 1e3 * (perf_counter() - begin)
    warm, *asked, shown = [Path(picture).read_bytes() for picture in job["pictures"]]
    peer.answer(FIRST, warm, 2)
    rows = []
    for jpeg in asked[: job["repeats"]]:
        first, second = peer.answer(FIRST, jpeg, job["tokens"]), peer.answer(SECOND, jpeg, job["tokens"])
        rows.append({"first": vars(first), "second": vars(second)})
    # The chat's picture is new, as the first question's were.
    chat = [peer.answer(conversation(turn), shown, job["chat_tokens"]) for turn in range(len(TURNS))]
    return {
        "load_ms": load_ms,
        "questions": rows,
        "chat": [vars(answer) for answer in chat],
        "peak_bytes": peak_bytes(),
        "versions": {"python": platform.python_version(), **peer.versions()},
    }


def peak_bytes() -> int:
    """Return this process's peak resident memory; Linux's own figure does not count what the parent held."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure what the first argument says."""
    record = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(measure(json.loads(sys.argv[1]))), file=record, flush=True)
    # Some peers' threads do not end by themselves.
    os._exit(0)


if __name__ == "__main__":
    main()
