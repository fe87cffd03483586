"""DivPrune (arXiv 2503.02175, CVPR 2025): keep the tokens that are farthest from each other.

Greedy max-min diversity: the first token is the one whose nearest neighbour is farthest away, then always the token that is
farthest from all chosen ones, by cosine distance of the embeddings that the language model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanvlm.exporter.pruners.base import Kept, MatrixRows, ScoredBlock, Signal, VisionTokens, chosen_indices, cosine, keep_all

# Above any cosine distance, and below any: a chosen token's distance to itself.
FAR, CHOSEN = 4.0, -1.0


@dataclass(frozen=True)
class DivPruner:
    """Farthest-point selection.

    Needs no scores, uses no text and merges nothing. The release's: the first token, the rule and the distance. Ours: the
    release selects once over the whole image sequence, here each crop of a batch is a selection of its own; K is given
    instead of a share of N (0.098 there); equal distances go to the lower index.

    Attributes:
        keep: K, tokens kept of each crop.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset()

    keep: int = 64

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        if self.keep >= tokens.count:
            return keep_all(tokens)
        distance = pair_distance(tokens.features)
        rows = MatrixRows(distance)
        near = spread(rows, rows.take(most_isolated(distance)), self.keep - 1)
        return Kept(chosen_indices(near[:, 0] == CHOSEN, self.keep))


def pair_distance(features: Tensor) -> Tensor:
    """Return the cosine distance of every pair of `features` (B, N, D): (B, N, N), 0..2, but `CHOSEN` on the diagonal."""
    index = torch.arange(features.shape[1], device=features.device)
    similarity = cosine(features)
    # Two tokens that are each other's nearest tie by definition; a product's two halves may differ in the last digit.
    similarity = torch.maximum(similarity, similarity.transpose(1, 2))
    return torch.where(index[:, None] == index[None, :], CHOSEN, 1.0 - similarity)


def most_isolated(distance: Tensor) -> Tensor:
    """Return the token whose nearest neighbour is farthest away, by `distance` of `pair_distance`: (B, 1) int64."""
    return torch.where(distance == CHOSEN, FAR, distance).amin(dim=2).argmax(dim=1, keepdim=True)


def spread(distance: MatrixRows, near: Tensor, steps: int, floors: Sequence[Tensor] | None = None) -> Tensor:
    """Choose `steps` more tokens, each the farthest from those chosen; equal ones by index.

    Args:
        distance: Of `pair_distance`.
        near: (B, 1, N), the distance of each token to its nearest chosen one; `CHOSEN` for the chosen, so that they are
            never chosen again.
        steps: How many to choose.
        floors: One (B, 1, 1) for each step, `CHOSEN` where a row chooses and `FAR` where it is done; None: all choose.

    Returns:
        (B, 1, N), `near` after the last step.
    """
    for step in range(steps):
        row = distance.take(near.argmax(dim=2))
        if floors is not None:
            row = torch.maximum(row, floors[step])
        near = torch.minimum(near, row)
    return near
