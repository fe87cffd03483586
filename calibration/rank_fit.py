"""Fits the constants of the exportable effective rank (`leanvlm.exporter.pruners.gates`).

Everything depends on the eigenvalues alone, so a fit needs no matrix: it draws a broad synthetic family of spectra,
adds measured ones if there are any, and solves a weighted ridge regression of the exact ln(rank) on cubic terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from leanvlm.exporter.pruners.gates import FEATURE_LIMIT, LEAST_TRACE
from leanvlm.exporter.pruners.rank_coefficients import RankCoefficients

Array = NDArray[np.float64]

# Found by `tune_lifts`. The larger a lift, the smaller the eigenvalues it reaches; beyond 4 the chain leaves its range.
LIFTS = (2.937, 3.102, 3.436, 3.329, 3.313, 3.48, 3.299, 2.928, 2.314)
RIDGE = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a centred Gram matrix.

    Attributes:
        eigenvalues: At most min(N - 1, D) non-negative numbers, in any order and scale.
        limit: Largest possible rank, min(N - 1, D).
    """

    eigenvalues: Array
    limit: int


@dataclass(frozen=True)
class _Family:
    """A kind of synthetic spectrum: how to draw one, how many, and the relative error it is fitted to."""

    draw: Callable[[np.random.Generator, int, int], Array]
    share: float
    tolerance: float


def spectrum(features: NDArray[np.floating]) -> Spectrum:
    """Spectrum of one set of tokens.

    Args:
        features: (N, D).

    Returns:
        Its eigenvalues, descending, in float64.
    """
    centred = features.astype(np.float64)
    centred -= centred.mean(0)
    gram = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    limit = min(len(centred) - 1, centred.shape[1])
    return Spectrum(np.linalg.eigvalsh(gram)[::-1][:limit].clip(0), limit)


def log_rank(eigenvalues: Array) -> Array:
    """Exact ln(effective rank) (S,) of zero-padded eigenvalues (S, L)."""
    singular = np.sqrt(eigenvalues)
    total = singular.sum(1)
    entropy_sum = (singular * np.log(np.where(singular > 0, singular, 1))).sum(1)
    return np.asarray(np.log(total) - entropy_sum / total)


def rank_features(eigenvalues: Array, limits: Array, lifts: Sequence[float]) -> Array:
    """The features of `gates.gram_effective_rank`, from eigenvalues.

    Args:
        eigenvalues: (S, L), zero-padded, not all zero in a row.
        limits: (S,), largest possible ranks.
        lifts: n + 1 factors.

    Returns:
        (S, n + 3), not standardised.
    """
    scaled = eigenvalues / eigenvalues.max(1, keepdims=True)
    lifted = lifts[0] * scaled / (scaled**4).sum(1, keepdims=True) ** 0.25
    traces = [lifted.sum(1)]
    for lift in lifts[1:]:
        lifted = lifted * (lift - lifted)
        traces.append(lifted.sum(1))
    logs = np.log(np.stack([*traces, (lifted**2).sum(1)], 1).clip(LEAST_TRACE))
    return np.concatenate([np.diff(logs, axis=1), np.log(limits)[:, None] - logs[:, -1:], logs[:, -1:]], 1)


def cubic_terms(standard: Array) -> Array:
    """Monomials of degree 0 to 3 (S, M) of standardised features (S, m), in the order of `RankCoefficients.weights`."""
    terms = np.concatenate([np.ones((len(standard), 1)), standard.clip(-FEATURE_LIMIT, FEATURE_LIMIT)], 1)
    first, second, third = np.array(list(combinations_with_replacement(range(terms.shape[1]), 3))).T
    return np.asarray(terms[:, first] * terms[:, second] * terms[:, third])


def predict_rank(spectra: Sequence[Spectrum], coefficients: RankCoefficients) -> Array:
    """Approximate effective ranks (S,) of spectra, as the exported graph computes them but in float64."""
    eigenvalues, limits = _pad(spectra)
    features = rank_features(eigenvalues, limits, coefficients.lifts)
    standard = (features - np.array(coefficients.centre)) / np.array(coefficients.scale)
    logs = cubic_terms(standard) @ np.array(coefficients.weights)
    return np.asarray(np.exp(logs.clip(0, np.log(limits))))


