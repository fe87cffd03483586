"""A server's queue: every question gets one end, clients take turns, and places come back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import Queue
from time import perf_counter
from typing import Any

import pytest
from PIL import Image

from leanvlm.runtime import Session, load
from leanvlm.runtime.draft import Draft
from leanvlm.runtime.errors import (
    BackendError,
    ContextOverflowError,
    InputError,
    QueueFullError,
    ShuttingDownError,
    TimeLimitError,
)
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.serving.engine import Begun, Ended, Engine, Event, Failed, Piece, Question, Ticket
from leanvlm.runtime.serving.runners import InTurn, Runner, open_runner
from leanvlm.runtime.session import user_message

LONG = 30.0
TEXTS = ("What is in the image?", "Name one colour, please.", "Describe the image in detail")


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with load(tiny_bundle, threads=1) as opened:
        yield opened


def question(number: int, new: int = 6, client: str = "", **more: Any) -> Question:
    images = [Image.new("RGB", (40, 30), (number * 30 % 255, 90, 10))]
    options = GenerateOptions(new, ignore_end=True)
    return Question([user_message(TEXTS[number % 3], 1)], images, options, client=client, **more)


def expected(session: Session, number: int, new: int = 6) -> str:
    asked = question(number, new)
    return session.generate(TEXTS[number % 3], asked.images, max_new_tokens=new, ignore_end=True).text


class Inbox:
    """Keeps a ticket's events."""

    def __init__(self, engine: Engine, asked: Question, at_end: Callable[[], None] = lambda: None) -> None:
        self.events: list[Event] = []
        self.ended: Queue[Event] = Queue()
        self._at_end = at_end
        self.ticket: Ticket = engine.ask(asked, self._hear)

    def _hear(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Ended | Failed):
            self._at_end()
            self.ended.put(event)

    def end(self) -> Event:
        """Wait for the last event."""
        return self.ended.get(timeout=LONG)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(event.text for event in self.events if isinstance(event, Piece))


