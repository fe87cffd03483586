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

from leanvlm.exporter.pruners.base import (
    Kept,
    ScoredBlock,
    VisionTokens,
    chosen_indices,
    cosine,
    keep_all,
    lower_places,
    rank_by,
)
from leanvlm.exporter.pruners.gates import effective_rank
from leanvlm.exporter.pruners.share import diversity_share

# List position of a token outside the list; neither even nor odd.
OUT = -0.5
# Of a sweep: tokens dropped, even tokens that stay. Numbers, or (B, 1) where rows differ.
Step = tuple[Tensor | float, Tensor | float]
# A sweep that drops nothing, after a list has come to its length.
IDLE: Step = (0.0, 0.0)


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
        important, steps, diagnostics = self._split(tokens)
        position = torch.where(rank < important, OUT, rank - important)
        position = _thin(position, cosine(tokens.hidden), steps)
        return Kept(chosen_indices((position >= 0.0) | (rank < important), self.keep), None, diagnostics)

    def _split(self, tokens: VisionTokens) -> tuple[Tensor | float, list[Step], dict[str, Tensor]]:
        """Return the number of important tokens, the steps of the sweeps (numbers, or (B, 1) with a gate), diagnostics."""
        count = tokens.attention.shape[1]
        if self.gate == "none":
            important = int(self.ratio * self.keep)
            return float(important), self._steps(count, important), {}
        rank = effective_rank(tokens.features)
        share = 1.0 - diversity_share(rank, self.erank_ref, self.least, self.most)
        ends = sorted(int((1.0 - share) * self.keep) for share in (self.least, self.most))
        number = (share[:, None] * self.keep).floor().clamp(*ends)
        tables = [self._steps(count, important) for important in range(ends[0], ends[1] + 1)]
        sweeps = max(map(len, tables))
        padded = [[*table, *[IDLE] * (sweeps - len(table))] for table in tables]
        row = (number[:, 0] - ends[0]).to(torch.int64)
        columns = torch.nn.functional.embedding(row, number.new_tensor(padded).flatten(1)).split(1, dim=1)
        return number, list(zip(columns[::2], columns[1::2], strict=True)), {"effective_rank": rank}

    def _steps(self, count: int, important: int) -> list[Step]:
        """Return, for each sweep, how many tokens it drops and how many even ones stay."""
        length, wanted, steps = count - important, self.keep - important, list[Step]()
        while length > wanted:
            evens = (length + 1) // 2
            drop = min(self.drop, length - wanted, evens)
            steps.append((float(drop), float(evens - drop)))
            length -= drop
        return steps


def _thin(position: Tensor, similarity: Tensor, steps: list[Step]) -> Tensor:
    """Shorten the lists given by the list `position` (B, N) of each token; see `VisPruner._split` for `steps`."""
    lower = lower_places(position)
    for drop, stay in steps:
        pair = (0.5 * position).floor()
        even, odd = position == 2.0 * pair, position == 2.0 * pair + 1.0
        best = torch.where(odd[:, None, :], similarity, -2.0).amax(dim=2)
        order = rank_by(torch.where(even, best, -3.0), lower) - drop
        position = torch.where(odd, pair + stay, torch.where(even & (order >= 0.0), order, OUT))
    return position
