"""How a server's answers advance: one after another, or several in one run of the decoder."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

from leanvlm.runtime.draft import Draft
from leanvlm.runtime.session import Session


class Runner(Protocol):
    """Adds tokens to drafts; all calls come from one thread.

    Attributes:
        places: Drafts that it works on at once, at most.
    """

    places: int

    def begin(self, draft: Draft) -> None:
        """Read a draft's prompt and add its first token."""
        ...

    def step(self, drafts: Sequence[Draft]) -> dict[int, Exception]:
        """Add a token to each of the drafts that were begun; returns errors by the number of the draft that failed."""
        ...

    def end(self, draft: Draft) -> None:
        """Give the place of a draft back, finished or not; does nothing for one that was never begun."""
        ...


class InTurn:
    """One draft at a time, as a session alone answers: with its cache, its captured graphs and steps begun ahead."""

    places = 1

    def __init__(self, session: Session) -> None:
        self._session = session
        self._tokens: dict[Draft, Generator[None, None, None]] = {}

    def begin(self, draft: Draft) -> None:
        """Read a draft's prompt and add its first token."""
        self._tokens[draft] = tokens = self._session.tokens(draft)
        next(tokens)

    def step(self, drafts: Sequence[Draft]) -> dict[int, Exception]:
        """Add a token to each of the drafts."""
        failed: dict[int, Exception] = {}
        for number, draft in enumerate(drafts):
            try:
                next(self._tokens[draft])
            except Exception as error:
                failed[number] = error
        return failed

    def end(self, draft: Draft) -> None:
        """Give a draft's cache back."""
        tokens: Any = self._tokens.pop(draft, None)
        if tokens is not None:
            tokens.close()
