"""VisPruner (arXiv 2412.01818, ICCV 2025): important tokens by attention, the others thinned until no duplicates remain.

The tokens that are not important stand in a list, most attended first. A sweep compares each token at an even position with
all at odd positions, by cosine before the projector, and drops the few even ones that have the most similar partner; then
the other even ones, most similar first, and the odd ones form the next list. Sweeps end when the list is as long as wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanvlm.exporter.pruners.base import Kept, ScoredBlock, VisionTokens, chosen_indices, cosine, keep_all, rank_by
from leanvlm.exporter.pruners.gates import effective_rank
from leanvlm.exporter.pruners.share import diversity_share

# List position of a token outside the list; neither even nor odd.
OUT = -0.5


@dataclass(frozen=True)
class VisPruner:
    """Top attention, then bipartite duplicate removal among the rest.

    Needs a class token; uses no text and merges nothing. The release handles one list length; here lists are positions of
    tokens, so that each crop may have its own split. Equal similarities go by place, there by the sort's choice.

    Attributes:
        keep: K, tokens kept of each crop.
        ratio: Important tokens' share of K, 0..1, rounded down, without a gate.
        gate: `erank` lets the share follow the effective rank (AgilePruner, arXiv 2603.01236); `none` keeps it.
        least: The adaptive share of the other, diverse tokens at half of `erank_ref` and below.
        most: The same at 1.5 times `erank_ref` and above.
        erank_ref: Mean effective rank over the model's training images; 90 for LLaVA-1.5.
        drop: Tokens that one sweep drops at most.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"

    keep: int = 64
    ratio: float = 0.5
    gate: Literal["none", "erank"] = "none"
    least: float = 0.25
    most: float = 0.75
    erank_ref: float = 90.0
    drop: int = 8

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        count = tokens.attention.shape[1]
        if self.keep >= count:
            return keep_all(tokens)
        rank = rank_by(tokens.attention.float())
        if self.gate == "none":
            shares, diagnostics = [self.ratio], {}
            important = torch.full((1, 1), float(int(self.ratio * self.keep)), device=rank.device)
        else:
            erank = effective_rank(tokens.features)
            shares, diagnostics = [1.0 - self.least, 1.0 - self.most], {"effective_rank": erank}
            share = 1.0 - diversity_share(erank, self.erank_ref, self.least, self.most)
            important = (share[:, None] * self.keep).floor()
        position = torch.where(rank < important, OUT, rank - important)
        position = self._thin(position, cosine(tokens.hidden), important, self._sweeps(count, shares))
        return Kept(chosen_indices((position >= 0.0) | (rank < important), self.keep), None, diagnostics)

    def _thin(self, position: Tensor, similarity: Tensor, important: Tensor, sweeps: int) -> Tensor:
        """Shorten the lists given by the list `position` (B, N) of each token to K - `important` (B or 1, 1) tokens."""
        length = position.shape[1] - important
        for _ in range(sweeps):
            pair = (0.5 * position).floor()
            even, odd = position == 2.0 * pair, position == 2.0 * pair + 1.0
            best = torch.where(odd[:, None, :], similarity, -2.0).amax(dim=2)
            order = rank_by(torch.where(even, best, -3.0))
            evens = (0.5 * length).ceil()
            drop = torch.minimum(length - (self.keep - important), evens).clamp(max=self.drop)
            left = torch.where(even & (order >= drop), order - drop, OUT)
            position = torch.where(odd, evens - drop + pair, left)
            length = length - drop
        return position

    def _sweeps(self, count: int, shares: list[float]) -> int:
        """Return how many sweeps the slowest split between the smallest and the largest of `shares` needs."""
        splits = range(int(min(shares) * self.keep), int(max(shares) * self.keep) + 1)
        return max(self._sweeps_to(count - important, self.keep - important) for important in splits)

    def _sweeps_to(self, length: int, wanted: int) -> int:
        sweeps = 0
        while length > wanted:
            length -= min(self.drop, length - wanted, (length + 1) // 2)
            sweeps += 1
        return sweeps
