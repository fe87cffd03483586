"""Image-complexity gates: the attention entropy and an effective rank that can live inside an ONNX graph.

The effective rank of Roy and Vetterli (EUSIPCO 2007) needs the singular values of the centred tokens, and ONNX has no
operator for them. Here it is read off the traces of a short chain of matrix products, a log-polynomial fitted once to
exact values (`leanvlm.calibration.rank_fit`). AgilePruner (arXiv 2603.01236) uses both quantities as its gate.
"""

from __future__ import annotations

import math
import operator
from itertools import accumulate, combinations_with_replacement

import torch
from torch import Tensor

from leanvlm.exporter.pruners.rank_coefficients import RANK_COEFFICIENTS, RankCoefficients

# Energy of the centred tokens, relative to all energy, below which they count as equal: above float32 rounding squared.
EQUAL_TOKENS = 1e-12
# Standardised features are held to this range, so that an unusual spectrum cannot blow the cubic up.
FEATURE_LIMIT = 4.0
# Traces below this are rounding.
LEAST_TRACE = 1e-9


def cubic_table(weights: tuple[float, ...], features: int) -> list[list[float]]:
    """Spreads the weights of the distinct monomials over a dense table, zeros elsewhere.

    Args:
        weights: As in `RankCoefficients`.
        features: Number of features, m.

    Returns:
        (m + 1)^2 rows of m + 1: entry [i (m + 1) + j][k] belongs to the product of terms i <= j <= k.
    """
    size = features + 1
    table = [[0.0] * size for _ in range(size * size)]
    for (i, j, k), weight in zip(combinations_with_replacement(range(size), 3), weights, strict=True):
        table[i * size + j][k] = weight
    return table


def centred_gram(features: Tensor) -> Tensor:
    """Gram matrix of the tokens after subtracting their mean, on the smaller side.

    Args:
        features: (B, N, D), float32.

    Returns:
        (B, N, N) where N <= D, else (B, D, D); both have the same non-zero eigenvalues.
    """
    centred = features - features.mean(1, keepdim=True)
    return centred @ centred.mT if features.shape[1] <= features.shape[2] else centred.mT @ centred


def _diagonal(matrix: Tensor) -> Tensor:
    """Diagonal (B, M) of (B, M, M) as one strided slice."""
    return matrix.flatten(1)[:, :: matrix.shape[1] + 1]


def _traces(gram: Tensor, lifts: tuple[float, ...]) -> Tensor:
    """Return tr R_0 ... tr R_n and ||R_n||_F^2 (B, n + 2) for a Gram matrix of trace 1, where R_k = P_k / _scales(lifts)[k].

    On R a lift is one scaled product and one difference: R_k = R_(k-1) - scale_(k-1) / lifts[k] R_(k-1)^2.
    """
    # Symmetric, so a product with the transpose is a square: GPUs have faster kernels for it (5 against 11 us at N = 576).
    square, scales = gram @ gram.mT, _scales(lifts)
    # ||G^2||_F^(1/2) = (sum of eigenvalues^4)^(1/4) lies at most N^(1/4) above the largest eigenvalue.
    step = lifts[0] * square.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12).rsqrt()
    lifted = step * (gram - (step / lifts[1]) * square)
    diagonals = [_diagonal(lifted)]
    for lift, scale in zip(lifts[2:], scales[1:], strict=False):
        lifted = lifted - (lifted @ lifted.mT) * (scale / lift)
        diagonals.append(_diagonal(lifted))
    energy = lifted.norm(dim=(1, 2)).square()
    # tr R_0 is the step itself, as the Gram matrix has trace 1.
    return torch.cat([step[:, :, 0], torch.stack(diagonals, 1).sum(2), energy.unsqueeze(1)], 1)


def _scales(lifts: tuple[float, ...]) -> list[float]:
    """The products 1, lifts[1], lifts[1] lifts[2], ...: (n + 1)."""
    return list(accumulate(lifts[1:], operator.mul, initial=1.0))


def _standardise(fit: RankCoefficients, limit: int) -> tuple[list[list[float]], list[float]]:
    """The features are linear in the logarithms of `_traces`: their table (n + 2, m + 1) and constants (m + 1).

    Ratios of traces say how many eigenvalues each lift brings up; the last two features, of the energy, fix the level. The
    first column is the constant 1 of the cubic.
    """
    scales = _scales(fit.lifts)
    level = [math.log(scale) for scale in scales] + [2 * math.log(scales[-1])]
    count = len(level)
    table = [[0.0] * (count + 2) for _ in range(count)]
    constant = [1.0] + [0.0] * (count + 1)
    rows = [({j + 1: 1.0, j: -1.0}, 0.0) for j in range(count - 1)]
    rows += [({count - 1: -1.0}, math.log(limit)), ({count - 1: 1.0}, 0.0)]
    for column, (parts, offset) in enumerate(rows):
        centre, scale = fit.centre[column], fit.scale[column]
        constant[column + 1] = (offset + sum(sign * level[j] for j, sign in parts.items()) - centre) / scale
        for j, sign in parts.items():
            table[j][column + 1] = sign / scale
    return table, constant


