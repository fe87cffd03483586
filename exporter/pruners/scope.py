"""SCOPE (arXiv 2510.24214, NeurIPS 2025): keep the attended tokens that cover what no kept token covers yet.

A token is covered as well as its best cosine similarity to a kept one. Each step keeps the token with the largest
product of the coverage that it would add over all tokens and its saliency, the class token's attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from leanvlm.exporter.pruners.base import Kept, ScoredBlock, VisionTokens, chosen_indices, cosine, keep_all, select_rows


@dataclass(frozen=True)
class ScopePruner:
    """Greedy coverage gain times attention, on the tower's tokens before the projector.

    Needs a class token; uses no text and merges nothing. The release sums the attention over heads, here it is their mean:
    a common factor, so the choice is the same.

    Attributes:
        keep: K, tokens kept of each crop.
        alpha: Exponent of the attention; 0 leaves coverage alone.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"

    keep: int = 64
    alpha: float = 1.0

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        count = tokens.attention.shape[1]
        if self.keep >= count:
            return keep_all(tokens)
        similarity = cosine(tokens.hidden)
        attention = tokens.attention.float()
        saliency = attention if self.alpha == 1.0 else attention.pow(self.alpha)
        place = torch.arange(count, device=saliency.device)
        covered = torch.zeros_like(saliency)
        chosen = covered > 0.0
        for _ in range(self.keep):
            gain = (similarity - covered[:, None, :]).relu().sum(dim=2)
            pick = torch.where(chosen, -1.0, gain * saliency).argmax(dim=1)
            covered = torch.maximum(covered, select_rows(similarity, pick))
            chosen = chosen | (place == pick[:, None])
        return Kept(chosen_indices(chosen, self.keep))
