"""Differences between methods with 95 % intervals, by a bootstrap over scenes.

Questions about one scene succeed and fail together, so scenes are drawn, not questions; both methods see the same draw.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leanvlm.calibration.scores import Scores

DRAWS = 2000
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % interval.

    Attributes:
        value: The difference found.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """In percentage points."""
        value, low, high = (_signed(100 * number, 1) for number in (self.value, self.low, self.high))
        return f"{value} ({low} to {high})"

    def plain(self) -> str:
        """In its own unit."""
        return f"{_signed(self.value, 2)}, {_signed(self.low, 2)} to {_signed(self.high, 2)}"

    def verdict(self) -> str:
        """What the interval says of the claim that the difference is above 0."""
        if self.low > 0:
            return "holds"
        return "the opposite holds" if self.high < 0 else "not decided"


def _signed(value: float, digits: int) -> str:
    """Write a number with its sign; what rounds to 0 has none."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


@functools.cache
def _weights(scenes: int, seed: int = 0) -> Array:
    """How often each scene is drawn (DRAWS, S). The standard library's generator never changes its numbers."""
    rng = random.Random(seed)
    weights = np.zeros((DRAWS, scenes))
    for row in weights:
        row += np.bincount([int(rng.random() * scenes) for _ in range(scenes)], minlength=scenes)
    return weights


def _interval(value: float, draws: Array) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def right_difference(pairs: Sequence[tuple[Scores, Scores]]) -> Interval:
    """Difference of the shares of right answers, first minus second, over all pairs together.

    Args:
        pairs: Two methods' scores on the same scenes, one pair for each budget.
    """
    gain = np.array([np.subtract(first.right, second.right) for first, second in pairs], float).sum(0)
    asked = np.array([first.asked for first, _ in pairs], float).sum(0)
    weights = _weights(len(gain))
    return _interval(gain.sum() / asked.sum(), (weights @ gain) / (weights @ asked))


def chair_difference(pairs: Sequence[tuple[Scores, Scores]]) -> Interval:
    """Difference of CHAIR-i, first minus second, over all pairs together; see `right_difference`."""
    counts = [
        np.array([[(c.absent, c.mentions) for c in scores.captions] for scores in side], float).sum(0)
        for side in zip(*pairs, strict=True)
    ]
    weights = _weights(len(counts[0]))
    drawn = [weights @ side for side in counts]
    shares = [side[:, 0] / np.maximum(side[:, 1], 1) for side in drawn]
    values = [side[:, 0].sum() / max(side[:, 1].sum(), 1) for side in counts]
    return _interval(values[0] - values[1], shares[0] - shares[1])


def mean_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Difference of the means of two independent samples."""
    means = [_weights(len(values), seed) @ np.array(values) / len(values) for seed, values in enumerate((first, second), 1)]
    return _interval(float(np.mean(first) - np.mean(second)), means[0] - means[1])


def separation(higher: Sequence[float], lower: Sequence[float]) -> Interval:
    """Area under the ROC curve by which a quantity tells two samples apart, with its 95 % interval.

    Args:
        higher: The sample that should have the higher values.
        lower: The other one; drawn independently of the first.

    Returns:
        The chance that a value of the first exceeds one of the second, ties counted half: 0.5 where they are alike.
    """
    first, second = np.array(higher, float)[:, None], np.array(lower, float)[None, :]
    wins = (first > second) + 0.5 * (first == second)
    weights = [_weights(count, seed) / count for seed, count in enumerate(wins.shape, 1)]
    return _interval(float(wins.mean()), ((weights[0] @ wins) * weights[1]).sum(1))
