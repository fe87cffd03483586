"""Sequences of a decoder: every answer in the making has a cache of its own, whoever else is being answered.

A backend says what a cache is; who has which one is decided here, for all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.prompt import Prompt

if TYPE_CHECKING:
    from leanvlm.runtime.backends import Scores


class Cache(Protocol):
    """The keys and values of one sequence, with the tensors that its runs read and write.

    Attributes:
        capacity: Positions that it holds.
    """

    capacity: int

    def load(self, prompt: Prompt) -> None:
        """Begin a sequence: put a prompt's embeddings where `prefill` reads them (the stage splice)."""
        ...

    def prefill(self) -> Scores:
        """Read the loaded prompt; the scores are those of its last position. They hold until the cache's next call."""
        ...

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int) -> Scores:
        """Append one token's embedding (D,) at a position and return the scores of the next, which hold as above."""
        ...


class DecoderSequence:
    """One sequence and its cache, until it is closed. Closing touches nothing on the device, so any thread may do it."""

    def __init__(self, cache: Cache) -> None:
        self._cache: Cache | None = cache

    @property
    def cache(self) -> Cache:
        """The cache, which is not there any more once the sequence is closed."""
        assert self._cache is not None, "the sequence is closed"
        return self._cache

    @property
    def closed(self) -> bool:
        """Whether the cache was given back."""
        return self._cache is None

    def load(self, prompt: Prompt) -> None:
        """Put a prompt's embeddings where `prefill` reads them (the stage splice)."""
        self.cache.load(prompt)

    def prefill(self) -> Scores:
        """Read the loaded prompt; the scores are those of its last position. They hold until the sequence's next call."""
        return self.cache.prefill()

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int) -> Scores:
        """Append one token's embedding (D,) at a position and return the scores of the next, which hold as above."""
        return self.cache.step(embedding, position)

    def close(self) -> None:
        """Give the cache back; more than once does nothing."""
        self._cache = None


class Decoder:
    """Opens sequences.

    One cache is kept from sequence to sequence, so that an answer after another finds the memory, the addresses and the
    captured graphs of the one before. A sequence opened while another has that cache gets one that goes with it.

    Args:
        make: Returns a cache of at least so many positions; the second argument says whether it will be kept.
    """

    def __init__(self, make: Callable[[int, bool], Cache]) -> None:
        self._make = make
        self._kept: Cache | None = None
        # Weak, so that a sequence that nobody closed gives its cache back too.
        self._holder: Callable[[], DecoderSequence | None] = lambda: None

    def sequence(self, capacity: int) -> DecoderSequence:
        """Open a sequence of at most `capacity` positions."""
        holder = self._holder()
        if holder is not None and not holder.closed:
            return DecoderSequence(self._make(capacity, False))
        if self._kept is None or self._kept.capacity < capacity:
            # The old one goes first, so that both need not fit at once.
            self._kept = None
            self._kept = self._make(capacity, True)
        sequence = DecoderSequence(self._kept)
        self._holder = weakref.ref(sequence)
        return sequence