class Slow(InTurn):
    """A runner that waits before each step until it is let go on, and says what it begins."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.go = threading.Semaphore(0)
        self.begun: list[str] = []
        self.entered: Queue[None] = Queue()

    def begin(self, draft: Draft) -> None:
        """Wait, and begin."""
        self.begun.append(str(len(draft.prompt)))
        self.entered.put(None)
        self.go.acquire(timeout=LONG)
        super().begin(draft)


@pytest.fixture
def started() -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(session: Session, runner: Runner | None = None, **options: Any) -> Engine:
        engines.append(Engine(session, runner, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


@pytest.mark.parametrize("rows", [1, 3])
def test_many_clients_get_what_they_would_alone(session: Session, started: Callable[..., Engine], rows: int) -> None:
    wanted = [expected(session, number, 4 + number) for number in range(6)]
    engine = started(session, open_runner(session, rows, 512))
    inboxes = [Inbox(engine, question(number % 6, 4 + number % 6, client=str(number % 4))) for number in range(18)]
    for number, inbox in enumerate(inboxes):
        end = inbox.end()
        assert isinstance(end, Ended), end
        assert end.answer.text == inbox.text == wanted[number % 6]
        kinds = [type(event) for event in inbox.events]
        assert kinds[0] is Begun
        assert kinds.count(Begun) == kinds.count(Ended) == 1
        assert set(kinds[1:-1]) <= {Piece}
    assert (engine.running, engine.waiting) == (0, 0)


def test_what_is_known_comes_before_the_first_token(session: Session, started: Callable[..., Engine]) -> None:
    inbox = Inbox(started(session), question(0))
    inbox.end()
    begun = inbox.events[0]
    assert isinstance(begun, Begun)
    assert [len(one.indices) for one in begun.known.pruning] == [16]


def test_a_full_queue_refuses_and_clients_take_turns(session: Session, started: Callable[..., Engine]) -> None:
    runner = Slow(session)
    engine = started(session, runner, max_queue=4)
    first = Inbox(engine, question(0, client="greedy"))
    runner.entered.get(timeout=LONG)
    order: list[str] = []
    waiting: list[Inbox] = []
    for name, client in {"g1": "greedy", "g2": "greedy", "g3": "greedy", "m1": "modest"}.items():
        waiting.append(Inbox(engine, question(len(waiting), client=client), partial(order.append, name)))
    with pytest.raises(QueueFullError, match="4 requests wait"):
        engine.ask(question(9), print)
    runner.go.release(10)
    for inbox in (first, *waiting):
        assert isinstance(inbox.end(), Ended)
    assert order == ["g1", "m1", "g2", "g3"]


def test_a_question_given_up_frees_its_place(session: Session, started: Callable[..., Engine]) -> None:
    runner = Slow(session)
    engine = started(session, runner)
    running, waiting, last = (Inbox(engine, question(number, 200)) for number in range(3))
    runner.entered.get(timeout=LONG)
    running.ticket.cancel()
    waiting.ticket.cancel()
    runner.go.release(10)
    assert isinstance(last.end(), Ended)
    assert running.ended.empty()
    assert waiting.ended.empty()
    assert len(runner.begun) == 2
    assert runner._tokens == {}


def test_time_is_limited_in_the_queue_and_while_running(session: Session, started: Callable[..., Engine]) -> None:
    runner = Slow(session)
    engine = started(session, runner)
    late = perf_counter() - 10
    running, waiting = (Inbox(engine, question(number, 400, start=late, limit=limit)) for number, limit in ((0, 11), (1, 11)))
    runner.entered.get(timeout=LONG)
    while perf_counter() < late + 11.05:
        threading.Event().wait(0.05)
    runner.go.release(10)
    for inbox in (running, waiting):
        end = inbox.end()
        assert isinstance(end, Failed)
        assert isinstance(end.error, TimeLimitError)


def test_stopping_finishes_what_runs_and_refuses_what_waits(session: Session, started: Callable[..., Engine]) -> None:
    runner = Slow(session)
    engine = started(session, runner)
    running, waiting = Inbox(engine, question(0)), Inbox(engine, question(1))
    runner.entered.get(timeout=LONG)
    stopping = threading.Thread(target=engine.stop, args=(LONG,))
    stopping.start()
    runner.go.release(10)
    stopping.join(LONG)
    assert isinstance(running.end(), Ended)
    end = waiting.end()
    assert isinstance(end, Failed)
    assert isinstance(end.error, ShuttingDownError)
    assert not engine.alive
    with pytest.raises(ShuttingDownError):
        engine.ask(question(0), print)


def test_stopping_without_patience_ends_what_runs(session: Session, started: Callable[..., Engine]) -> None:
    engine = started(session)
    running = Inbox(engine, question(0, 400))
    while not running.text:
        threading.Event().wait(0.001)
    engine.stop(0.0)
    end = running.end()
    assert isinstance(end, Failed | Ended)


def test_a_prompt_that_is_too_long_is_refused_before_its_picture_is_encoded(
    session: Session, started: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any) -> None:
        raise AssertionError("encoded")

    monkeypatch.setattr(type(session.encoder), "encode", encode)
    end = Inbox(started(session), question(0, max_prompt=20)).end()
    assert isinstance(end, Failed)
    assert isinstance(end.error, ContextOverflowError)
    assert "at most 20 are read" in str(end.error)


def test_errors_are_one_requests_own(session: Session, started: Callable[..., Engine]) -> None:
    engine = started(session)
    bad = Question([user_message("Hm", 1)], [b"no picture"], GenerateOptions(4))
    end = Inbox(engine, bad).end()
    assert isinstance(end, Failed)
    assert isinstance(end.error, InputError)
    assert isinstance(Inbox(engine, question(0)).end(), Ended)


class Broken(InTurn):
    """Fails at every step, in a way of its own."""

    def step(self, drafts: Sequence[Draft]) -> dict[int, Exception]:
        """Fail."""
        raise RuntimeError("secret")


def test_a_fault_of_ours_is_told_without_its_words(session: Session, started: Callable[..., Engine]) -> None:
    engine = started(session, Broken(session))
    end = Inbox(engine, question(0)).end()
    assert isinstance(end, Failed)
    assert isinstance(end.error, BackendError)
    assert "secret" not in str(end.error)
    assert engine.running == 0


def test_a_listener_that_fails_costs_nobody_else(session: Session, started: Callable[..., Engine]) -> None:
    engine = started(session)

    def closed(event: Event) -> None:
        raise RuntimeError("event loop is closed")

    engine.ask(question(0), closed)
    assert isinstance(Inbox(engine, question(1)).end(), Ended)
