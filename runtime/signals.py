"""Signals that ask a process to end: Ctrl-C, SIGTERM (as systemd sends it) and SIGHUP (as a lost terminal does)."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TERMINATED = {signal.SIGTERM: "terminated", signal.SIGHUP: "terminal lost"}
ENDING = (signal.SIGINT, *TERMINATED)
# Another one within so many seconds is the same request, such as of systemd, which may send both: the cleaning must run.
SAME_REQUEST = 5.0

# Requests to end that were raised in this process and not heeded yet.
_raised: list[BaseException] = []


class Terminated(SystemExit):
    """SIGTERM or SIGHUP came; the exit status is 128 and the signal's number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.reason = TERMINATED[signal.Signals(number)]


@contextmanager
def raised_when_terminated() -> Iterator[None]:
    """Raise Terminated where SIGTERM or SIGHUP would kill the process; one that is ignored (nohup) or handled stays so.

    A library may take such a request, or a Ctrl-C, for an error of its own, as torch does in the midst of tracing: an error
    that follows one is the request again, and `raise_again` asks for it where the library went on.
    """
    last = -SAME_REQUEST

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= SAME_REQUEST:
            _raise(Terminated(number))

    def interrupt(number: int, frame: FrameType | None) -> None:
        _raise(KeyboardInterrupt())

    heard = [number for number in TERMINATED if _handler(number) is signal.SIG_DFL]
    asked = [signal.SIGINT] if _handler(signal.SIGINT) is signal.default_int_handler else []
    try:
        with _handled(heard, end), _handled(asked, interrupt):
            yield
    except Exception as error:
        if _raised:
            raise _raised[0] from error
        raise
    finally:
        heeded()


def _raise(request: BaseException) -> None:
    _raised.append(request)
    # What libraries log of the work that is cut is noise beside the one line.
    logging.disable()
    raise request


def raise_again() -> None:
    """Raise a request to end that something has swallowed; call it between steps and before what cannot be taken back."""
    if _raised:
        raise _raised[0]


def heeded() -> None:
    """Say that a request to end was answered, such as with the end of an answer where a chat goes on."""
    if _raised:
        _raised.clear()
        logging.disable(logging.NOTSET)


@contextmanager
def deferred_signals() -> Iterator[threading.Event]:
    """Hold back what asks the process to end, for work that must not be cut; the event says that one came."""
    came: list[int] = []
    event = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        event.set()

    try:
        # A handler that Python does not know (None) cannot be put back.
        with _handled([number for number in ENDING if _handler(number) not in (signal.SIG_IGN, None)], note):
            yield event
    finally:
        if came:
            signal.raise_signal(came[0])


def _handler(number: int) -> Any:
    return signal.getsignal(number)


@contextmanager
def _handled(numbers: list[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals so; outside the main thread, where Python allows no handlers and none would run, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
