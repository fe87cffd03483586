"""Every pruning method once more, slowly: plain loops over one crop in float64, after the papers' descriptions.

Nothing of the library is imported. Each function takes a `Crop` and K and returns the kept indices in raster order, with the
merged tokens (K, Dv) where the method merges. Equal scores go to the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Result = tuple[list[int], Array | None]


@dataclass(frozen=True)
class Crop:
    """The tokens of one crop: features (N, D), hidden (N, Dv), keys (N, H, d), both attentions (N,)."""

    features: Array
    hidden: Array
    keys: Array
    attention: Array
    unsplit_attention: Array


def falling(scores: Sequence[float] | Array) -> list[int]:
    """Return the indices from the highest to the lowest score."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def cosines(tokens: Array) -> Array:
    """Return the cosine of every pair."""
    tokens = np.asarray(tokens, dtype=np.float64)
    norms = np.maximum(np.sqrt((tokens**2).sum(axis=1)), 1e-8)
    return tokens @ tokens.T / norms[:, None] / norms[None, :]


def agile(crop: Crop, keep: int, ratio: float = 1.0) -> Result:
    """AgilePruner: visit by attention, silence near tokens, stop at K or fill up by attention."""
    return agile_with_margin(crop, keep, ratio)[0], None


def agile_with_margin(
    crop: Crop, keep: int, ratio: float = 1.0, step: float = 0.01, largest: float = 0.25
) -> tuple[list[int], float]:
    """Return AgilePruner's choice and the smallest difference between a distance that it looked at and its threshold."""
    distance = 1.0 - cosines(crop.features)
    order = falling(crop.attention)
    alive = np.ones(len(order), dtype=bool)
    chosen: list[int] = []
    margin = math.inf
    for rank, token in enumerate(order, start=1):
        if not alive[token]:
            continue
        if len(chosen) == keep:
            break
        chosen.append(token)
        alive[token] = False
        threshold = min(rank * ratio * step, largest)
        if alive.any():
            margin = min(margin, float(np.abs(distance[token][alive] - threshold).min()))
        alive &= distance[token] >= threshold
    for token in order:
        if len(chosen) < keep and token not in chosen:
            chosen.append(token)
    return sorted(chosen), margin


def attention(crop: Crop, keep: int) -> Result:
    """FasterVLM: the K most attended."""
    return sorted(falling(crop.attention)[:keep]), None


def cenprune(crop: Crop, keep: int) -> Result:
    """Cen-Prune with DivPrune: its start and its rule on centred tokens, distances weighed by un-centred distinctiveness."""
    count = len(crop.features)
    if keep >= count:
        return list(range(count)), None
    # Equal tokens are equally far from a third; a product's last digits may say otherwise.
    distance = np.round(1.0 - cosines(crop.features - crop.features.mean(axis=0)), 12)
    similarity = cosines(crop.features)
    scores = [-sum(similarity[i][j] for j in range(count) if j != i) / (count - 1) for i in range(count)]
    weights = np.round((np.array(scores) - min(scores)) / (max(scores) - min(scores) + 1e-12), 12)
    nearest = [min(distance[i][j] for j in range(count) if j != i) for i in range(count)]
    return _farthest(distance, [falling(nearest)[0]], keep, weights), None


def divprune(crop: Crop, keep: int) -> Result:
    """DivPrune: the token farthest from its nearest neighbour, then the one farthest from the set."""
    distance = 1.0 - cosines(crop.features)
    count = len(distance)
    if keep >= count:
        return list(range(count)), None
    nearest = [min(distance[i][j] for j in range(count) if j != i) for i in range(count)]
    return _farthest(distance, [falling(nearest)[0]], keep), None


def hybrid(crop: Crop, keep: int, share: float = 0.5) -> Result:
    """Top attention, at least one token, then the tokens farthest from the set."""
    diverse = min(math.floor(share * keep + 0.5), keep - 1)
    start = falling(crop.attention)[: keep - diverse]
    return _farthest(1.0 - cosines(crop.features), start, keep), None


def _farthest(distance: Array, chosen: list[int], keep: int, weights: Array | None = None) -> list[int]:
    chosen = list(chosen)
    weights = np.ones(len(distance)) if weights is None else weights
    while len(chosen) < keep:
        others = [i for i in range(len(distance)) if i not in chosen]
        apart = [weights[i] * min(distance[i][j] for j in chosen) for i in others]
        chosen.append(others[falling(apart)[0]])
    return sorted(chosen)


def none(crop: Crop, keep: int) -> Result:
    """Every token."""
    return list(range(len(crop.attention))), None


