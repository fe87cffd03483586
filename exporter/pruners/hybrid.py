"""Attention and diversity tokens in one budget: the mixtures that AgilePruner's study compares (arXiv 2603.01236).

The most attended tokens come first; the rest of the budget goes, one at a time, to the token farthest from all chosen
(FasterVLM, arXiv 2412.01818, with DivPrune, arXiv 2503.02175). The share of the latter is fixed or follows the effective rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanvlm.exporter.pruners.base import (
    Kept,
    MatrixRows,
    ScoredBlock,
    Signal,
    VisionTokens,
    chosen_indices,
    enforce,
    keep_all,
    rank_by,
)
from leanvlm.exporter.pruners.divprune import CHOSEN, FAR, pair_distance, spread
from leanvlm.exporter.pruners.gates import effective_rank
from leanvlm.exporter.pruners.share import diversity_share


@dataclass(frozen=True)
class HybridPruner:
    """Top attention first, then farthest points; at least one attention token starts the set.

    Uses no text and merges nothing. The paper's study has no code for it. Ours: that diversity tokens
    keep away from the attention tokens too, the ends of the adaptive map (see `share`), and the estimated rank (see `gates`).

    Attributes:
        keep: K, tokens kept of each crop.
        share: Diversity tokens' share of K, 0..1, without a gate.
        gate: `erank` lets the share follow the effective rank; `none` keeps it.
        least: The adaptive share at half of `erank_ref` and below.
        most: The adaptive share at 1.5 times `erank_ref` and above.
        erank_ref: Mean effective rank over the model's training images; 90 for LLaVA-1.5.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset({"saliency"})

    keep: int = 64
    share: float = 0.5
    gate: Literal["none", "erank"] = "none"
    least: float = 0.25
    most: float = 0.75
    erank_ref: float = 90.0

    def __post_init__(self) -> None:
        enforce(0.0 <= self.share <= 1.0, f"hybrid: share={self.share} is not in 0..1")
        enforce(0.0 <= self.least <= self.most <= 1.0, "hybrid: least and most are shares, 0 <= least <= most <= 1")
        enforce(self.erank_ref > 0.0, f"hybrid: erank_ref={self.erank_ref} is not positive")

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        if self.keep >= tokens.count:
            return keep_all(tokens)
        distance = pair_distance(tokens.features)
        rank = rank_by(tokens.saliency.float())
        if self.gate == "none":
            diverse = self._diverse(self.share)
            near = _nearest(distance, rank < self.keep - diverse)
            near = spread(MatrixRows(distance), near, diverse)
            return Kept(chosen_indices(near[:, 0] == CHOSEN, self.keep))
        erank = effective_rank(tokens.features)
        share = diversity_share(erank, self.erank_ref, self.least, self.most)
        diverse_tokens = (share[:, None] * self.keep + 0.5).floor().clamp(max=self.keep - 1)  # (B, 1)
        near = _nearest(distance, rank < self.keep - diverse_tokens)
        steps = max(self._diverse(self.most), 1)
        done = torch.arange(steps, device=rank.device)[None, :] >= diverse_tokens
        floors = torch.tensor_split(torch.where(done, FAR, CHOSEN)[:, None, :], steps, dim=2)
        near = spread(MatrixRows(distance), near, steps, floors)
        return Kept(chosen_indices(near[:, 0] == CHOSEN, self.keep), None, {"effective_rank": erank})

    def _diverse(self, share: float) -> int:
        return min(int(share * self.keep + 0.5), self.keep - 1)


def _nearest(distance: Tensor, chosen: Tensor) -> Tensor:
    """Return each token's distance (B, 1, N) to the nearest of those `chosen` (B, N); `CHOSEN` for the chosen themselves."""
    return torch.where(chosen[:, None, :], distance, FAR).amin(dim=2)[:, None, :]
