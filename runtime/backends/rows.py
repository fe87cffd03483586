"""Several sequences in one buffer: each reads its prompt alone, and one run of the decoder adds a token to any of them.

A sequence has a row of the buffer, which is a cache like any other; rows have lengths of their own. A run takes a block of rows
that lie side by side, since that is what a decoder's batch is. Rows of the block that nobody wants are run along: what that
writes lies behind what they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from leanvlm.runtime.backends.sequences import Cache, DecoderSequence
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.reuse import Held
from leanvlm.runtime.specs import DecoderSpec

if TYPE_CHECKING:
    from leanvlm.runtime.backends import Scores

Array = npt.NDArray[Any]
ROLES = frozenset({"embeddings", "mask", "positions", "last_position", "key", "value"})
"""Inputs of a decoder that rows of different lengths can share a run of."""


@dataclass(frozen=True)
class Step:
    """One token for one row.

    Attributes:
        row: Which.
        token: What it reads.
        position: Where, on every axis.
    """

    row: int
    token: int
    position: int


@dataclass(frozen=True)
class Next:
    """The step behind a row's last one, whose token is not known yet: the best one.

    Attributes:
        row: Which.
        position: Where, on every axis.
        ends: Tokens behind which there is none.
    """

    row: int
    position: int
    ends: Collection[int]


class Rows(Protocol):
    """The buffer and what runs on it. All is called under the backend's lock.

    Attributes:
        capacity: Positions of each row.
    """

    capacity: int

    @property
    def caches(self) -> Sequence[Cache]:
        """One for each row."""
        ...

    def warm(self) -> None:
        """Make everything ready that the first steps would wait for; no row holds anything yet."""
        ...

    def step(self, steps: Sequence[Step], embed: Callable[[int], Array]) -> dict[int, Scores]:
        """Append a token to each of some rows; the scores of each hold until the next call.

        Args:
            steps: At least one; no row twice.
            embed: Looks the embedding of a token up, (D,).
        """
        ...

    def ahead(self, steps: Sequence[Next], embed: Callable[[int], Array]) -> None:
        """Say what the next steps will be: whoever can begins them. Of the last scores `greedy` holds then, not `logits`."""
        ...

    def settle(self) -> None:
        """Return when nothing is going on any more."""
        ...


def takes_rows(spec: DecoderSpec) -> bool:
    """Return whether a decoder can run several sequences at once: it has neither states nor a mask of its own."""
    return spec.cache == "shared" and set(spec.roles.values()) <= ROLES


def block(rows: Collection[int], among: int) -> tuple[int, int]:
    """Return the first row and the number of rows of the smallest block that holds some rows.

    Blocks have 1, 2, 4, … rows and begin at multiples of that, so that few are ever captured.
    """
    size = 1
    while min(rows) // size != max(rows) // size:
        size *= 2
    first = min(rows) // size * size
    return first, min(size, among - first)


class Pool:
    """Gives rows to sequences, and remembers what rows that are free hold.

    Args:
        rows: The buffer.
        embed: Looks the embedding of a token up, (D,).
        reuse: Whether a sequence may go on from what a row holds.
    """

    def __init__(self, rows: Rows, embed: Callable[[int], Array], reuse: bool = True) -> None:
        self.rows = rows
        self._embed = embed
        self._reuse = reuse
        self._held = [Held() for _ in rows.caches]
        self._taken: dict[int, RowSequence] = {}
        self._used = [0] * len(rows.caches)
        self._clock = count(1)

    @property
    def free(self) -> list[int]:
        """Rows that no sequence has."""
        return [row for row in range(len(self._held)) if row not in self._taken]

    def sequence(self, prompt: Prompt) -> RowSequence:
        """Open a sequence in the row that holds most of the prompt; where none holds half, in one that keeps blocks small."""
        shared = {row: self._held[row].shared(prompt) if self._reuse else 0 for row in self.free}
        # What all prompts begin with is no reason to give up what another conversation left.
        shared = {row: count if 2 * count >= len(prompt) else 0 for row, count in shared.items()}
        row = min(shared, key=lambda one: (-shared[one], block([one, *self._taken], len(self._held))[1], self._used[one], one))
        if not shared[row]:
            self._held[row] = Held()
        self._used[row] = next(self._clock)
        self._taken[row] = sequence = RowSequence(self, row, self.rows.caches[row], self._held[row], shared[row])
        return sequence

    def step(self, sequences: Sequence[RowSequence], tokens: Sequence[int], positions: Sequence[int]) -> list[Scores]:
        """Append a token to each of some sequences, and return the scores of each, which hold until the next call."""
        steps = [Step(one.row, token, at) for one, token, at in zip(sequences, tokens, positions, strict=True)]
        scores = self.rows.step(steps, self._embed)
        for one, step in zip(sequences, steps, strict=True):
            one.note(step.token, step.position)
        return [scores[step.row] for step in steps]

    def ahead(self, sequences: Sequence[RowSequence], positions: Sequence[int], ends: Sequence[Collection[int]]) -> None:
        """Say that each of some sequences will next read the best token of its last run."""
        steps = [Next(one.row, at, stops) for one, at, stops in zip(sequences, positions, ends, strict=True)]
        self.rows.ahead(steps, self._embed)

    def leave(self, row: int) -> None:
        """Take a row back."""
        self._taken.pop(row, None)


class RowSequence(DecoderSequence):
    """A sequence with a row of a pool; its steps are the pool's."""

    def __init__(self, pool: Pool, row: int, cache: Cache, held: Held, past: int) -> None:
        super().__init__(cache, held, past)
        self.row = row
        self._pool = pool

    def load(self, prompt: Prompt) -> None:
        """Put a prompt's embeddings where `prefill` reads them."""
        self._pool.rows.settle()
        super().load(prompt)

    def close(self) -> None:
        """Give the row back."""
        if not self.closed:
            self._pool.leave(self.row)
        super().close()


def seen_by(caches: Sequence[Cache]) -> list[int]:
    """Return how many positions each row of a block sees in a step: its own and the new one; of rows run along too."""
    return [min(cache.length + 1, cache.capacity) for cache in caches]