def gram_effective_rank(
    gram: Tensor, limit: int, coefficients: RankCoefficients | None = None, floor: Tensor | float = 0.0
) -> Tensor:
    """Effective rank from a centred Gram matrix; see `effective_rank`.

    Args:
        gram: (B, M, M), float32, from `centred_gram`.
        limit: Largest possible rank, min(N - 1, D).
        coefficients: `RANK_COEFFICIENTS` when absent.
        floor: Trace, up to which the tokens count as equal: (B,) or one number.

    Returns:
        (B,), in [1, limit]; 1 where the trace is not above `floor`.
    """
    fit = coefficients or RANK_COEFFICIENTS
    total = _diagonal(gram).sum(1)
    traces = _traces(gram / total.clamp(min=1e-30)[:, None, None], fit.lifts)
    scales = _scales(fit.lifts)
    least = traces.new_tensor([LEAST_TRACE / scale for scale in (*scales, scales[-1] ** 2)])
    table, constant = (traces.new_tensor(values) for values in _standardise(fit, limit))
    # Sums of products instead of small matrix products, which a GPU would round to fewer bits.
    terms = (torch.maximum(traces, least).log()[:, :, None] * table).sum(1) + constant
    terms = terms.clamp(-FEATURE_LIMIT, FEATURE_LIMIT)  # (B, m + 1)
    pairs = (terms.unsqueeze(2) * terms.unsqueeze(1)).flatten(1)
    cubic = (pairs[:, :, None] * traces.new_tensor(cubic_table(fit.weights, len(fit.centre)))).sum(1)
    rank = (cubic * terms).sum(1).clamp(0.0, math.log(limit)).exp()
    return torch.where(total > floor, rank, torch.ones_like(rank))


def effective_rank(features: Tensor, coefficients: RankCoefficients | None = None) -> Tensor:
    """Effective rank of mean-centred tokens: exp of the entropy of their normalised singular values.

    Approximate, from 8 products of min(N, D)-sized matrices; exports to standard ONNX operators, rows are independent.

    Args:
        features: (B, N, D), any floating type (computed in float32), N >= 3; N and D static.
        coefficients: A refit (`leanvlm.calibration.rank_fit.fit_rank`); `RANK_COEFFICIENTS` when absent.

    Returns:
        (B,), in [1, min(N - 1, D)]; exactly 1 where all tokens are equal.
    """
    return rank_and_gram(features, coefficients)[0]


def rank_and_gram(features: Tensor, coefficients: RankCoefficients | None = None) -> tuple[Tensor, Tensor]:
    """Effective rank, and the dot products of the tokens as they are, which the centred ones give almost for free.

    With c = x - m, x_i . x_j = c_i . c_j + c_i . m + c_j . m + m . m; so where N <= D one large product serves both.

    Args:
        features: As for `effective_rank`.
        coefficients: As for `effective_rank`.

    Returns:
        The effective rank (B,) and the un-centred Gram matrix (B, N, N), float32.
    """
    features = features.float()
    count, width = features.shape[1:]
    mean = features.mean(1, keepdim=True)
    centred = features - mean
    offset = mean.square().sum((1, 2))  # (B,), m . m
    if count <= width:
        inner = centred @ centred.mT
        shift = centred @ mean.mT  # (B, N, 1)
        gram = inner + (shift + offset[:, None, None]) + shift.mT
    else:
        inner, gram = centred.mT @ centred, features @ features.mT
    energy = _diagonal(inner).sum(1) + count * offset
    return gram_effective_rank(inner, min(count - 1, width), coefficients, EQUAL_TOKENS * energy), gram


def exact_effective_rank(features: Tensor) -> Tensor:
    """Effective rank by an eigenvalue decomposition in float64: the reference, not for export.

    Args:
        features: (B, N, D), any floating type.

    Returns:
        (B,), float64, at least 1; 1 where all tokens are equal.
    """
    values = features.double()
    gram = centred_gram(values)
    energy = values.square().sum((1, 2))
    spread = _diagonal(gram).sum(1) > EQUAL_TOKENS * energy
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum(1, keepdim=True).clamp(min=1e-300)
    rank = (-torch.special.xlogy(share, share).sum(1)).exp()
    return torch.where(spread, rank, torch.ones_like(rank))


def attention_entropy(attention: Tensor) -> Tensor:
    """Entropy of the [CLS] attention over the tokens, in nats, not divided by ln N.

    Args:
        attention: (B, N), non-negative, with a positive sum; need not sum to 1.

    Returns:
        (B,), in [0, ln N].
    """
    attention = attention.float()
    share = attention / attention.sum(1, keepdim=True)
    return -(share * share.clamp(min=1e-20).log()).sum(1)
