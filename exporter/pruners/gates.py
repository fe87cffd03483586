"""Image-complexity gates: the attention entropy and an effective rank that can live inside an ONNX graph.

The effective rank of Roy and Vetterli (EUSIPCO 2007) needs the singular values of the centred tokens, and ONNX has no
operator for them. Here it is read off the traces of a short chain of matrix products, a log-polynomial fitted once to
exact values (`leanvlm.calibration.rank_fit`). AgilePruner (arXiv 2603.01236) uses both quantities as its gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

# Energy of the centred tokens, relative to all energy, below which they count as equal: above float32 rounding squared.
EQUAL_TOKENS = 1e-12
# Standardised features are held to this range, so that an unusual spectrum cannot blow the cubic up.
FEATURE_LIMIT = 4.0
# Traces below this are rounding.
LEAST_TRACE = 1e-9


@dataclass(frozen=True)
class RankCoefficients:
    """Constants of the fitted effective rank.

    Attributes:
        lifts: n + 1 factors. P_0 = lifts[0] * G / c and P_k = P_(k-1) (lifts[k] I - P_(k-1)), one product each.
        centre: Mean of each of the n + 3 features over the fitting set.
        scale: Standard deviation of each feature.
        weights: One per monomial of degree 0 to 3 in the standardised features, in the order of
            `itertools.combinations_with_replacement` over (1, feature 0, feature 1, ...), three at a time.
    """

    lifts: tuple[float, ...]
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]


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


def _log_traces(gram: Tensor, lifts: tuple[float, ...]) -> Tensor:
    """Natural logarithms (B, n + 2) of tr P_0 ... tr P_n and ||P_n||_F^2 for a Gram matrix of trace 1.

    The chain runs on R_k = P_k / scale_k with scale_k = lifts[1] ... lifts[k], for which a lift is one scaled product and one
    difference: R_k = R_(k-1) - scale_(k-1) / lifts[k] R_(k-1)^2.
    """
    square = gram @ gram
    # ||G^2||_F^(1/2) = (sum of eigenvalues^4)^(1/4) lies at most N^(1/4) above the largest eigenvalue.
    step = lifts[0] * square.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12).rsqrt()
    first = step * gram
    lifted = first - (step * step / lifts[1]) * square
    diagonals, scales = [_diagonal(first), _diagonal(lifted)], [1.0, lifts[1]]
    for lift in lifts[2:]:
        lifted = lifted - (lifted @ lifted) * (scales[-1] / lift)
        diagonals.append(_diagonal(lifted))
        scales.append(scales[-1] * lift)
    traces = torch.stack(diagonals, 1).sum(2) * lifted.new_tensor(scales)
    energy = lifted.square().sum((1, 2)).unsqueeze(1) * scales[-1] ** 2
    return torch.cat([traces, energy], 1).clamp(min=LEAST_TRACE).log()


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
    logs = _log_traces(gram / total.clamp(min=1e-30)[:, None, None], fit.lifts)
    bound = torch.full_like(logs[:, :1], math.log(limit))
    # Ratios say how many eigenvalues each lift brings up; the last two columns fix the level.
    features = torch.cat([logs[:, 1:] - logs[:, :-1], bound - logs[:, -1:], logs[:, -1:]], 1)
    standard = (features - features.new_tensor(fit.centre)) / features.new_tensor(fit.scale)
    terms = torch.cat([torch.ones_like(bound), standard.clamp(-FEATURE_LIMIT, FEATURE_LIMIT)], 1)
    pairs = (terms.unsqueeze(2) * terms.unsqueeze(1)).flatten(1)
    cubic = pairs @ features.new_tensor(cubic_table(fit.weights, len(fit.centre)))
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
    attention = attention.float()
    attention = attention.float()
    share = attention / attention.sum(1, keepdim=True)
    return -(share * share.clamp(min=1e-20).log()).sum(1)


# leanvlm.calibration.rank_fit.fit_rank(): 8000 synthetic spectra, no measured ones. Relative error, mean and worst, float32,
# against the decomposition on 200 later draws (N 144-729, D 256-4096): iid 0.7, 3.1 %; power laws 0.4, 2.1 %; exponential
# 0.9, 4.8 %; clustered 2.7, 11.5 %. Built-in model, 240 scenes: 0.4, 1.0 %; refitted on half, the rest 0.07, 0.35 %.
RANK_COEFFICIENTS = RankCoefficients(
    lifts=(
        2.937,
        3.102,
        3.436,
        3.329,
        3.313,
        3.48,
        3.299,
        2.928,
        2.314,
    ),
    centre=(
        0.3382121,
        0.7692785,
        0.324703,
        0.456364,
        0.4239056,
        0.07299809,
        0.0611188,
        -0.2498978,
        -0.04236963,
        1.155849,
        4.659471,
    ),
    scale=(
        0.5206832,
        0.2294657,
        0.4023903,
        0.2448223,
        0.2687448,
        0.3383169,
        0.2838275,
        0.2550229,
        0.1891318,
        1.264546,
        1.278943,
    ),
    weights=(
        3.76845,
        0.181327,
        0.0891955,
        0.0879292,
        0.0212917,
        -0.0407524,
        -0.066034,
        -0.166133,
        -0.154426,
        -0.317434,
        0.058388,
        1.27623,
        -0.0255391,
        -0.0488024,
        0.0194939,
        -0.0166078,
        0.0243382,
        -0.0455223,
        -0.0248825,
        0.000977814,
        -0.0828948,
        -0.00738939,
        0.0288342,
        0.00600492,
        -0.00600633,
        0.00798252,
        -0.0196935,
        0.021916,
        0.0237367,
        0.0109546,
        -0.000559252,
        0.00887086,
        0.0407655,
        0.0187812,
        0.0181515,
        0.0632004,
        0.00228335,
        -0.00993383,
        0.017807,
        -0.0459474,
        0.0122893,
        0.00126279,
        0.00161097,
        0.0219997,
        0.024081,
        0.00116913,
        0.0145265,
        -0.0591298,
        -0.00819292,
        0.0299053,
        0.00284264,
        0.0389853,
        0.0155575,
        0.00297784,
        -0.0261655,
        0.0213222,
        -0.0163715,
        0.0138218,
        0.0270604,
        0.023385,
        -0.0457575,
        0.0251868,
        0.0502315,
        0.0274877,
        0.024695,
        -0.0360893,
        -0.064832,
        0.00162894,
        0.012293,
        -0.0155751,
        0.0187862,
        -0.0128193,
        -0.0458155,
        -0.176108,
        0.0168847,
        -0.0294492,
        -0.00119722,
        -0.00331826,
        -0.0109504,
        -0.0898788,
        0.0958967,
        -0.0417601,
        -0.0388801,
        0.0229677,
        0.0169699,
        0.00235245,
        0.0412898,
        -0.0452485,
        0.00244428,
        -0.0129804,
        0.0101108,
        -0.00499008,
        -0.0393109,
        -0.0549888,
        -0.0544047,
        0.00656681,
        0.00850833,
        -0.0372798,
        0.0907428,
        0.0185681,
        -0.0221835,
        -0.000192695,
        0.0873812,
        0.0645498,
        0.00553742,
        0.0252721,
        0.00389961,
        -0.122321,
        0.000681419,
        -0.0353692,
        -0.00225865,
        -0.0145003,
        -0.0151907,
        0.0151307,
        0.00393672,
        0.0469055,
        0.00112868,
        -0.0142629,
        0.00122007,
        -0.00610023,
        -0.0125688,
        -0.0793976,
        0.075006,
        0.00972495,
        0.0474097,
        0.0275291,
        0.0377922,
        -0.00232411,
        -0.0615467,
        -0.000965014,
        -0.00392733,
        0.070387,
        0.0377173,
        -0.049905,
        0.00854929,
        -0.00491288,
        -0.00196135,
        -0.00269629,
        0.0150151,
        -0.0478473,
        -0.0599723,
        -0.000956552,
        0.111549,
        0.0187731,
        0.00216482,
        -0.00660578,
        0.0088605,
        -0.00540839,
        -0.0104513,
        -0.00660102,
        0.00773136,
        -0.00218299,
        -0.000893681,
        0.0163743,
        -9.39843e-05,
        -0.0232932,
        -0.00700917,
        0.0147251,
        0.00477301,
        -0.0117771,
        0.00694814,
        -0.00291547,
        -0.0289242,
        0.00691324,
        -0.00344604,
        -0.0156517,
        -0.0108286,
        0.00960998,
        0.0101925,
        -9.06761e-05,
        -0.00511519,
        -0.000634087,
        -0.0146008,
        -0.0108292,
        -0.0085798,
        -0.0211616,
        -0.0403549,
        0.0192416,
        -0.00699905,
        -0.0177715,
        0.000673,
        -0.0112989,
        -0.00188324,
        0.0522079,
        -0.0110546,
        -0.00747682,
        0.0278756,
        0.0346671,
        0.0387125,
        0.00406696,
        0.00648173,
        0.0176617,
        -0.00508449,
        0.0133706,
        0.00737819,
        -0.00783015,
        -0.00845542,
        0.0248673,
        -0.0165785,
        -0.000599085,
        0.014883,
        0.00607366,
        -0.0149353,
        0.0059909,
        0.00478757,
        0.00663757,
        -0.0165311,
        -0.0110719,
        -0.0148981,
        -0.012672,
        0.0147008,
        -0.000792635,
        -0.0119247,
        0.006596,
        0.00553996,
        0.00925095,
        -0.0060945,
        0.0140088,
        0.00258932,
        0.00641985,
        -0.0237458,
        0.00704476,
        0.000882812,
        0.00371224,
        0.0276225,
        0.0145251,
        -0.00176494,
        -0.010702,
        -0.0585785,
        0.0148444,
        -0.00459262,
        0.032909,
        -0.00688741,
        -0.0502372,
        0.000492315,
        -0.00838543,
        0.00347258,
        -0.00512715,
        -0.00572171,
        -0.0774731,
        -0.010133,
        -0.0185765,
        0.0112717,
        0.0240523,
        0.00228757,
        0.000565475,
        -0.00324932,
        -0.00276351,
        -0.00249187,
        -0.000630761,
        -0.00761145,
        -0.00957199,
        -0.00330547,
        -0.0110012,
        -0.00520067,
        -0.00610516,
        -0.00240425,
        -0.00874284,
        0.0315827,
        -0.00284773,
        -5.58175e-05,
        0.010264,
        -0.00116795,
        0.00627089,
        0.0102036,
        -0.00269822,
        -0.00355979,
        0.00364094,
        -0.0120966,
        0.00490685,
        -0.00428153,
        0.0139303,
        0.0308451,
        0.0120368,
        -0.0117242,
        -0.0587144,
        -0.0151882,
        -0.0212637,
        -0.00214122,
        -0.0119246,
        0.00265391,
        -0.000932545,
        0.00774473,
        0.00290872,
        0.00667554,
        -0.024892,
        -0.0013748,
        0.00185444,
        0.0029177,
        -0.00700302,
        -0.00307301,
        -0.00480749,
        -0.000851867,
        -0.0101604,
        0.013229,
        -0.0485699,
        -0.0346064,
        0.00617933,
        0.00465902,
        -0.00800788,
        -0.0288037,
        0.00756558,
        -0.0452455,
        -0.0809333,
        0.0346376,
        0.00685069,
        0.100927,
        -0.0126604,
        -0.000250467,
        0.00548345,
        0.00427742,
        -0.00742124,
        0.0001998,
        0.0033448,
        0.0104142,
        0.00025833,
        0.0666174,
        0.0639982,
        -0.0238691,
        0.00442637,
        -0.00701445,
        0.0238712,
        -0.0164307,
        0.0336064,
        -0.00235352,
        -0.0162165,
        -0.0276256,
        0.00851313,
        0.0138767,
        -0.000611363,
        -0.00190343,
        0.0193867,
        0.0244016,
        0.00180083,
        -0.00306927,
        0.00681403,
        0.023584,
        0.00363067,
        0.0296501,
        0.00559681,
        -0.0636465,
        -0.0446759,
        -0.0738214,
        0.0103633,
        0.00350886,
        0.00876968,
        0.00201144,
        -0.0107055,
        -0.0208411,
        -0.0353194,
        0.00494005,
        0.00196586,
        9.50703e-05,
        0.00497934,
        0.000363774,
        -0.0138056,
        -0.0139455,
        -0.0371889,
        0.0340349,
        0.000967665,
        0.00512562,
        0.00869159,
        -0.0891347,
        -0.0265542,
    ),
)
