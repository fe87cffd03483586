"""What a checkpoint's generation settings do to logits before a token is chosen: the processors of transformers, in NumPy.

The rules and their order are those of `transformers.generation.logits_process` (5.23), which `generate` applies to greedy
answers too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from reprlib import repr as short
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.errors import InputError

Ids = npt.NDArray[np.int64]


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _are_ids(values: Any) -> bool:
    return isinstance(values, tuple) and all(map(_is_id, values))


@dataclass(frozen=True)
class LogitsConfig:
    """Settings that change logits; the default changes nothing. Names and meanings are those of transformers.

    "So far" counts the prompt's tokens, in which every image is all of its N placeholders, whatever the budget.

    Attributes:
        repetition_penalty: Above 0; what positive logits of tokens so far are divided by, and negative ones multiplied.
        no_repeat_ngram_size: No run of so many tokens comes twice; 0 allows all.
        bad_words_ids: Sequences of tokens that must not come; an end token alone is not counted.
        suppress_tokens: Tokens that must not come.
        begin_suppress_tokens: Tokens that the answer must not begin with.
        min_new_tokens: No end token before so many tokens of the answer; None leaves it to `min_length`.
        min_length: The same, counted with the prompt.

    Raises:
        InputError: A value that is not possible.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    min_new_tokens: int | None = None
    min_length: int = 0

    def __post_init__(self) -> None:
        if not (_is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= float(np.finfo(np.float32).max)):
            raise InputError(f"repetition_penalty must be a number above 0, not {short(self.repetition_penalty)}")
        for name in ("no_repeat_ngram_size", "min_new_tokens", "min_length"):
            value = getattr(self, name)
            if not (_is_id(value) or (value is None and name == "min_new_tokens")):
                raise InputError(f"{name} must be a whole number of at least 0, not {short(value)}")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if not _are_ids(getattr(self, name)):
                raise InputError(f"{name} must be a list of token ids, not {short(getattr(self, name))}")
        words = self.bad_words_ids
        if not (isinstance(words, tuple) and all(_are_ids(word) and word for word in words)):
            raise InputError(f"bad_words_ids must be a list of lists of token ids, not {short(words)}")

    @property
    def active(self) -> bool:
        """Whether any setting changes logits."""
        return self != NEUTRAL

    def changed(self, values: Mapping[str, Any]) -> LogitsConfig:
        """Return these settings with some replaced; a value that is None stays as it is, and lists become tuples."""
        try:
            return replace(self, **{name: _as_tuple(value) for name, value in values.items() if value is not None})
        except RecursionError as error:
            raise InputError(f"a setting among {', '.join(values)} is nested without end") from error

    def check_ids(self, vocab_size: int) -> None:
        """Refuse sequences with tokens that the model does not have, as transformers does; single ones are no harm.

        Raises:
            InputError: A token beyond the vocabulary.
        """
        beyond = next((token for word in self.bad_words_ids for token in word if token >= vocab_size), None)
        if beyond is not None:
            raise InputError(f"bad_words_ids names token {beyond}, but the model's tokens end at {vocab_size - 1}")


NEUTRAL = LogitsConfig()
LOGITS_SETTINGS = tuple(field.name for field in fields(LogitsConfig))


def process(
    logits: npt.NDArray[Any], config: LogitsConfig, ids: Ids, prompt: int, end_ids: Collection[int] = ()
) -> npt.NDArray[np.float32]:
    """Apply settings to the scores of the next token.

    Args:
        logits: Scores (V,) of any float type; they are left as they are.
        config: The settings.
        ids: All tokens so far (S,), prompt and answer.
        prompt: How many of them are the prompt's.
        end_ids: Tokens that end the answer.

    Returns:
        Scores (V,); -inf for a forbidden token.

    Raises:
        InputError: Every token is forbidden.
    """
    scores = logits.astype(np.float32)
    if config.repetition_penalty != 1:
        seen, penalty = _within(ids, len(scores)), np.float32(config.repetition_penalty)
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    spoken = bool((scores > -np.inf).any())
    for forbidden in _forbidden(config, ids, prompt, end_ids):
        scores[_within(forbidden, len(scores))] = -np.inf
    if spoken and not (scores > -np.inf).any() and not np.isnan(scores).any():
        raise InputError("the generation settings forbid every token; allow some in suppress_tokens or bad_words_ids")
    return scores


def _forbidden(config: LogitsConfig, ids: Ids, prompt: int, end_ids: Collection[int]) -> Iterator[Ids | Sequence[int]]:
    """Yield the tokens that each setting forbids."""
    if config.no_repeat_ngram_size and len(ids) >= config.no_repeat_ngram_size:
        yield _repeating(ids, config.no_repeat_ngram_size)
    for *before, last in config.bad_words_ids:
        begun = len(before) <= len(ids) and ids[len(ids) - len(before) :].tolist() == before
        if begun and (before or last not in end_ids):
            yield [last]
    new = len(ids) - prompt
    if (len(ids) < config.min_length) if config.min_new_tokens is None else (new < config.min_new_tokens):
        yield list(end_ids)
    yield config.suppress_tokens
    if new == 0:
        yield config.begin_suppress_tokens


def _repeating(ids: Ids, size: int) -> Ids:
    """Return the tokens that would end a run of `size` tokens which stands in `ids` already."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, size)
    found: Ids = windows[(windows[:, :-1] == ids[len(ids) + 1 - size :]).all(axis=1), -1]
    return found


def _within(ids: Ids | Sequence[int], vocab_size: int) -> Ids:
    """Return the distinct tokens that have a score."""
    found = np.unique(np.asarray(ids, dtype=np.int64))
    return found[found < vocab_size]
