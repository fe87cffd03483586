"""PruMerge+ (arXiv 2403.15388, ICCV 2025) at a fixed K: attention outliers and an even sample, with their neighbours merged in.

A token is an outlier if its attention is over Q3 + 1.5 (Q3 - Q1). What the outliers leave of K goes to the other tokens at
even strides. Each kept token gains the attention-weighted sum of the tokens whose keys are most similar to its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanvlm.exporter.pruners.base import (
    Kept,
    ScoredBlock,
    VisionTokens,
    chosen_indices,
    gather_tokens,
    keep_all,
    rank_by,
    require,
)


@dataclass(frozen=True)
class PruMergePruner:
    """Outliers and even sample as cluster centres; merging before the projector.

    Needs a class token; uses no text; merges. Scores come from the tower's last block with the heads not split, as in the
    release. There the number of tokens follows the image, and one more token holds the weighted sum of all tokens that were
    not kept; here K is given (outliers beyond it go by attention) and there is no such token, since it has no place.

    Attributes:
        keep: K, tokens kept of each crop.
        neighbours: Tokens merged into each kept one.
    """

    scored_block: ClassVar[ScoredBlock] = "last"

    keep: int = 64
    neighbours: int = 32

    def __post_init__(self) -> None:
        require(self.neighbours >= 1, f"prumerge: neighbours={self.neighbours} is not at least 1")

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K centres, in raster order, and merge their neighbours into them."""
        attention = tokens.unsplit_attention.float()
        count = attention.shape[1]
        if self.keep >= count:
            return keep_all(tokens)
        rank = rank_by(attention)
        # Counted in floating point, exactly: TensorRT's parser clips and adds up nothing else.
        outliers = (attention > _outlier_bound(attention, rank)).float().sum(dim=1, keepdim=True).clamp(max=self.keep).long()
        salient = rank < outliers
        chosen = salient | _even_sample(~salient, self.keep - outliers, count - outliers)
        indices = chosen_indices(chosen, self.keep)
        near = _neighbours(tokens.keys, indices, min(self.neighbours, count - 1))
        gain = (near.float() * attention[:, None, :]) @ tokens.hidden.float()
        return Kept(indices, gather_tokens(tokens.hidden, indices) + gain.to(tokens.hidden.dtype))


def _outlier_bound(attention: Tensor, rank: Tensor) -> Tensor:
    """Return Q3 + 1.5 (Q3 - Q1) of `attention` (B, N), whose descending rank is known: (B, 1)."""
    last = attention.shape[1] - 1

    def quantile(share: float) -> Tensor:
        lower = int(share * last)
        values = [torch.where(rank == last - place, attention, 0.0).sum(1, True) for place in (lower, min(lower + 1, last))]
        return values[0] + (share * last - lower) * (values[1] - values[0])

    first, third = quantile(0.25), quantile(0.75)
    return third + 1.5 * (third - first)


def _even_sample(rest: Tensor, wanted: Tensor, size: Tensor) -> Tensor:
    """Mark `wanted` (B, 1) of the `size` (B, 1) true places of `rest` (B, N) at even strides: (B, N) bool."""
    place = rest.float().cumsum(dim=1).to(torch.int64)
    # Where place is 0, rest is false: so cutting off is as good as rounding down, and is one operator.
    upto, before = (torch.div(p * wanted, size, rounding_mode="trunc") for p in (place, place - 1))
    return rest & (upto > before)


def _neighbours(keys: Tensor, indices: Tensor, number: int) -> Tensor:
    """Mark the `number` tokens with the most similar `keys` (B, N, H, d) to each of `indices` (B, K): (B, K, N) bool."""
    whole = keys.float().flatten(2)
    unit = whole / (whole.norm(dim=2, keepdim=True) + 1e-8)
    place = torch.arange(unit.shape[1], device=unit.device)
    similarity = gather_tokens(unit, indices) @ unit.transpose(1, 2)
    similarity = torch.where(place == indices[:, :, None], -2.0, similarity)
    least = torch.topk(similarity, number, dim=2).values[:, :, -1:]
    over, equal = similarity > least, similarity == least
    # Of those that equal the last one, only as many as there is room for, by place.
    room = number - over.sum(dim=2, keepdim=True)
    return over | (equal & (equal.float().cumsum(dim=2) <= room))
