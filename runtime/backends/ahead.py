"""The next step, begun on the device's thread as soon as its token is known, while an answer's text is still made.

Between two steps the best token comes down from the device and its embedding goes up. Done by whoever makes the answer, waking
threads, Python's other work and copies one by one took 0.36 ms of 6.2 for each token of a 7B model on an H100, in which the GPU
had nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from queue import SimpleQueue
from typing import Protocol

from leanvlm.runtime.backends.device import DeviceScores
from leanvlm.runtime.backends.thread import Job


class Flight:
    """A step that is begun before somebody asks for it.

    Args:
        scores: Of the run before; their best token is what the step reads.
        position: Of the step.
        ends: Tokens behind which no step is made.
        start: Gives work to the device's thread.
        step: Runs the step of a token, on that thread; calls its second argument when the run begins. Whoever waits for the
            token is woken then: earlier, its Python code would hold up the run.

    Attributes:
        job: The work.
        token: What is read; None where no step is made.
        position: Where.
    """

    def __init__(
        self,
        scores: DeviceScores,
        position: int,
        ends: Collection[int],
        start: Callable[[Callable[[], object]], Job],
        step: Callable[[int, Callable[[], None]], None],
    ) -> None:
        self.token: int | None = None
        self.position = position
        known: SimpleQueue[None] = SimpleQueue()

        def work() -> None:
            try:
                if scores.failed:
                    return
                # Whoever asks the scores now is told this token: the step overwrites what it was read from.
                token = scores.greedy()
                if token not in ends:
                    self.token = token
                    step(token, lambda: known.put(None))
            finally:
                known.put(None)

        self.job = start(work)
        known.get()


class Eager(Protocol):
    """A cache that can begin its next step before it is asked for."""

    def begin(self, scores: DeviceScores, row: Callable[[int], object], position: int, ends: Collection[int]) -> Flight | None:
        """Begin the step of the best token of the last run, and return when that is known; None where it cannot be."""
        ...

    def take(self, flight: Flight) -> DeviceScores:
        """Count a step that was begun as made, and return its scores."""
        ...

    def settle(self) -> None:
        """Return when nothing is going on any more; errors are of no interest then."""
        ...
