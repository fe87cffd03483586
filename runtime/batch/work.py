"""What a worker does: it opens the bundle once, and answers rows; a row that fails becomes its error."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvlm.runtime.answer import Answer
from leanvlm.runtime.batch.source import Row
from leanvlm.runtime.errors import BackendError, InputError
from leanvlm.runtime.preprocess import ImageSource
from leanvlm.runtime.serving.engine import Ended, Engine, Event, Failed, Question
from leanvlm.runtime.serving.runners import open_runner
from leanvlm.runtime.session import load, user_message

AHEAD = 2
"""Questions in hand for each row of a step, so that the next is there when one ends."""

BROKEN = 16
"""So many rows one after another that fail for no reason of their own: the device is lost, and the others would be too."""


@dataclass(frozen=True)
class Job:
    """How all rows are answered.

    Attributes:
        bundle: Its folder.
        budget: Image tokens kept per crop; None is the bundle's default.
        device: As `load` takes it.
        provider: Likewise.
        threads: Likewise, of each worker.
        rows: Answers at once, with one run of the decoder for a token of each; 1 answers as `Session.generate` does.
        options: As `Session.stream` takes them.
    """

    bundle: Path
    budget: int | None
    device: str | None
    provider: str | None
    threads: int | None
    rows: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a row: an answer, or its error; the columns that the output adds.

    Attributes:
        kept: Image tokens that the decoder read, of all images.
        total: The same unpruned.
    """

    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    kept: int | None = None
    total: int | None = None
    time_to_first_token_ms: float | None = None
    error: str | None = None


class Worker:
    """Answers rows with a session of its own.

    Raises:
        LeanVLMError: The bundle cannot be used, or not for so many answers at once.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._session = load(job.bundle, device=job.device, threads=job.threads, provider=job.provider)
        self._engine: Engine | None = None
        if job.rows > 1:
            self._engine = Engine(self._session, open_runner(self._session, job.rows), AHEAD * job.rows)
        self._broken = 0

    def answers(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Answer rows, in their order.

        Raises:
            BackendError: `BROKEN` rows one after another failed, each for no reason of its own.
        """
        waiting: deque[Future[Answer]] = deque()
        for row in rows:
            waiting.append(self._ask(row))
            if len(waiting) >= AHEAD * self._job.rows or self._engine is None:
                yield self._outcome(waiting.popleft())
        while waiting:
            yield self._outcome(waiting.popleft())

    def _ask(self, row: Row) -> Future[Answer]:
        answer: Future[Answer] = Future()
        try:
            if row.error is not None:
                raise InputError(row.error)
            if self._engine is None:
                answer.set_result(self._session.generate(row.prompt, row.images, budget=self._job.budget, **self._job.options))
            else:
                images: list[ImageSource] = [*row.images]
                options = self._session.settings.options(**self._job.options)
                question = Question([user_message(row.prompt, len(images))], images, options, self._job.budget)
                self._engine.ask(question, lambda event: _settle(answer, event))
        except Exception as error:
            answer.set_exception(error)
        return answer

    def _outcome(self, waiting: Future[Answer]) -> Outcome:
        try:
            answer = waiting.result()
        except InputError as error:
            return Outcome(error=str(error))
        except Exception as error:
            self._broken += 1
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if self._broken >= BROKEN:
                raise BackendError(f"{BROKEN} rows failed one after another, the last with {told}") from error
            return Outcome(error=told)
        self._broken = 0
        return Outcome(
            text=answer.text,
            finish_reason=answer.finish_reason,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=len(answer.token_ids),
            kept=sum(image.kept for image in answer.images),
            total=sum(image.total for image in answer.images),
            time_to_first_token_ms=answer.timings.time_to_first_token,
        )

    def close(self) -> None:
        """End what runs, and close the session."""
        if self._engine is not None:
            self._engine.stop()
        self._session.close()


def _settle(answer: Future[Answer], event: Event) -> None:
    if isinstance(event, Ended):
        answer.set_result(event.answer)
    elif isinstance(event, Failed):
        answer.set_exception(event.error)
