"""What answers a server's requests: a fair queue, and one thread that works on as many answers at once as the runner takes.

Whoever asks gets events, called on the engine's thread: `Begun` once the images are encoded, a `Piece` for each piece of text,
and `Ended` or `Failed` exactly once, as the last. Listeners must return at once.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from leanvlm.runtime.answer import Answer, TokenChance
from leanvlm.runtime.draft import Draft, Room
from leanvlm.runtime.errors import (
    BackendError,
    LeanVLMError,
    QueueFullError,
    ShuttingDownError,
    TimeLimitError,
)
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.preprocess import ImageSource
from leanvlm.runtime.serving.runners import InTurn, Runner
from leanvlm.runtime.session import Session
from leanvlm.runtime.text import Message

MAX_QUEUE = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A request.

    Attributes:
        messages: The conversation, with an image part for each image.
        images: In order.
        options: How to generate.
        budget: Image tokens kept per crop; None is the bundle's default.
        client: Whose it is: clients take turns, whoever asks more.
        start: `perf_counter()` when the request came.
        limit: Seconds from `start` after which it is given up.
        max_prompt: Positions that the prompt may take, kept image tokens included; None is what the context holds.
    """

    messages: Sequence[Message]
    images: Sequence[ImageSource]
    options: GenerateOptions
    budget: int | None = None
    client: str = ""
    start: float = field(default_factory=perf_counter)
    limit: float = float("inf")
    max_prompt: int | None = None


@dataclass(frozen=True)
class Begun:
    """The prompt is put together: what is known of the answer before its first token."""

    known: Answer


