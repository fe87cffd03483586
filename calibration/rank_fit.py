"""Where the constants of the exportable effective rank come from (`leanvlm.exporter.pruners.rank_coefficients`).

The graph has the traces of n + 2 polynomials of the Gram matrix. Two weighted sums of them stand for S = sum s and
T = sum s ln s of its singular values, from which exp(ln S - T / S) is the rank. So the weights are those that best approximate
the functions sqrt(x) and sqrt(x) ln sqrt(x) by the polynomials: a linear least squares over eigenvalues x, not over examples of
spectra.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from leanvlm.exporter.pruners.rank_coefficients import RankCoefficients

Array = NDArray[np.float64]

# The chain. A lift raises small eigenvalues by its factor; at 4 it would be a Chebyshev doubling, beyond that it leaves its
# range. Mean and worst error on LLaVA-like features of rank 58 to 124 (float64, 16 sets): 0.15 and 0.45 % with 13 products,
# 0.5 and 1.3 % with 12, 0.15 and 0.4 % with 14.
LIFTS = (2.8, *(3.65,) * 12, 2.5)
# Added to every eigenvalue behind the first product, as much as an eigenvalue of 2e-7 has there. fp32 leaves those that should
# be zero at up to 3e-8 of either sign, and the chain would make a negative one larger and larger (seen on repeated tokens).
SHIFT = 2e-7 * LIFTS[0] * LIFTS[1]
# Relative errors count alike for eigenvalues from 1 down to KNEE, and less and less for smaller ones, as x^SLOPE.
KNEE, SLOPE = 1e-8, 0.5
# Where the approximation ends, and how many eigenvalues, evenly spread over their logarithms, stand for all.
LEAST, SAMPLES = KNEE / 1000, 1500
RIDGE = 1e-9


def chain(eigenvalues: Array, lifts: Sequence[float], shift: float) -> Array:
    """The polynomials of the graph at normalised eigenvalues (L,) in 0..1: P_0 ... P_n and P_n^2, (L, n + 2)."""
    powers = [lifts[0] * eigenvalues]
    for lift in lifts[1:]:
        powers.append(powers[-1] * (lift - powers[-1]) + (shift if len(powers) == 1 else 0.0))
    return np.stack([*powers, powers[-1] ** 2], 1)


def fit_rank(lifts: Sequence[float] = LIFTS, shift: float = SHIFT) -> RankCoefficients:
    """Find the weights.

    Args:
        lifts: The n + 1 factors of the chain; more of them reach smaller eigenvalues.
        shift: What is added to every eigenvalue behind the first product.

    Returns:
        The constants, rounded to seven digits.
    """
    x = np.geomspace(LEAST, 1.0, SAMPLES)
    importance = (np.minimum(1.0, (x / KNEE) ** SLOPE) / np.sqrt(x))[:, None]
    rows = chain(x, lifts, shift) * importance
    targets = np.stack([np.sqrt(x), np.sqrt(x) * np.log(x) / 2], 1) * importance
    size = np.sqrt((rows**2).sum(0))
    rows = rows / size
    solution = np.linalg.solve(rows.T @ rows + RIDGE * np.eye(len(size)), rows.T @ targets) / size[:, None]
    root, entropy = (tuple(float(f"{value:.7g}") for value in column) for column in solution.T)
    return RankCoefficients(tuple(lifts), shift, root, entropy)
