"""What a worker does: it opens the bundle once, and answers rows; a row that fails becomes its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvlm.runtime.batch.source import Row
from leanvlm.runtime.errors import BackendError, InputError
from leanvlm.runtime.session import load

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
        options: As `Session.stream` takes them.
    """

    bundle: Path
    budget: int | None
    device: str | None
    provider: str | None
    threads: int | None
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
        LeanVLMError: The bundle cannot be used.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._session = load(job.bundle, device=job.device, threads=job.threads, provider=job.provider)
        self._broken = 0

    def answer(self, row: Row) -> Outcome:
        """Answer a row.

        Raises:
            BackendError: `BROKEN` rows one after another failed, each for another reason than its own.
        """
        if row.error is not None:
            return Outcome(error=row.error)
        job = self._job
        try:
            answer = self._session.generate(row.prompt, row.images, budget=job.budget, **job.options)
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
        """Close the session."""
        self._session.close()
