"""SCOPE (arXiv 2510.24214, NeurIPS 2025): keep the attended tokens that cover what no kept token covers yet.

A token is covered as well as its best cosine similarity to a kept one. Each step keeps the token with the largest
product of the coverage that it would add over all tokens and its saliency, the class token's attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from leanvlm.exporter.pruners.base import (
    Kept,
    MatrixRows,
    ScoredBlock,
    Signal,
    VisionTokens,
    chosen_indices,
    cosine,
    enforce,
    keep_all,
)

# Coverage over this is a kept token's own.
KEPT = 1.5
# Keeps the sign of a gain apart where the attention is zero.
LEAST_SALIENCY = 1e-30


@dataclass(frozen=True)
class ScopePruner:
    """Greedy coverage gain times attention, on the tower's tokens before the projector.

    Uses no text and merges nothing. The release's, but for equal gains: here they go to the lower index.
    The release sums the attention over heads, here it is their mean: a common factor, so the choice is the same.

    Attributes:
        keep: K, tokens kept of each crop.
        alpha: Exponent of the attention; 0 leaves coverage alone.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset({"saliency"})

    keep: int = 64
    alpha: float = 1.0

    def __post_init__(self) -> None:
        enforce(self.alpha >= 0.0, f"scope: alpha={self.alpha} is negative")

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        count = tokens.count
        if self.keep >= count:
            return keep_all(tokens)
        similarity = cosine(tokens.hidden)
        saliency = tokens.saliency.float()
        saliency = (saliency if self.alpha == 1.0 else saliency.pow(self.alpha)).clamp(min=LEAST_SALIENCY)
        index = torch.arange(count, device=saliency.device)
        # A token counts one too much of its own coverage, subtracted again; so a kept one, with nothing to add, is below zero.
        similarity = torch.where(index[:, None] == index[None, :], similarity + 1.0, similarity)
        rows, covered = MatrixRows(similarity), torch.zeros_like(saliency)[:, None, :]
        for _ in range(self.keep):
            gain = (similarity - covered).relu().sum(dim=2) - 1.0
            pick = (gain * saliency).argmax(dim=1, keepdim=True)
            covered = torch.maximum(covered, rows.take(pick))
        return Kept(chosen_indices(covered[:, 0] > KEPT, self.keep))
