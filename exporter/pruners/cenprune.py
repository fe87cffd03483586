"""Cen-Prune with DivPrune (arXiv 2608.30263): tokens far from each other once their mean is gone, the distinctive ones first.

The tokens of one image share a direction that makes most of them look alike. Taken away, it leaves distances that tell them
apart; but then a token that hardly differs from the mean counts as much as any other. So each distance is weighed by how
distinctive its token is, which the un-centred cosines say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanvlm.exporter.pruners.base import Kept, MatrixRows, ScoredBlock, Signal, VisionTokens, chosen_indices, keep_all
from leanvlm.exporter.pruners.divprune import CHOSEN, most_isolated, pair_distance, spread

# A distance below this is rounding: the tokens are equal, and the lower index comes first.
EQUAL = 1e-6


@dataclass(frozen=True)
class CenPruner:
    """Farthest-point selection on centred tokens, weighed by distinctiveness.

    Needs no scores, uses no text and merges nothing. There is no release; this follows the paper for LLaVA: features
    after the projector in fp32, per crop, centred and not standardised, DivPrune's own first token (on the centred
    distances) without the weight, then equation 7. The paper divides the weight by its range (equation 11), which changes
    no choice and is left out.

    Attributes:
        keep: K, tokens kept of each crop.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset()

    keep: int = 64

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        features = tokens.features.float()
        count = features.shape[1]
        if self.keep >= count:
            return keep_all(tokens)
        # N times the centred tokens of equation 3: a cosine does not see the factor, and whole numbers stay whole.
        distance = pair_distance(count * features - features.sum(dim=1, keepdim=True))
        distance = torch.where(distance.abs() < EQUAL, 0.0, distance)
        # The weight of a token is the same at every step, so the distances to it are weighed once.
        weighted = torch.where(distance == CHOSEN, CHOSEN, distance * distinctiveness(features)[:, None, :])
        rows = MatrixRows(weighted)
        near = spread(rows, rows.take(most_isolated(distance)), self.keep - 1)
        return Kept(chosen_indices(near[:, 0] == CHOSEN, self.keep))


def distinctiveness(features: Tensor) -> Tensor:
    """Return how little each of `features` (B, N, D) has in common with the others, over the least of all: (B, N), 0 or more.

    It is equation 5's mean cosine to the other tokens, by way of equation 6: no cosine of a pair is computed.
    """
    unit = features / (features.norm(dim=2, keepdim=True) + 1e-8)
    alike = (unit @ unit.mean(dim=1)[:, :, None])[:, :, 0]
    distinct: Tensor = alike.amax(dim=1, keepdim=True) - alike
    return distinct
