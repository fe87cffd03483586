"""Random sampling: the same K tokens of every crop, drawn once from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from leanvlm.exporter.pruners.base import Kept, ScoredBlock, Signal, VisionTokens, enforce, keep_all


@dataclass(frozen=True)
class RandomPruner:
    """The first K of a seeded permutation: a baseline that a method has to beat.

    Needs no scores, uses no text and merges nothing; the indices are a constant of the graph.

    Attributes:
        keep: K, tokens kept of each crop.
        seed: Of NumPy's default generator.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset()

    keep: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        enforce(self.seed >= 0, f"random: seed={self.seed} is negative")

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        batch, count, _ = tokens.features.shape
        if self.keep >= count:
            return keep_all(tokens)
        drawn = np.random.default_rng(self.seed).permutation(count)[: self.keep]
        indices = torch.tensor(sorted(drawn.tolist()), device=tokens.features.device)
        return Kept(indices[None, :].expand(batch, -1))