def synthetic_spectra(count: int, seed: int) -> tuple[list[Spectrum], Array]:
    """Random spectra of every family.

    Args:
        count: How many in all.
        seed: Of the generator.

    Returns:
        The spectra, and for each the relative error it should be fitted to.
    """
    rng = np.random.default_rng(seed)
    spectra, tolerances = [], []
    for family in FAMILIES.values():
        for _ in range(round(family.share * count)):
            tokens = int(rng.choice([144, 196, 256, 400, 576, 729], p=[0.25, 0.05, 0.05, 0.05, 0.35, 0.25]))
            width = int(rng.choice([256, 384, 512, 768, 1024, 2048, 4096]))
            spectra.append(Spectrum(family.draw(rng, tokens, width), min(tokens - 1, width)))
            tolerances.append(family.tolerance)
    return spectra, np.array(tolerances)


def fit_rank(
    measured: Sequence[Spectrum] = (), *, lifts: Sequence[float] = LIFTS, count: int = 8000, seed: int = 0
) -> RankCoefficients:
    """Fits the constants.

    Args:
        measured: Spectra of real features. Together they weigh as much as all synthetic ones, to a tolerance of 0.3 %.
        lifts: The chain of products; more lifts reach smaller eigenvalues.
        count: Synthetic spectra.
        seed: Of the synthetic spectra.

    Returns:
        The constants, rounded to seven digits.
    """
    synthetic, tolerances = synthetic_spectra(count, seed)
    weights = 1 / tolerances
    if measured:
        weights = np.append(weights, np.full(len(measured), np.sqrt(count / len(measured)) / 0.003))
    return _fit(*_pad([*synthetic, *measured]), weights, lifts)[0]


def tune_lifts(lifts: Sequence[float] = LIFTS, *, rounds: int = 3, count: int = 2000, seed: int = 1) -> tuple[float, ...]:
    """Improves the lifts by a coordinate search on the loss of the fit.

    Args:
        lifts: Where to start.
        rounds: Passes over all lifts; the step halves after each.
        count: Synthetic spectra.
        seed: Of the synthetic spectra.

    Returns:
        The best lifts found.
    """
    spectra, tolerances = synthetic_spectra(count, seed)
    data = (*_pad(spectra), 1 / tolerances)
    best, loss = list(lifts), _fit(*data, lifts)[1]
    for step in (0.1 * 0.5**r for r in range(rounds)):
        for k in range(len(best)):
            for change in (-step, step):
                trial = [*best[:k], best[k] + change, *best[k + 1 :]]
                trial_loss = _fit(*data, trial)[1]
                if trial_loss < loss:
                    best, loss = trial, trial_loss
    return tuple(round(lift, 3) for lift in best)


def _fit(eigenvalues: Array, limits: Array, weights: Array, lifts: Sequence[float]) -> tuple[RankCoefficients, float]:
    """Ridge regression, reweighted twice towards the worst cases; also the root mean square of weighted errors."""
    features = rank_features(eigenvalues, limits, lifts)
    centre, scale = features.mean(0), features.std(0)
    terms, target = cubic_terms((features - centre) / scale), log_rank(eigenvalues)
    emphasis = np.ones(len(terms))
    for _ in range(3):
        solution = _ridge(terms, target, weights * emphasis)
        error = np.abs(terms @ solution - target) * weights
        emphasis = np.sqrt((0.5 + error / np.sqrt((error**2).mean())).clip(max=4))
    numbers = [tuple(float(f"{value:.7g}") for value in group) for group in (lifts, centre, scale, solution)]
    return RankCoefficients(*numbers), float(np.sqrt((error**2).mean()))


def _ridge(terms: Array, target: Array, weights: Array) -> Array:
    """Weighted ridge regression, each column scaled to mean square 1 first."""
    rows = terms * weights[:, None] / weights.mean()
    size = np.sqrt((rows**2).mean(0)) + 1e-12
    rows = rows / size
    normal = rows.T @ rows / len(rows) + RIDGE * np.eye(rows.shape[1])
    return np.asarray(np.linalg.solve(normal, rows.T @ (target * weights / weights.mean()) / len(rows)) / size)


