"""Sequences of a decoder: every answer in the making has a cache of its own, whoever else is being answered.

A backend says what a cache is; who has which one is decided here, for all of them, and what of it need not be read again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.reuse import Held, SavedRows

if TYPE_CHECKING:
    from leanvlm.runtime.backends import Scores
    from leanvlm.runtime.backends.ahead import Flight

# Positions that a first cache has beyond need where sequences go on from it: some turns of a chat. Moving a picture's 576 rows
# into a larger one took a third turn of 60 ms to 520 (OpenVINO, 12 layers).
SPARE = 256
# A sequence may go on behind any of a cache's rows; or behind the last only, where states are of all that was read.
Reuse = Literal["any", "end", "nothing"]


class Cache(Protocol):
    """The keys and values of one sequence, with the tensors that its runs read and write.

    Attributes:
        capacity: Positions that it holds.
        length: Rows that are filled.
    """

    capacity: int
    length: int

    def load(self, prompt: Prompt, past: int = 0) -> None:
        """Put a prompt's embeddings where `prefill` reads them (the stage splice).

        Args:
            prompt: What is read; without what the cache holds of it.
            past: How many of the filled rows stay; 0 begins a sequence. More is asked only of caches that can (`Reuse`).
        """
        ...

    def prefill(self) -> Scores:
        """Read the loaded prompt; the scores are those of its last position. They hold until the cache's next call."""
        ...

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int) -> Scores:
        """Append one token's embedding (D,) at a position and return the scores of the next, which hold as above."""
        ...


class Movable(Protocol):
    """A cache whose rows may be put into a larger one."""

    def saved(self, count: int) -> SavedRows:
        """Return copies of the first rows."""
        ...

    def restore(self, saved: SavedRows) -> None:
        """Fill the first rows of a cache that is new."""
        ...


class DecoderSequence:
    """One sequence and its cache, until it is closed.

    Closing touches nothing on the device, so any thread may do it; it waits for a step that was begun and not asked for.

    Args:
        cache: The cache.
        held: What its rows were made of; kept up to date here.
        past: How many of them the prompt begins with.

    Attributes:
        past: Rows of the prompt that are not read again.
    """

    def __init__(self, cache: Cache, held: Held | None = None, past: int = 0) -> None:
        self._cache: Cache | None = cache
        self._held = Held() if held is None else held
        self._prompt: Prompt | None = None
        self._scores: Scores | None = None
        self._flight: Flight | None = None
        self.past = past

    @property
    def cache(self) -> Cache:
        """The cache itself, from which nothing is reused then: whoever has it may fill it with anything."""
        self._held.is_known = False
        return self._open()

    def _open(self) -> Cache:
        """Return the cache, which is not there any more once the sequence is closed."""
        assert self._cache is not None, "the sequence is closed"
        return self._cache

    @property
    def closed(self) -> bool:
        """Whether the cache was given back."""
        return self._cache is None

    def load(self, prompt: Prompt) -> None:
        """Put a prompt's embeddings where `prefill` reads them (the stage splice)."""
        # Whatever fails from here on, only what is sure to be there counts as held.
        self._held.cut(self.past)
        if self.past:
            self._open().load(prompt.tail(self.past), self.past)
        else:
            self._open().load(prompt)
        self._prompt = prompt

    def prefill(self) -> Scores:
        """Read the loaded prompt; the scores are those of its last position. They hold until the sequence's next call."""
        self._scores = scores = self._open().prefill()
        if self._prompt is not None:
            past, prompt, self._prompt = self.past, self._prompt, None
            self._held.add(prompt.keys()[past:], prompt.positions[:, past:], prompt.last_seen[past:].tolist())
        return scores

    def step(self, embedding: npt.NDArray[np.floating[Any]], position: int, token: int | None = None) -> Scores:
        """Append one token's embedding (D,) at a position and return the scores of the next, which hold as above.

        Args:
            embedding: Of the token.
            position: On every axis.
            token: Which it is; of one that is not said nothing is reused.
        """
        flight, self._flight = self._flight, None
        cache: Any = self._open()
        if flight is not None and token is not None and (flight.token, flight.position) == (token, position):
            self._scores = cache.take(flight)
        else:
            self._scores = cache.step(embedding, position)
        self.note(token, position)
        return self._scores

    def note(self, token: int | None, position: int) -> None:
        """Say that a token was appended to the cache."""
        axes = len(self._held.positions[0]) if len(self._held) else 1
        key = object() if token is None else token
        self._held.add([key], np.full((axes, 1), position), [len(self._held)])

    def ahead(self, row: Callable[[int], Any], position: int, ends: Collection[int]) -> None:
        """Say that the next step will be that of the best token; a cache that can begins it, and returns when it is known.

        The last scores' `greedy` holds then; their logits do not.

        Args:
            row: Looks the embedding of a token up, (D,).
            position: Of the next step.
            ends: Tokens behind which there is none.
        """
        cache: Any = self._open()
        if hasattr(cache, "begin"):
            self._flight = cache.begin(self._scores, row, position, ends)

    def close(self) -> None:
        """Give the cache back, with nothing going on in it; more than once does nothing."""
        cache: Any = self._cache
        self._cache = self._flight = None
        if hasattr(cache, "settle"):
            cache.settle()


