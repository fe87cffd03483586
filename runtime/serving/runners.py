"""How a server's answers advance: one after another, or several in one run of the decoder."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from leanvlm.runtime.backends.rows import Pool, Rows, RowSequence, takes_rows
from leanvlm.runtime.draft import Draft
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.machine.gpu import free_memory
from leanvlm.runtime.machine.memory import available_memory
from leanvlm.runtime.session import Session
from leanvlm.runtime.specs import DecoderSpec

MAX_ROWS = 64


class Runner(Protocol):
    """Adds tokens to drafts; all calls come from one thread.

    Attributes:
        places: Drafts that it works on at once, at most.
        capacity: Positions that a prompt and its answer may take; None is the model's context.
    """

    places: int
    capacity: int | None

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
    capacity: int | None = None

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


class Together:
    """Several drafts at once: a prompt is read alone into its row, and one run of the decoder adds a token to every row.

    Args:
        session: Whose prompts are read.
        rows: Of its backend.
    """

    def __init__(self, session: Session, rows: Rows) -> None:
        self._session = session
        self._pool = Pool(rows, session.table.row, session.keeps)
        self._sequences: dict[Draft, RowSequence] = {}
        self.places = len(rows.caches)
        self.capacity: int | None = rows.capacity

    def begin(self, draft: Draft) -> None:
        """Read a draft's prompt and add its first token."""
        timings, lock = draft.timings, self._session.backend.lock
        with lock:
            begin = perf_counter()
            self._sequences[draft] = sequence = self._pool.sequence(draft.prompt)
            timings.reused_positions = sequence.past
            sequence.load(draft.prompt)
            loaded = perf_counter()
            scores = sequence.prefill()
            timings.splice += 1e3 * (loaded - begin)
            timings.prefill = 1e3 * (perf_counter() - loaded)
            draft.choose(scores)

    def step(self, drafts: Sequence[Draft]) -> dict[int, Exception]:
        """Add a token to each of the drafts."""
        failed: dict[int, Exception] = {}
        sequences = [self._sequences[draft] for draft in drafts]
        with self._session.backend.lock:
            begin = perf_counter()
            for draft in drafts:
                # Its row may hold NaN, which is refused here with the file's name.
                self._session.table.rows(draft.ids[-1:])
            found = self._pool.step(sequences, [draft.ids[-1] for draft in drafts], [draft.next_position for draft in drafts])
            # A run that begins now overwrites the logits of this one.
            if all(draft.reads_best for draft in drafts):
                going = [number for number, draft in enumerate(drafts) if draft.goes_on]
                self._pool.ahead(
                    [sequences[number] for number in going],
                    [drafts[number].next_position + 1 for number in going],
                    [drafts[number].ends for number in going],
                )
            for number, (draft, scores) in enumerate(zip(drafts, found, strict=True)):
                try:
                    scores.wait()
                    draft.timings.decode.append(1e3 * (perf_counter() - begin))
                    draft.choose(scores)
                except Exception as error:
                    failed[number] = error
        return failed

    def end(self, draft: Draft) -> None:
        """Give a draft's row back."""
        sequence = self._sequences.pop(draft, None)
        if sequence is not None:
            sequence.close()


# What an answer and its prompt may take where nothing else is said: a picture's 576 tokens and a chat about it.
USUAL_CAPACITY = 2048
# Rows where nothing else is said, by device, and the share of the memory behind the weights that they may take.
USUAL_ROWS, USUAL_SHARE = {"cuda": 8, "cpu": 4}, 0.5


def usual_rows(spec: DecoderSpec, device: str, capacity: int, free: int | None) -> int:
    """Return how many rows a server has where nobody says it: as many as measured well, fewer where memory is short.

    Args:
        spec: Of the decoder.
        device: `cpu` or `cuda`.
        capacity: Positions of a row.
        free: Bytes that are left behind the weights; None is not known.
    """
    count = USUAL_ROWS.get(device, 1)
    row = 2 * spec.layers * spec.kv_heads * spec.head_dim * capacity * np.dtype(spec.kv_dtype).itemsize
    while count > 1 and free is not None and count * row > USUAL_SHARE * free:
        count //= 2
    return count


def _room(session: Session) -> int | None:
    """Return the bytes that are left where the decoder will be, its weights taken off; None where that is not known."""
    weights = sum(size.bytes for name, size in session.manifest.files.items() if name.endswith(".data"))
    if session.backend.device == "cuda":
        found = free_memory()
        return None if found is None else found[0] - weights
    return None if (left := available_memory()) is None else left - weights


def open_runner(session: Session, rows: int | None = None, capacity: int | None = None) -> Runner:
    """Return what advances a server's answers.

    Args:
        session: Which answers.
        rows: Answers at once; None is `usual_rows`, 1 takes them one after another.
        capacity: Positions of each; None is 2,048, or the model's context if that is less.

    Raises:
        InputError: Rows where the bundle's decoder cannot run several sequences at once, or sizes that are not possible.
    """
    decoder, backend = session.manifest.decoder, session.backend
    able = takes_rows(decoder) and hasattr(backend, "rows")
    if rows is not None and not 1 <= rows <= MAX_ROWS:
        raise InputError(f"{rows} rows are not possible; give 1 to {MAX_ROWS}")
    if rows is not None and rows > 1 and not able:
        raise InputError(
            "this bundle answers one request at a time here: its decoder or its provider has no rows; leave --rows out"
        )
    size = min(capacity or USUAL_CAPACITY, decoder.context_length)
    if capacity is not None and not 1 <= capacity <= decoder.context_length:
        raise InputError(f"a context of {capacity} is not possible; the model's holds {decoder.context_length}")
    count = rows or (usual_rows(decoder, backend.device, size, _room(session)) if able else 1)
    if count == 1:
        return InTurn(session)
    with backend.lock:
        opened: Any = backend
        several: Rows = opened.rows(count, size)
        several.warm()
        return Together(session, several)
