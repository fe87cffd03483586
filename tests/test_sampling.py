"""Sampling against transformers' warpers and against the probabilities that it should follow."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from leanvlm.runtime.errors import BackendError, InputError
from leanvlm.runtime.generation import GenerationSettings
from leanvlm.runtime.sampling import SamplingConfig, nucleus, sample


def draw(logits: np.ndarray, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> int:
    return sample(logits, temperature=temperature, top_p=top_p, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_greedy_takes_the_lowest_id_of_the_highest_logits(dtype: type) -> None:
    logits = np.array([-3, 7, 7, -np.inf, 6], dtype)
    assert draw(logits, temperature=0) == 1


def test_greedy_leaves_the_generator_alone() -> None:
    rng = np.random.default_rng(5)
    sample(np.arange(4.0), temperature=0, top_p=1, rng=rng)
    assert rng.random() == np.random.default_rng(5).random()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf, -np.inf]])
def test_unusable_logits_are_the_backends_fault(logits: list[float], temperature: float) -> None:
    with pytest.raises(BackendError, match="maximum is"):
        draw(np.array(logits, np.float32), temperature)


# Of equal logits transformers takes the last, so there are none; nor is top_p 1, where it does nothing.
@given(
    logits=st_numpy.arrays(np.float64, st.integers(1, 50), elements=st.integers(-60, 60), unique=True),
    temperature=st.floats(0.1, 5),
    top_p=st.floats(0.01, 0.99),
)
def test_nucleus_is_that_of_transformers(logits: np.ndarray, temperature: float, top_p: float) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
    allowed = set(torch.isfinite(TopPLogitsWarper(top_p)(None, scores))[0].nonzero().flatten().tolist())
    order, cumulative = nucleus(logits, temperature, top_p)
    # Where rounding decides which side of top_p a sum falls, the two may differ by that one token.
    if np.abs(cumulative - top_p).min() > 1e-9:
        assert set(order.tolist()) == allowed
    assert set(order[:-1].tolist()) <= allowed


def test_draws_follow_the_softmax() -> None:
    logits = np.array([2.0, 0.5, -1.0, 1.5, -np.inf], np.float32)
    temperature, draws = 0.7, 20_000
    rng = np.random.default_rng(1)
    counts = np.bincount(
        [sample(logits, temperature=temperature, top_p=1, rng=rng) for _ in range(draws)], minlength=len(logits)
    )
    expected = torch.softmax(torch.from_numpy(logits) / temperature, 0).numpy()
    # Four standard deviations of a binomial share.
    assert np.all(np.abs(counts / draws - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1e-9), (1.0, 1e-300), (5e-324, 1.0), (1e-3, 0.5)])
def test_limits_of_temperature_and_top_p_are_greedy(seed: int, temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=300).astype(np.float32)
    assert draw(logits, temperature, top_p, seed) == logits.argmax()


@pytest.mark.parametrize("top_p", [1e-300, 0.25, 1.0])
def test_equal_logits_are_drawn_by_id(top_p: float) -> None:
    order, cumulative = nucleus(np.zeros(8, np.float32), 1.0, top_p)
    assert order.tolist() == list(range(max(1, round(8 * top_p))))
    np.testing.assert_allclose(cumulative, (order + 1) / 8)


def test_huge_logits_do_not_overflow() -> None:
    assert draw(np.array([60000, 60000, -60000], np.float16), top_p=0.9) in (0, 1)


def test_a_seed_repeats_the_tokens() -> None:
    logits = np.zeros(1000, np.float32)
    config = SamplingConfig(temperature=1.0, seed=7)
    first, second = (
        [sample(logits, temperature=1, top_p=0.5, rng=rng) for _ in range(8)]
        for rng in (config.generator(), config.generator())
    )
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("seed", -1),
        ("temperature", "hot"),
        ("top_p", None),
        ("min_p", [0.1]),
        ("top_k", 2.5),
        ("top_k", True),
        ("seed", "a"),
    ],
)
def test_values_that_are_not_possible_are_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{field} must be .*{re.escape(str(value))}"):
        SamplingConfig(**{field: value})


def test_numbers_of_numpy_are_numbers() -> None:
    SamplingConfig(np.float32(0.5), top_p=np.float64(0.9), seed=np.int64(3), top_k=np.int32(4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, not 1.5"),
        ({"max_new_tokens": "3"}, "max_new_tokens must be a whole number, not '3'"),
        ({"stop": [5]}, "stop must be a string or several"),
    ],
)
def test_options_of_another_type_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        GenerationSettings().options(**options)
