"""No pruning: the baseline that every figure is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leanvlm.exporter.pruners.base import Kept, ScoredBlock, Signal, VisionTokens, keep_all


@dataclass(frozen=True)
class NoPruner:
    """Keeps every token; `keep` is N, for the record only."""

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset()

    keep: int = 576

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Return all N tokens in raster order."""
        return keep_all(tokens)