def prumerge(crop: Crop, keep: int, neighbours: int = 32, sample: str = "even", share: float = 0.25) -> Result:
    """PruMerge+ with K given: outliers by attention, a sample of the others, neighbours by key merged in."""
    weights = np.asarray(crop.unsplit_attention, dtype=np.float64)
    count = len(weights)
    if keep >= count:
        return list(range(count)), None
    if sample == "even":
        outliers = outliers_of(weights)[:keep]
        rest = [i for i in range(count) if i not in outliers]
    else:
        outliers = falling(weights)[: max(math.floor(share * keep), 1)]
        rest = [i for i in release_grid(len(outliers), count) if i not in outliers]
    wanted = keep - len(outliers)
    spaced = [token for n, token in enumerate(rest) if (n + 1) * wanted // len(rest) > n * wanted // len(rest)]
    chosen = outliers + spaced
    chosen += [i for i in falling(weights) if i not in chosen][: keep - len(chosen)]
    chosen = sorted(chosen)
    similarity = cosines(np.reshape(crop.keys, (count, -1)))
    merged = []
    for token in chosen:
        others = [i for i in falling(similarity[token]) if i != token][:neighbours]
        merged.append(crop.hidden[token] + sum(weights[i] * crop.hidden[i] for i in others))
    return chosen, np.array(merged)


def outliers_of(weights: Array) -> list[int]:
    """Return the indices over Q3 + 1.5 (Q3 - Q1), the highest first."""
    first, third = np.percentile(weights, 25), np.percentile(weights, 75)
    return [i for i in falling(weights) if weights[i] > third + 1.5 * (third - first)]


def release_grid(outliers: int, count: int) -> list[int]:
    """Return PruMerge+'s evenly spaced indices as its release lays them: a third of 1 / r apart, the last index left out."""
    ratio = outliers / count
    return list(range(0, count - 1, max(int(int(1 / ratio) / 3), 1)))


def random(crop: Crop, keep: int, seed: int = 0) -> Result:
    """The first K of a seeded permutation."""
    return sorted(int(i) for i in np.random.default_rng(seed).permutation(len(crop.attention))[:keep]), None


def scope(crop: Crop, keep: int, alpha: float = 1.0) -> Result:
    """SCOPE: the largest product of added coverage and attention."""
    similarity = cosines(crop.hidden)
    saliency = np.asarray(crop.attention, dtype=np.float64) ** alpha
    covered = np.zeros(len(saliency))
    chosen: list[int] = []
    while len(chosen) < keep:
        others = [i for i in range(len(saliency)) if i not in chosen]
        gains = [np.maximum(similarity[i] - covered, 0.0).sum() * saliency[i] for i in others]
        chosen.append(others[falling(gains)[0]])
        covered = np.maximum(covered, similarity[chosen[-1]])
    return sorted(chosen), None


def uniform(crop: Crop, keep: int) -> Result:
    """The middle of each of K equal stretches."""
    count = len(crop.attention)
    return [math.floor((i + 0.5) * count / keep) for i in range(keep)], None


def visionzip(crop: Crop, keep: int, contextual: float = 10 / 64) -> Result:
    """VisionZip: dominant tokens by attention; an even stride of the others collects the rest by key."""
    count = len(crop.attention)
    if keep >= count:
        return list(range(count)), None
    number = min(math.floor(contextual * keep + 0.5), keep)
    dominant = falling(crop.attention)[: keep - number]
    if number == 0:
        return sorted(dominant), None
    rest = [i for i in range(count) if i not in dominant]
    targets = rest[:: len(rest) // number][:number]
    similarity = cosines(np.mean(np.asarray(crop.keys, dtype=np.float64), axis=1))
    members: dict[int, list[Array]] = {target: [] for target in targets}
    for token in rest:
        if token not in targets:
            members[targets[falling([similarity[token][t] for t in targets])[0]]].append(crop.hidden[token])
    chosen = sorted(dominant + targets)
    merged = [crop.hidden[i] + (np.mean(members[i], axis=0) if members.get(i) else 0.0) for i in chosen]
    return chosen, np.array(merged)


def vispruner(crop: Crop, keep: int, ratio: float = 0.5, drop: int = 8) -> Result:
    """VisPruner: top attention, and the rest thinned by comparing even with odd positions of a list."""
    similarity = cosines(crop.hidden)
    order = falling(crop.attention)
    important = int(ratio * keep)
    listed = order[important:]
    while len(listed) > keep - important:
        even, odd = listed[::2], listed[1::2]
        best = [max((similarity[i][j] for j in odd), default=-2.0) for i in even]
        surplus = len(listed) - (keep - important)
        gone = {even[n] for n in falling(best)[: min(drop, surplus)]}
        listed = [i for i in listed if i not in gone]
    return sorted(order[:important] + listed), None


REFERENCE: dict[str, Callable[..., Result]] = {
    "agile": agile,
    "attention": attention,
    "cenprune": cenprune,
    "divprune": divprune,
    "hybrid": hybrid,
    "none": none,
    "prumerge": prumerge,
    "random": random,
    "scope": scope,
    "uniform": uniform,
    "visionzip": visionzip,
    "vispruner": vispruner,
}
