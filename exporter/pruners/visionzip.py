"""VisionZip (arXiv 2412.04467, CVPR 2025): keep the attended tokens, merge all others into a few contextual ones.

Dominant tokens have the highest class-token attention. Of the others, an even stride are targets; each remaining token goes
to the target with the most similar key, and a contextual token is its target plus the mean of what came to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanvlm.exporter.pruners.base import (
    Kept,
    ScoredBlock,
    Signal,
    VisionTokens,
    enforce,
    first_by,
    gather_tokens,
    keep_all,
    rank_by,
)


@dataclass(frozen=True)
class VisionZipPruner:
    """Dominant tokens as they are, contextual tokens merged before the projector.

    Uses no text; merges. The release's: the choice of both kinds, and the merging. Ours: there the class
    token counts as one of the dominant tokens and the contextual ones come last; here all K are patches, in raster order of
    dominant tokens and targets.

    Attributes:
        keep: K, tokens kept of each crop.
        contextual: Contextual tokens' share of K, rounded; the release's 54 + 10 of 64.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset({"saliency", "keys"})

    keep: int = 64
    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        enforce(0.0 <= self.contextual <= 1.0, f"visionzip: contextual={self.contextual} is not in 0..1")

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K centres, in raster order, and merge the other tokens into the contextual ones."""
        count = tokens.count
        if self.keep >= count:
            return keep_all(tokens)
        contextual = min(int(self.contextual * self.keep + 0.5), self.keep)
        dominant = self.keep - contextual
        rank = rank_by(tokens.saliency.float())
        if not contextual:
            return Kept(first_by(rank, self.keep))
        index = torch.arange(count, device=rank.device, dtype=torch.float32)
        rest = first_by(torch.where(rank >= dominant, index - count, index), count - dominant)
        targets = rest[:, :: rest.shape[1] // contextual][:, :contextual]
        is_target = (targets[:, :, None] == index).any(dim=1)
        kept = is_target | (rank < dominant)
        indices = first_by(torch.where(kept, index - count, index), self.keep)
        centre = torch.where(kept, -1, targets.gather(1, _nearest_target(tokens.keys, targets)))
        joins = (centre[:, None, :] == indices[:, :, None]).float()  # (B, K, N)
        mean = (joins @ tokens.hidden.float()) / joins.sum(dim=2, keepdim=True).clamp(min=1.0)
        return Kept(indices, gather_tokens(tokens.hidden, indices) + mean.to(tokens.hidden.dtype))


def _nearest_target(keys: Tensor, targets: Tensor) -> Tensor:
    """Return which of `targets` (B, C) has the most similar head-averaged key to each token of `keys` (B, N, H, d): (B, N)."""
    mean = keys.float().mean(dim=2)
    unit = mean / (mean.norm(dim=2, keepdim=True) + 1e-8)
    similarity: Tensor = gather_tokens(unit, targets) @ unit.transpose(1, 2)
    return similarity.argmax(dim=1)
