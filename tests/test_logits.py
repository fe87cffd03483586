"""Generation settings against transformers' own processors, on random logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.generation import Chooser, GenerateOptions, GenerationSettings
from leanvlm.runtime.logits import LogitsConfig, process
from leanvlm.runtime.sampling import SamplingConfig, sample

VOCAB = 12
END_IDS = [2, 3]
TOKENS = st.integers(0, VOCAB - 1)

SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.floats(0.2, 4),
    "no_repeat_ngram_size": st.integers(0, 4),
    "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=4),
    "min_length": st.integers(0, 12),
    "min_new_tokens": st.integers(0, 6),
    "suppress_tokens": st.lists(st.integers(0, VOCAB + 3), max_size=3),
    "begin_suppress_tokens": st.lists(st.integers(0, VOCAB + 3), max_size=3),
}


def theirs(settings: dict[str, Any], prompt: int) -> LogitsProcessorList:
    """Return the processors that `generate` would use, in its order."""
    made = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": lambda size: NoRepeatNGramLogitsProcessor(size) if size else None,
        "bad_words_ids": lambda words: NoBadWordsLogitsProcessor(words, END_IDS) if set_of(words) - ends() else None,
        "min_length": lambda least: None if "min_new_tokens" in settings else MinLengthLogitsProcessor(least, END_IDS),
        "min_new_tokens": lambda least: MinNewTokensLengthLogitsProcessor(prompt, least, END_IDS),
        "suppress_tokens": SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda tokens: SuppressTokensAtBeginLogitsProcessor(tokens, prompt),
    }
    found = [make(settings[name]) for name, make in made.items() if name in settings]
    return LogitsProcessorList([processor for processor in found if processor is not None])


def set_of(words: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(word) for word in words}


def ends() -> set[tuple[int, ...]]:
    return {(token,) for token in END_IDS}


@given(
    settings=st.fixed_dictionaries({}, optional=SETTINGS),
    ids=st.lists(TOKENS, min_size=1, max_size=14),
    new=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_scores_equal_those_of_transformers(settings: dict[str, Any], ids: list[int], new: int, seed: int) -> None:
    prompt = max(len(ids) - new, 1)
    logits = np.random.default_rng(seed).normal(0, 4, VOCAB).astype(np.float32)
    expected = theirs(settings, prompt)(torch.tensor([ids]), torch.from_numpy(logits)[None].clone())[0].numpy()
    config = LogitsConfig().changed(settings)
    if np.isneginf(expected).all():
        with pytest.raises(InputError, match="forbid every token"):
            process(logits, config, np.array(ids), prompt, END_IDS)
    else:
        np.testing.assert_array_equal(process(logits, config, np.array(ids), prompt, END_IDS), expected)


@given(
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.31, 0.62, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 0.77]),
    temperature=st.sampled_from([0.4, 1.0, 2.5]),
    seed=st.integers(0, 30),
)
def test_what_can_be_drawn_is_what_transformers_draws_from(
    top_k: int, top_p: float, min_p: float, temperature: float, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, VOCAB)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)]
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None])[0]
    expected = torch.softmax(scores, 0).numpy()

    class Steps:
        """Gives a set number, so that every share of the probability is drawn once."""

        value = 0.0

        def random(self) -> float:
            return self.value

    rng, counts, draws = Steps(), np.zeros(VOCAB), 400
    for step in range(draws):
        rng.value = (step + 0.5) / draws
        options: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "rng": rng}
        counts[sample(logits, **options)] += 1
    np.testing.assert_allclose(counts / draws, expected, atol=1 / draws)


class Known:
    """Scores that note how they were asked for."""

    def __init__(self, logits: list[float]) -> None:
        self._logits = np.array(logits, np.float32)
        self.fetched = False

    def greedy(self) -> int:
        """Return the highest."""
        return int(self._logits.argmax())

    def logits(self) -> np.ndarray:
        """Return them all."""
        self.fetched = True
        return self._logits


def test_logits_stay_on_the_device_unless_a_setting_wants_them() -> None:
    scores = Known([0, 3, 2])
    assert Chooser(GenerateOptions(), [1], frozenset()).choose(scores) == 1
    assert not scores.fetched
    assert Chooser(GenerateOptions(logits=LogitsConfig(suppress_tokens=(1,))), [1], frozenset()).choose(scores) == 2
    assert scores.fetched


def test_an_answers_own_tokens_count() -> None:
    chooser = Chooser(GenerateOptions(logits=LogitsConfig(no_repeat_ngram_size=1)), [3], frozenset())
    assert [chooser.choose(Known([0, 3, 2, 9])) for _ in range(3)] == [1, 2, 0]


def test_ignoring_the_end_is_as_if_there_were_none() -> None:
    options = [GenerateOptions(ignore_end=ignore, logits=LogitsConfig(min_new_tokens=3)) for ignore in (False, True)]
    assert [Chooser(o, [0], frozenset([1])).choose(Known([0, 3, 2])) for o in options] == [2, 1]


def test_a_request_comes_before_the_file() -> None:
    file = {"eos_token_id": 2, "top_k": 7, "top_p": 0.8, "repetition_penalty": 1.2, "bad_words_ids": [[4, 5]], "min_p": None}
    settings = GenerationSettings.from_dict({**file, "do_sample": True, "temperature": 0.7})
    assert settings.end_ids == {2}
    plain = settings.options(top_k=None)
    assert plain.sampling == SamplingConfig(temperature=0, top_k=7, top_p=0.8)
    assert plain.logits == LogitsConfig(repetition_penalty=1.2, bad_words_ids=((4, 5),))
    mine = settings.options(temperature=0.5, top_k=0, repetition_penalty=1.0, suppress_tokens=[1])
    assert mine.sampling == SamplingConfig(temperature=0.5, top_k=0, top_p=0.8)
    assert mine.logits == LogitsConfig(bad_words_ids=((4, 5),), suppress_tokens=(1,))


def test_an_option_that_there_is_not_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"^there is no option 'topp' for an answer; known: max_new_tokens, .*top_k, top_p, .*penalty"
    ):
        GenerationSettings().options(temperature=0.5, topp=0.9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", "high"),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 1.5),
        ("min_new_tokens", -1),
        ("suppress_tokens", 3),
        ("suppress_tokens", [-1]),
        ("bad_words_ids", [3]),
        ("bad_words_ids", [[]]),
        ("top_k", -1),
        ("top_k", "many"),
        ("min_p", 1.5),
        ("eos_token_id", "</s>"),
    ],
)
def test_values_that_are_not_possible_are_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} must be"):
        GenerationSettings.from_dict({name: value})


def test_bad_words_beyond_the_vocabulary_are_refused() -> None:
    LogitsConfig(bad_words_ids=((4, 11),), suppress_tokens=(99,)).check_ids(12)
    with pytest.raises(InputError, match="names token 12, but the model's tokens end at 11"):
        LogitsConfig(bad_words_ids=((4, 12),)).check_ids(12)
