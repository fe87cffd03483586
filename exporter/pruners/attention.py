"""Attention pruning: the K tokens that the class token looks at most (FasterVLM, arXiv 2412.01818, first version)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leanvlm.exporter.pruners.base import Kept, ScoredBlock, Signal, VisionTokens, keep_all, top_indices


@dataclass(frozen=True)
class AttentionPruner:
    """Top-K by class-token attention, averaged over heads.

    Uses no text and merges nothing. The release's, but for equal scores: here
    they go to the lower index.

    Attributes:
        keep: K, tokens kept of each crop.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset({"saliency"})

    keep: int = 64

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose the K most attended tokens, in raster order."""
        if self.keep >= tokens.count:
            return keep_all(tokens)
        return Kept(top_indices(tokens.saliency, self.keep))
