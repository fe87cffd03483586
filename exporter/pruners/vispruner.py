"""VisPruner (arXiv 2412.01818, ICCV 2025): important tokens by attention, the others thinned until no duplicates remain.

The tokens that are not important stand in a list, most attended first. A sweep compares each token at an even position with
all at odd positions, by cosine before the projector, and drops the few even ones that have the most similar partner. Sweeps
end when the list is as long as wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding

from leanvlm.exporter.pruners.base import (
    Kept,
    ScoredBlock,
    Signal,
    VisionTokens,
    chosen_indices,
    cosine,
    enforce,
    gather_tokens,
    keep_all,
    lower_index,
    rank_by,
)
from leanvlm.exporter.pruners.gates import effective_rank
from leanvlm.exporter.pruners.share import diversity_share


@dataclass(frozen=True)
class VisPruner:
    """Top attention, then bipartite duplicate removal among the rest.

    Uses no text and merges nothing. The release's: the split of K, the even and odd positions of the list,
    the cosine before the projector, at most 8 dropped in a sweep. Ours: the order of the list. The release also puts the even
    tokens that stay in order of their similarity before the next sweep. That order hangs on the last digits: on clustered
    features a change of 1e-6 replaced up to 44 % of its kept tokens, and in half precision it agrees with itself in single no
    better than with us. Here the list stays in order of attention. The gate is ours too (see `share`).

    Attributes:
        keep: K, tokens kept of each crop.
        ratio: Important tokens' share of K, 0..1, rounded down, without a gate.
        gate: `erank` lets the share follow the effective rank (AgilePruner, arXiv 2603.01236); `none` keeps it.
        least: The adaptive share of the other, diverse tokens at half of `erank_ref` and below, 0..1.
        most: The same at 1.5 times `erank_ref` and above; not less than `least`.
        erank_ref: Mean effective rank over the model's training images; 90 for LLaVA-1.5.
        drop: Tokens that one sweep drops at most.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset({"saliency"})

    keep: int = 64
    ratio: float = 0.5
    gate: Literal["none", "erank"] = "none"
    least: float = 0.25
    most: float = 0.75
    erank_ref: float = 90.0
    drop: int = 8

    def __post_init__(self) -> None:
        enforce(0.0 <= self.ratio <= 1.0, f"vispruner: ratio={self.ratio} is not in 0..1")
        enforce(0.0 <= self.least <= self.most <= 1.0, "vispruner: least and most are shares, 0 <= least <= most <= 1")
        enforce(self.erank_ref > 0.0, f"vispruner: erank_ref={self.erank_ref} is not positive")
        enforce(self.drop >= 1, f"vispruner: drop={self.drop} is not at least 1")

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens, in raster order."""
        if self.keep >= tokens.count:
            return keep_all(tokens)
        rank = rank_by(tokens.saliency.float())
        important, drops, diagnostics = self._split(tokens)
        order = torch.topk(-rank, rank.shape[1], dim=1).indices
        position = torch.arange(rank.shape[1], device=rank.device)
        listed = (position >= important).expand_as(rank)  # (B, N), most attended first
        listed = _thin(listed, cosine(gather_tokens(tokens.hidden, order)), drops)
        kept = listed | (position < important)
        return Kept(chosen_indices(kept.gather(1, rank.to(torch.int64)), self.keep), None, diagnostics)

    def _split(self, tokens: VisionTokens) -> tuple[Tensor | int, Sequence[Tensor | int], dict[str, Tensor]]:
        """Return the number of important tokens, what each sweep drops (numbers, or (B, 1) with a gate), diagnostics."""
        count = tokens.count
        if self.gate == "none":
            important = int(self.ratio * self.keep)
            return important, self._drops(count, important), {}
        rank = effective_rank(tokens.features)
        share = 1.0 - diversity_share(rank, self.erank_ref, self.least, self.most)
        fewest, most = int((1.0 - self.most) * self.keep), int((1.0 - self.least) * self.keep)
        number = (share[:, None] * self.keep).floor().clamp(fewest, most).to(torch.int64)
        tables = [self._drops(count, important) for important in range(fewest, most + 1)]
        sweeps = max(map(len, tables))
        padded = torch.tensor([table + [0] * (sweeps - len(table)) for table in tables], device=rank.device)
        chosen = embedding(number[:, 0] - fewest, padded)  # (B, sweeps)
        return number, torch.tensor_split(chosen, sweeps, dim=1), {"effective_rank": rank}

    def _drops(self, count: int, important: int) -> list[int]:
        """Return how many tokens each sweep drops."""
        length, wanted = count - important, self.keep - important
        drops: list[int] = []
        while length > wanted:
            drops.append(min(self.drop, length - wanted, (length + 1) // 2))
            length -= drops[-1]
        return drops


def _thin(listed: Tensor, similarity: Tensor, drops: Sequence[Tensor | int]) -> Tensor:
    """Shorten the lists `listed` (B, N) bool of tokens, whose `similarity` is (B, N, N), by `drops`, sweep by sweep."""
    lower = lower_index(listed)
    for drop in drops:
        position = 0.5 * listed.float().cumsum(dim=1)  # The first of a list is at 0.5: even positions are not whole.
        odd = listed & (position == position.floor())
        best = torch.where(odd[:, None, :], similarity, -2.0).amax(dim=2)
        order = rank_by(torch.where(listed ^ odd, best, -3.0), lower)
        listed = listed & (order >= drop)
    return listed
