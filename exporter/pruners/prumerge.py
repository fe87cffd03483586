"""PruMerge+ (arXiv 2403.15388, ICCV 2025) at a fixed K: attention outliers and an even sample, with their neighbours merged in.

A token is an outlier if its attention is over Q3 + 1.5 (Q3 - Q1). What the outliers leave of K goes to an even sample of the
other tokens. Each kept token gains the attention-weighted sum of the tokens whose keys are most similar to its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanvlm.exporter.pruners.base import (
    Kept,
    ScoredBlock,
    Signal,
    VisionTokens,
    enforce,
    first_by,
    gather_tokens,
    keep_all,
    rank_by,
)


@dataclass(frozen=True)
class PruMergePruner:
    """Outliers and even sample as cluster centres; merging before the projector.

    Needs a class token; uses no text; merges. The release's: scores from the tower's last block with the heads not split, the
    rule for outliers, and the merging. There the number of tokens follows the image: r N outliers, the indices 0, s, 2 s, …
    below the last with s = int(int(1 / r) / 3), less the outliers, and one more token with the weighted sum of all that were
    not kept. Ours: K is given, and there is no such token, since it has no position. At a given K, two samples are offered:

    - `even`, ours: the image's own outliers (most attended first, K at most), and the other tokens at even strides.
    - `release`: its proportions and its grid, as for an image with `share` K outliers: that many of the most attended, and the
      grid of that r. Where the grid has too many points they are thinned evenly, where it has too few attention fills up. An
      image with just so many outliers, of which none is on the grid, keeps what the release keeps.

    Attributes:
        keep: K, tokens kept of each crop.
        neighbours: Tokens merged into each kept one.
        sample: Which tokens stand beside the outliers, and how many those are.
        share: With `release`: the outliers' share of K, rounded down, one at least. 0.25 is what comes of the release's step,
            three tokens of the grid for each outlier.
    """

    scored_block: ClassVar[ScoredBlock] = "last"
    needs: ClassVar[frozenset[Signal]] = frozenset({"unsplit", "keys"})

    keep: int = 64
    neighbours: int = 32
    sample: Literal["even", "release"] = "even"
    share: float = 0.25

    def __post_init__(self) -> None:
        enforce(0.0 <= self.share <= 1.0, f"prumerge: share={self.share} is not in 0..1")
        enforce(self.neighbours >= 1, f"prumerge: neighbours={self.neighbours} is not at least 1")

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K centres, in raster order, and merge their neighbours into them."""
        attention = tokens.unsplit.float()
        count = attention.shape[1]
        if self.keep >= count:
            return keep_all(tokens)
        rank = rank_by(attention)
        chosen = self._even(attention, rank) if self.sample == "even" else self._release(rank)
        # The chosen by attention, then the others: no more than K are chosen, and what a grid leaves open is filled up.
        indices = first_by(rank - count * chosen.float(), self.keep)
        near = _neighbours(tokens.keys, indices, min(self.neighbours, count - 1))
        gain = (near.float() * attention[:, None, :]) @ tokens.hidden.float()
        return Kept(indices, gather_tokens(tokens.hidden, indices) + gain.to(tokens.hidden.dtype))

    def _even(self, attention: Tensor, rank: Tensor) -> Tensor:
        # Counted in floating point, exactly: TensorRT's parser clips and adds up nothing else.
        outliers = (attention > _outlier_bound(attention, rank)).float().sum(dim=1, keepdim=True).clamp(max=self.keep).long()
        salient = rank < outliers
        return salient | _even_sample(~salient, self.keep - outliers, rank.shape[1] - outliers)

    def _release(self, rank: Tensor) -> Tensor:
        count = rank.shape[1]
        outliers = max(int(self.share * self.keep), 1)
        step = max(int(int(1 / (outliers / count)) / 3), 1)
        index = torch.arange(count, device=rank.device)
        salient = rank < outliers
        free = ~salient & (index % step == 0) & (index < count - 1)
        size = free.float().sum(dim=1, keepdim=True).clamp(min=1.0).long()
        return salient | _even_sample(free, self.keep - outliers, size)


def _outlier_bound(attention: Tensor, rank: Tensor) -> Tensor:
    """Return Q3 + 1.5 (Q3 - Q1) of `attention` (B, N), whose descending rank is known: (B, 1)."""
    last = attention.shape[1] - 1

    def quantile(share: float) -> Tensor:
        lower = int(share * last)
        values = [torch.where(rank == last - order, attention, 0.0).sum(1, True) for order in (lower, min(lower + 1, last))]
        return values[0] + (share * last - lower) * (values[1] - values[0])

    first, third = quantile(0.25), quantile(0.75)
    return third + 1.5 * (third - first)


def _even_sample(rest: Tensor, wanted: Tensor | int, size: Tensor) -> Tensor:
    """Mark `wanted` (B, 1) of the `size` (B, 1) true values of `rest` (B, N) at even strides, all if they are fewer: (B, N)."""
    number = rest.float().cumsum(dim=1).to(torch.int64)
    # Where number is 0, rest is false: so cutting off is as good as rounding down, and is one operator.
    upto, before = (torch.div(p * wanted, size, rounding_mode="trunc") for p in (number, number - 1))
    return rest & (upto > before)


def _neighbours(keys: Tensor, indices: Tensor, number: int) -> Tensor:
    """Mark the `number` tokens with the most similar `keys` (B, N, H, d) to each of `indices` (B, K): (B, K, N) bool."""
    whole = keys.float().flatten(2)
    unit = whole / (whole.norm(dim=2, keepdim=True) + 1e-8)
    index = torch.arange(unit.shape[1], device=unit.device)
    similarity = gather_tokens(unit, indices) @ unit.transpose(1, 2)
    similarity = torch.where(index == indices[:, :, None], -2.0, similarity)
    least = torch.topk(similarity, number, dim=2).values[:, :, -1:]
    over, equal = similarity > least, similarity == least
    # Of those that equal the last one, only as many as there is room for, by index.
    room = number - over.sum(dim=2, keepdim=True)
    return over | (equal & (equal.float().cumsum(dim=2) <= room))
