"""Choosing the next token from logits: greedy, or sampling with temperature, top-k, top-p and min-p, as pure functions."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from reprlib import repr as short
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.answer import TokenChance
from leanvlm.runtime.errors import BackendError, InputError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen; the default is greedy.

    Attributes:
        temperature: What logits are divided by, at least 0; 0 takes the most probable token.
        top_p: Mass of the nucleus that is sampled from, above 0 and up to 1.
        seed: Makes sampling repeatable, at least 0; None draws a fresh seed.
        top_k: How many of the most probable tokens are sampled from; 0 takes all.
        min_p: Share of the most probable token's probability that a token needs, from 0 to 1.

    Raises:
        InputError: A value is out of its range, or of another type.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, kind, wanted in (
            ("temperature", Real, "a number"), ("top_p", Real, "a number"), ("min_p", Real, "a number"),
            ("top_k", Integral, "a whole number"), ("seed", Integral | None, "a whole number"),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{name} must be {wanted}, not {short(value)}")
        # Written so that NaN fails too.
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature must be a number of at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed must be at least 0, not {self.seed}")
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 0, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be from 0 to 1, not {self.min_p}")

    def generator(self) -> np.random.Generator:
        """A fresh random generator that starts from `seed`."""
        return np.random.default_rng(self.seed)


def sample(
    logits: npt.NDArray[Any],
    *,
    temperature: float,
    top_p: float,
    rng: np.random.Generator,
    top_k: int = 0,
    min_p: float = 0.0,
) -> int:
    """Choose a token; the restrictions act in the order of transformers: top_k, top_p, min_p.

    Args:
        logits: One position's scores (V,), of any float type; -inf forbids a token.
        temperature: At least 0; 0 takes the highest score, and of equal ones the lowest id, without touching `rng`.
        top_p: Above 0 and up to 1: only the fewest most probable tokens that together reach it can be drawn
            (nucleus sampling, Holtzman et al., arXiv 1904.09751).
        rng: Gives one uniform number per call when the temperature is above 0.
        top_k: At least 0: only tokens that score as high as the top_k-th can be drawn, equal ones included; 0 is all.
        min_p: From 0 to 1: only tokens with at least this share of the highest probability can be drawn
            (min-p sampling, Nguyen et al., arXiv 2407.01082).

    Returns:
        The token's id.

    Raises:
        BackendError: The logits hold NaN or +inf, or nothing above -inf.
    """
    best = highest(logits)
    if temperature == 0:
        return best
    if 0 < top_k < len(logits):
        logits = np.where(logits >= np.partition(logits, -top_k)[-top_k], logits, -np.inf)
    order, cumulative = nucleus(logits, temperature, top_p)
    if min_p > 0:
        order, cumulative = _above(order, logits, temperature, min_p)
    # rng.random() is at most 1 - 2**-53, so the product stays below the last sum; "right" passes over zero shares.
    return int(order[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])


def _above(
    order: npt.NDArray[np.int64], logits: npt.NDArray[Any], temperature: float, min_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return those of `order` that have `min_p` of the highest probability, and their cumulative weights."""
    weights = _weights(logits, temperature)[order]
    kept = weights >= min_p
    return order[kept], np.cumsum(weights[kept])


def _weights(logits: npt.NDArray[Any], temperature: float) -> npt.NDArray[np.float64]:
    """Return the tokens' probabilities (V,) as shares of the highest."""
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # A tiny temperature sends all but the highest score to -inf, as it should.
        weights: npt.NDArray[np.float64] = np.exp((scores - scores.max()) / temperature)
    return weights


def highest(logits: npt.NDArray[Any]) -> int:
    """Return the id of the highest of scores (V,), of equal ones the lowest.

    Raises:
        BackendError: The logits hold NaN or +inf, or nothing above -inf.
    """
    check_peak(float(logits.max()))  # NaN if any logit is NaN.
    return int(logits.argmax())


def chances(logits: npt.NDArray[Any], token: int, top: int) -> TokenChance:
    """Return the log-probability of a token among logits (V,), and of the `top` most probable ones (equal ones by id)."""
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= math.log(np.exp(scores).sum())
    best = np.argsort(-scores, kind="stable")[:top] if top else ()
    return TokenChance(token, float(scores[token]), tuple((int(i), float(scores[i])) for i in best))


def check_peak(peak: float) -> None:
    """Raise BackendError if the highest score is not finite: then the decoder's arithmetic broke down."""
    if not math.isfinite(peak):
        raise BackendError(f"the decoder returned logits that cannot be sampled: their maximum is {peak}")


def nucleus(
    logits: npt.NDArray[Any], temperature: float, top_p: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that top-p sampling draws from.

    Args:
        logits: Scores (V,) with a finite maximum.
        temperature: Above 0.
        top_p: Above 0 and up to 1.

    Returns:
        Token ids, most probable first (equal ones by id), and their cumulative probabilities within the whole
        vocabulary; at least one token. With a `top_p` of 1, all of them by id.
    """
    weights = _weights(logits, temperature)
    probabilities = weights / weights.sum()
    if top_p == 1:
        return np.arange(len(probabilities)), np.cumsum(probabilities)
    # All tokens below this share together stay within 1 - top_p: none is in the nucleus, so none is sorted.
    candidates = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    cumulative = np.cumsum(probabilities[order])
    kept = int(np.searchsorted(cumulative, top_p, side="left")) + 1
    return order[:kept], cumulative[:kept]
