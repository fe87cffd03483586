"""An answer in the making."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

from leanvlm.runtime.answer import Answer
from leanvlm.runtime.errors import InputError


class Generation:
    """An answer in the making: iterate over its pieces of text; `answer` is there when they end.

    Nothing is decoded before a piece is asked for. It is one stream: a second loop goes on where the first one stopped, and
    threads that share it share its pieces out. Whoever stops early may go on later, or call `close`; an object that is
    dropped closes itself. Nothing else waits for it: it has a cache of its own.
    """

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self._pieces = pieces
        self._turn = threading.RLock()
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._turn:
            try:
                return next(self._pieces)
            except StopIteration as end:
                # A generator says what it returned once; later it only says that it has ended.
                self._answer = end.value or self._answer
                raise StopIteration from None

    def close(self) -> None:
        """Give the answer up, with its cache; one that has ended stays as it is."""
        with self._turn:
            self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The finished answer; runs the generation to its end if that was not done.

        Raises:
            InputError: It was closed, or failed, before its end.
        """
        for _ in self:
            pass
        if self._answer is None:
            raise InputError("this answer was given up before its end; ask again")
        return self._answer
