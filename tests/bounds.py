"""Bounds on what a test runs: a file from elsewhere must not take for ever, nor the machine's memory."""

from __future__ import annotations

import contextlib
import resource
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path

from leanvlm.runtime.errors import LeanVLMError

SECONDS, MEMORY = 10, 2 * 2**30


class TooLateError(BaseException):
    """Not an Exception: nobody on the way may take it for a mistake in a file."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Stop what takes longer than `SECONDS`, and let nothing have more than `MEMORY` bytes beyond those that are in use."""

    def late(number: int, frame: object) -> None:
        raise TooLateError(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def one_line(error: LeanVLMError) -> str:
    """Return an error's message; fail if it is more than a line, or if memory ran out on the way to it."""
    message = str(error)
    assert "\n" not in message, message
    assert 0 < len(message.encode()) < 2000, message[:2000]
    story = "".join(traceback.format_exception(error))
    assert "MemoryError" not in story, story
    assert "can't allocate memory" not in story, story
    return message
