"""Uniform sampling: K tokens at equal strides in raster order, whatever the image shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from leanvlm.exporter.pruners.base import Kept, ScoredBlock, Signal, VisionTokens, keep_all


@dataclass(frozen=True)
class UniformPruner:
    """The middle token of each of K equal stretches: a baseline that a method has to beat.

    Needs no scores, uses no text and merges nothing; the indices are a constant of the graph.

    Attributes:
        keep: K, tokens kept of each crop.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset()

    keep: int = 64

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        batch, count, _ = tokens.features.shape
        if self.keep >= count:
            return keep_all(tokens)
        stretch = torch.arange(self.keep, device=tokens.features.device)
        return Kept(((2 * stretch + 1) * count // (2 * self.keep))[None, :].expand(batch, -1))