class Decoder:
    """Opens sequences.

    One cache is kept from sequence to sequence, so that an answer after another finds the memory, the addresses and the
    captured graphs of the one before. A sequence opened while another has that cache gets one that goes with it.

    Args:
        make: Returns a cache of at least so many positions; the second argument says whether it will be kept.
        reuse: How a sequence may go on from what the kept cache holds.
        least: Share of a prompt that must be held for that; where going on has a price, less is read anew sooner.
    """

    def __init__(self, make: Callable[[int, bool], Cache], reuse: Reuse = "nothing", least: float = 0.0) -> None:
        self._make = make
        self._reuse = reuse
        self._least = least
        self._kept: Cache | None = None
        self._held = Held()
        # Weak, so that a sequence that nobody closed gives its cache back too.
        self._holder: Callable[[], DecoderSequence | None] = lambda: None

    def sequence(self, capacity: int, prompt: Prompt | None = None, limit: int | None = None) -> DecoderSequence:
        """Open a sequence.

        Args:
            capacity: Positions that it has at most.
            prompt: What it will load, to go on from what the kept cache holds of it; None begins anew.
            limit: What a cache may grow to, ahead of need: a conversation that grows moves seldom then.
        """
        holder = self._holder()
        if holder is not None and not holder.closed:
            return DecoderSequence(self._make(capacity, False))
        past = 0 if prompt is None or self._kept is None else self._reusable(prompt, self._kept)
        if self._kept is None or self._kept.capacity < capacity:
            past = self._grow(capacity, past, limit, SPARE if prompt is not None else 0)
        if not past:
            self._held = Held()
        assert self._kept is not None
        sequence = DecoderSequence(self._kept, self._held, past)
        self._holder = weakref.ref(sequence)
        return sequence

    def _reusable(self, prompt: Prompt, kept: Cache) -> int:
        """Return how many rows of a prompt the kept cache holds, in a way that it can go on from."""
        if self._reuse == "nothing" or kept.length < len(self._held):
            return 0
        past = self._held.shared(prompt)
        if past < self._least * len(prompt):
            return 0
        return past if self._reuse == "any" or past == len(self._held) == kept.length else 0

    def _grow(self, capacity: int, past: int, limit: int | None, spare: int) -> int:
        """Make the kept cache larger, and return how many of its rows came along: all that are wanted, or none."""
        old = self._kept
        if limit is not None and self._reuse != "nothing":
            capacity = max(capacity, min(capacity + spare if old is None else 2 * old.capacity, limit))
        movable: Any = old if past and hasattr(old, "saved") else None
        saved = None if movable is None else movable.saved(past)
        # The old one goes first, so that both need not fit at once.
        old = movable = self._kept = None
        self._kept = made = self._make(capacity, True)
        if saved is None:
            return 0
        new: Any = made
        new.restore(saved)
        return past