def _pad(spectra: Sequence[Spectrum]) -> tuple[Array, Array]:
    """Eigenvalues (S, L) with zeros at the end of shorter ones, and the limits (S,)."""
    padded = np.zeros((len(spectra), max(len(s.eigenvalues) for s in spectra)))
    for row, item in zip(padded, spectra, strict=True):
        row[: len(item.eigenvalues)] = item.eigenvalues / item.eigenvalues.max()
    return padded, np.array([float(s.limit) for s in spectra])


def _marchenko_pastur(size: int, samples: int) -> Array:
    """Expected eigenvalues, descending, of a random covariance of `size` variables: quantiles of the limit law."""
    small, large = min(size, samples), max(size, samples)
    ratio = small / large
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    # The substitution x = low + (high - low) sin^2 removes the law's square-root edges.
    angle = np.linspace(0, np.pi / 2, 2001)[1:]
    x = low + (high - low) * np.sin(angle) ** 2
    mass = np.cumsum(np.sin(2 * angle) ** 2 / x)
    return np.asarray(np.interp((np.arange(small, 0, -1) - 0.5) / small, mass / mass[-1], x) * large)


def _draw_gaussian(rng: np.random.Generator, tokens: int, width: int) -> Array:
    return _marchenko_pastur(tokens - 1, width) * np.exp(0.02 * rng.standard_normal(min(tokens - 1, width)))


def _draw_power(rng: np.random.Generator, tokens: int, width: int) -> Array:
    index = np.arange(1.0, min(tokens - 1, width) + 1)
    # Centring takes one random direction away, which lowers the first few values.
    return np.asarray(index ** (-2 * rng.uniform(0.45, 1.55)) * (1 - rng.uniform() ** 2 * np.minimum(1, 0.7 / index)))


def _draw_exponential(rng: np.random.Generator, tokens: int, width: int) -> Array:
    index = np.arange(1.0, min(tokens - 1, width) + 1)
    return np.asarray(np.exp(-2 * index / np.exp(rng.uniform(np.log(2.7), np.log(1.1 * len(index))))))


def _draw_clustered(rng: np.random.Generator, tokens: int, width: int) -> Array:
    """Repeated random centres, half of the time one of them in many copies, plus noise on all but up to a third."""
    clusters = int(np.exp(rng.uniform(np.log(2), np.log(tokens / 2))))
    counts = np.bincount(rng.integers(0, clusters, tokens), minlength=clusters)
    counts[0] += int(tokens * max(0.0, rng.uniform(-0.4, 0.4)))
    counts = np.sort(counts[counts > 0])[::-1]
    between = counts[: min(width, max(1, len(counts) - 1))].astype(float)
    between = between * _marchenko_pastur(len(counts), width)[: len(between)]
    noise = 0.0 if rng.random() < 0.25 else np.exp(rng.uniform(np.log(1e-3), 0))
    within = _marchenko_pastur(int((tokens - 1) * rng.uniform(0.65, 1)), width) * noise**2
    values = np.zeros(min(tokens - 1, width))
    values[: len(within)] += within
    values[: len(between)] += between
    return values


def _draw_natural(rng: np.random.Generator, tokens: int, width: int) -> Array:
    """What trained projectors show: a few strong directions, a bent power law, a tail that falls away, all wavy."""
    limit = min(tokens - 1, width)
    index = np.arange(1.0, limit + 1)
    singular = (index + np.exp(rng.uniform(-1, 3))) ** -rng.uniform(0.3, 2)
    singular *= np.exp(-((index / (limit * np.exp(rng.uniform(-2.5, 2)))) ** rng.uniform(0.5, 1.2)))
    if rng.random() < 0.6:
        singular *= (1 - index / (limit + 1)) ** rng.uniform(0, 1.5)
    singular[: rng.integers(0, 6)] *= np.exp(rng.uniform(0, 2))
    wave = np.sin(np.pi * rng.uniform(1, 5) * np.log(index) / np.log(limit) + rng.uniform(0, 6))
    singular *= np.exp(rng.uniform(0, 0.25) * wave)
    return np.asarray(singular**2)


# Tolerances follow how much the kept tokens react: iid and exponential sets do not notice several per cent.
FAMILIES = {
    "gaussian": _Family(_draw_gaussian, 0.06, 0.05),
    "power": _Family(_draw_power, 0.22, 0.007),
    "exponential": _Family(_draw_exponential, 0.16, 0.02),
    "clustered": _Family(_draw_clustered, 0.20, 0.05),
    "natural": _Family(_draw_natural, 0.36, 0.01),
}