@dataclass(frozen=True)
class Piece:
    """Text, and the log-probabilities of the tokens since the last piece if they were asked for."""

    text: str
    chances: tuple[TokenChance, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The answer is finished."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    error: Exception


Event = Begun | Piece | Ended | Failed


class Ticket:
    """A question that was asked.

    Attributes:
        question: What was asked.
        cancelled: Whether nobody waits for the answer any more.
    """

    def __init__(self, question: Question, listener: Callable[[Event], None], wake: Callable[[], None]) -> None:
        self.question = question
        self.cancelled = False
        self._listener = listener
        self._wake = wake
        self._given = 0
        self.draft: Draft | None = None

    def cancel(self) -> None:
        """Give the answer up; its place is free after the step in hand. Any thread may, at any time."""
        self.cancelled = True
        self._wake()

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return perf_counter() - self.question.start > self.question.limit

    def tell(self, event: Event) -> None:
        """Hand an event to whoever asked."""
        if self.cancelled:
            return
        try:
            self._listener(event)
        except Exception:
            # Such as an event loop that is closed: nobody waits then.
            _log.debug("a listener failed", exc_info=True)
            self.cancelled = True

    def give(self, text: str) -> None:
        """Hand text over, with what is known of the tokens that have made it."""
        assert self.draft is not None
        chances = tuple(self.draft.chances[self._given :])
        if text:
            self._given = len(self.draft.chances)
            self.tell(Piece(text, chances))


class Engine:
    """Answers questions with one session.

    Args:
        session: Stays the caller's, who closes it after `stop`.
        runner: How answers advance; None takes them one after another.
        max_queue: Questions that may wait.
    """

    def __init__(self, session: Session, runner: Runner | None = None, max_queue: int = MAX_QUEUE) -> None:
        self.session = session
        self.max_queue = max_queue
        self._runner = InTurn(session) if runner is None else runner
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._give_up = False
        self._thread = threading.Thread(target=self._serve, name="leanvlm-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Questions in the queue."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Answers in the making."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive() and not self._stopping

    def ask(self, question: Question, listener: Callable[[Event], None]) -> Ticket:
        """Put a question into the queue.

        Args:
            question: It.
            listener: Is told of events on the engine's thread.

        Raises:
            QueueFullError: As many wait as may.
            ShuttingDownError: The engine is stopped.
        """
        ticket = Ticket(question, listener, self._wake)
        with self._changed:
            if not self.alive:
                raise ShuttingDownError("the server is shutting down; ask another one")
            if sum(map(len, self._waiting.values())) >= self.max_queue:
                raise QueueFullError(f"{self.max_queue} requests wait already; ask again later")
            self._waiting.setdefault(question.client, deque()).append(ticket)
            self._changed.notify_all()
        return ticket

    def stop(self, grace: float = 0.0) -> None:
        """Answer nothing new: what waits fails, what runs may go on for `grace` seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(grace)
        self._give_up = True
        self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._running or self._waiting or self._stopping):
                    self._changed.wait()
                refused = self._refused()
                if self._stopping and not self._running:
                    ticket, over = None, True
                else:
                    ticket, over = self._next(), False
            for one, error in refused:
                one.tell(Failed(error))
            if over:
                return
            if ticket is not None:
                self._begin(ticket)
            self._advance()

    def _refused(self) -> list[tuple[Ticket, LeanVLMError]]:
        """Take out of the queue what will not be answered."""
        refused: list[tuple[Ticket, LeanVLMError]] = []
        for client, line in list(self._waiting.items()):
            for ticket in list(line):
                if self._stopping:
                    refused.append((ticket, ShuttingDownError("the server is shutting down; ask another one")))
                elif ticket.late:
                    refused.append((ticket, _too_late(ticket)))
                elif not ticket.cancelled:
                    continue
                line.remove(ticket)
            if not line:
                del self._waiting[client]
        return refused

    def _next(self) -> Ticket | None:
        """Return the question that is answered next, if there is a place for one: of the client whose turn it is."""
        if not self._waiting or len(self._running) >= self._runner.places:
            return None
        client, line = next(iter(self._waiting.items()))
        ticket = line.popleft()
        if line:
            self._waiting.move_to_end(client)
        else:
            del self._waiting[client]
        return ticket

    def _begin(self, ticket: Ticket) -> None:
        question = ticket.question
        try:
            ticket.draft = draft = self.session.draft(
                question.messages,
                question.images,
                question.options,
                budget=question.budget,
                start=question.start,
                room=Room(self._runner.capacity, question.max_prompt),
            )
            ticket.tell(Begun(draft.known))
            self._running.append(ticket)
            self._runner.begin(draft)
        except Exception as error:
            self._fail(ticket, error)
            return
        self._push(ticket)

    def _advance(self) -> None:
        for ticket in list(self._running):
            if ticket.cancelled or self._give_up:
                self._fail(ticket, ShuttingDownError("the server is shutting down"))
            elif ticket.late:
                self._fail(ticket, _too_late(ticket))
        going = [ticket for ticket in self._running if ticket.draft is not None]
        if not going:
            return
        try:
            failed = self._runner.step([ticket.draft for ticket in going if ticket.draft is not None])
        except Exception as error:
            failed = dict.fromkeys(range(len(going)), error)
        for number, ticket in enumerate(going):
            if number in failed:
                self._fail(ticket, failed[number])
            else:
                self._push(ticket)

    def _push(self, ticket: Ticket) -> None:
        """Hand the newest token's text over, and end an answer that has all of them."""
        draft = ticket.draft
        assert draft is not None
        try:
            ticket.give(draft.push())
            if draft.done:
                ticket.give(draft.flush())
                self._leave(ticket)
                ticket.tell(Ended(draft.answer))
        except Exception as error:
            self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        self._leave(ticket)
        if not isinstance(error, LeanVLMError):
            _log.error("a request failed", exc_info=error)
            error = BackendError(f"the request failed: {type(error).__name__}")
        ticket.tell(Failed(error))

    def _leave(self, ticket: Ticket) -> None:
        if ticket.draft is not None:
            self._runner.end(ticket.draft)
        if ticket in self._running:
            self._running.remove(ticket)


def _too_late(ticket: Ticket) -> TimeLimitError:
    return TimeLimitError(f"the request took over {ticket.question.limit:g} s; ask for fewer tokens, or raise --max-seconds")
