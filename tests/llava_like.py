"""Synthetic image tokens with the geometry that arXiv 2608.30263 publishes for LLaVA-1.5's projector.

Mean cosine between tokens 0.37, 5 % of the pairs above 0.99 (background patches that nearly repeat), a power-law spectrum,
effective rank 58 to 122 and a little beyond.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TOKENS, WIDTH, DIRECTIONS = 576, 4096, 512
MEAN_COSINE, NEAR_PAIRS = 0.37, 0.05
STEEPEST, FLATTEST = 1.1, 0.85


def llava_like(seed: int, exponent: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw one image: features (N, D), and the class token's attention (N,).

    Args:
        seed: Of the draw.
        exponent: Of the power law of singular values; `STEEPEST` gives ranks near 58, `FLATTEST` near 124.
    """
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((DIRECTIONS, WIDTH)) / np.sqrt(WIDTH)
    features = (rng.standard_normal((TOKENS, DIRECTIONS)) * np.arange(1, DIRECTIONS + 1.0) ** -exponent) @ directions
    shares = rng.dirichlet(np.full(rng.integers(1, 4), 4.0))
    background = TOKENS * np.sqrt(NEAR_PAIRS / (shares**2).sum())
    order = rng.permutation(TOKENS)
    for size in (shares * background).astype(int):
        members, order = order[:size], order[size:]
        features[members] = features[members[:1]] + rng.uniform(0.03, 0.07) * features[members]
    common = rng.standard_normal(WIDTH)
    features += _length(features, common / np.linalg.norm(common)) * common / np.linalg.norm(common)
    features *= np.exp(0.15 * rng.standard_normal((TOKENS, 1)))
    attention = np.exp(1.3 * rng.standard_normal(TOKENS))
    return features.astype(np.float32), (attention / attention.sum()).astype(np.float32)


def pair_cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines (N (N - 1) / 2,) of all pairs, from dot products (N, N)."""
    norms = np.sqrt(np.diag(gram))
    return np.asarray((gram / np.outer(norms, norms))[np.triu_indices(len(gram), 1)])


def _length(features: NDArray[np.float64], unit: NDArray[np.float64]) -> float:
    """Return how much of a common direction gives the tokens their mean cosine, by bisection."""
    gram, along = features @ features.T, features @ unit
    low, high = 0.0, 5 * float(np.sqrt(np.diag(gram).mean()))
    for _ in range(30):
        middle = (low + high) / 2
        moved = gram + middle * (along[:, None] + along[None, :]) + middle**2
        low, high = (middle, high) if pair_cosines(moved).mean() < MEAN_COSINE else (low, middle)
    return middle
