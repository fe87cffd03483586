"""Image-complexity gates: the attention entropy and an effective rank that can live inside an ONNX graph.

The effective rank of Roy and Vetterli (EUSIPCO 2007) is exp(H), where H is the entropy of the normalised singular values of the
centred tokens. ONNX has no operator for singular values. But with S = sum s and T = sum s ln s, H = ln S - T / S, and both
sums are traces of functions of the Gram matrix. Here sqrt(x) and sqrt(x) ln sqrt(x) are written in the polynomials of a short
chain of matrix products, with weights that approximate them over seven decades of eigenvalues (`leanvlm.calibration.rank_fit`);
so the estimate rests on no assumption about the spectrum.

AgilePruner (arXiv 2603.01236) uses both quantities as its gate. Its release takes the rank from a decomposition in fp32, of its
first crop only; the estimate, and a rank for each crop, are ours.
"""

from __future__ import annotations

import math
import operator
from itertools import accumulate

import torch
from torch import Tensor

from leanvlm.exporter.pruners.base import diagonal
from leanvlm.exporter.pruners.rank_coefficients import RANK_COEFFICIENTS

# Energy of the centred tokens, relative to all energy, below which they count as equal: above float32 rounding squared.
EQUAL_TOKENS = 1e-12
# Columns that one product sums over.
PIECE = 256
# The sum of singular values is held above this; it is over 1 / 2 for every spectrum.
LEAST_SUM = 1e-3


def centred_gram(features: Tensor) -> Tensor:
    """Gram matrix of the tokens after subtracting their mean, on the smaller side.

    Args:
        features: (B, N, D), float32.

    Returns:
        (B, N, N) where N <= D, else (B, D, D); both have the same non-zero eigenvalues.
    """
    centred = features - features.mean(1, keepdim=True)
    return centred @ centred.mT if features.shape[1] <= features.shape[2] else centred.mT @ centred


def _traces(gram: Tensor, lifts: tuple[float, ...], shift: float) -> Tensor:
    """Return tr R_0 ... tr R_n and ||R_n||_F^2 (B, n + 2) for a Gram matrix of trace 1, where R_k = P_k / _scales(lifts)[k].

    On R a lift is one scaled product and one difference: R_k = R_(k-1) - scale_(k-1) / lifts[k] R_(k-1)^2.
    """
    # Symmetric, so a product with the transpose is a square: GPUs have faster kernels for it (5 against 11 us at N = 576).
    square, scales = gram @ gram.mT, _scales(lifts)
    # ||G^2||_F^(1/2) = (sum of eigenvalues^4)^(1/4) lies at most N^(1/4) above the largest eigenvalue.
    step = lifts[0] * square.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12).rsqrt()
    lifted = step * (gram - (step / lifts[1]) * square) + shift / lifts[1] * _identity(gram)
    diagonals = [diagonal(lifted)]
    for lift, scale in zip(lifts[2:], scales[1:], strict=False):
        lifted = lifted - (lifted @ lifted.mT) * (scale / lift)
        diagonals.append(diagonal(lifted))
    energy = lifted.norm(dim=(1, 2)).square()
    # tr R_0 is the step itself, as the Gram matrix has trace 1.
    return torch.cat([step[:, :, 0], torch.stack(diagonals, 1).sum(2), energy.unsqueeze(1)], 1)


def _identity(matrix: Tensor) -> Tensor:
    """Return the identity (M, M) of the size and type of (B, M, M)."""
    index = torch.arange(matrix.shape[1], device=matrix.device)
    return (index[:, None] == index[None, :]).to(matrix.dtype)


def _scales(lifts: tuple[float, ...]) -> list[float]:
    """The products 1, lifts[1], lifts[1] lifts[2], ...: (n + 1)."""
    return list(accumulate(lifts[1:], operator.mul, initial=1.0))


def gram_effective_rank(gram: Tensor, limit: int, floor: Tensor | float = 0.0) -> Tensor:
    """Effective rank from a centred Gram matrix; see `effective_rank`.

    Args:
        gram: (B, M, M), float32, from `centred_gram`.
        limit: Largest possible rank, min(N - 1, D).
        floor: Trace, up to which the tokens count as equal: (B,) or one number.

    Returns:
        (B,), in [1, limit]; 1 where the trace is not above `floor`.
    """
    fit = RANK_COEFFICIENTS
    total = diagonal(gram).sum(1)
    traces = _traces(gram / total.clamp(min=1e-30)[:, None, None], fit.lifts, fit.shift)
    scales = _scales(fit.lifts)
    # One row a trace: its weight in S and in T. A sum of products, since a GPU would round a matrix product to fewer bits.
    level = [*scales, scales[-1] ** 2]
    table = [[root * s, entropy * s] for root, entropy, s in zip(fit.root, fit.entropy, level, strict=True)]
    sums = (traces[:, :, None] * traces.new_tensor(table)).sum(1)
    root, entropy = sums[:, 0].clamp(min=LEAST_SUM), sums[:, 1]
    rank = (root.log() - entropy / root).clamp(0.0, math.log(limit)).exp()
    return torch.where(total > floor, rank, torch.ones_like(rank))


def effective_rank(features: Tensor) -> Tensor:
    """Effective rank of mean-centred tokens: exp of the entropy of their normalised singular values.

    Approximate, from 13 products of min(N, D)-sized matrices; exports to standard ONNX operators, rows are independent.

    Args:
        features: (B, N, D), any floating type (computed in float32), N >= 3; N and D static.

    Returns:
        (B,), in [1, min(N - 1, D)]; exactly 1 where all tokens are equal.
    """
    return rank_and_gram(features)[0]


def rank_and_gram(features: Tensor) -> tuple[Tensor, Tensor]:
    """Effective rank, and the dot products of the tokens as they are, which the centred ones give almost for free.

    With c = x - m, x_i . x_j = c_i . c_j + c_i . m + c_j . m + m . m; so where N <= D one large product serves both. It is
    summed over pieces of D: a GPU's tensor cores cut every partial sum, which over 4096 columns leaves eigenvalues at 1e-5 of
    either sign that should be zero, and over 256 at 4e-7 (H100, TF32).

    Args:
        features: As for `effective_rank`.

    Returns:
        The effective rank (B,) and the un-centred Gram matrix (B, N, N), float32.
    """
    count, width = features.shape[1:]
    # Turned before it is widened: half the bytes.
    cut = _pieces(width)
    pieces = features.reshape(-1, count, cut, width // cut).transpose(1, 2).float()  # (B, C, N, D / C)
    mean = pieces.mean(2, keepdim=True)
    offset = mean.square().sum((1, 2, 3))  # (B,), m . m
    centred = pieces - mean
    if count <= width:
        inner = (centred @ centred.mT).sum(1)
        shift = (centred @ mean.mT).sum(1)  # (B, N, 1)
        gram = inner + (shift + offset[:, None, None]) + shift.mT
    else:
        inner, gram = centred_gram(features.float()), (pieces @ pieces.mT).sum(1)
    energy = diagonal(inner).sum(1) + count * offset
    return gram_effective_rank(inner, min(count - 1, width), EQUAL_TOKENS * energy), gram


def _pieces(width: int) -> int:
    """Return into how many equal pieces of at most `PIECE` columns a width is cut; 1 if it has no such divisor near."""
    least = -(-width // PIECE)
    return next((count for count in range(least, 4 * least + 1) if width % count == 0), 1)


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
    spread = diagonal(gram).sum(1) > EQUAL_TOKENS * energy
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
