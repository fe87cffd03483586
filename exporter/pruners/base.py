"""What every pruner takes and returns: `VisionTokens` in, `Kept` out, and the two ways of applying a choice.

A pruner is a frozen dataclass whose fields are its parameters and whose `__call__` is pure, batched and traceable.
It decides which tokens stay and knows nothing of model families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisionTokens:
    """The image tokens of B crops, before pruning.

    Attributes:
        features: (B, N, D), after the projector.
        hidden: (B, N, Dv), the same tokens before the projector.
        keys: (B, N, Dk), key vectors of the scored block, heads side by side.
        attention: (B, N), the class token's attention in the scored block, averaged over heads, class token left out.
        grid: Rows and columns of the patches; rows * columns = N.
    """

    features: Tensor
    hidden: Tensor
    keys: Tensor
    attention: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Kept:
    """The choice of a pruner.

    Attributes:
        indices: (B, K) int64, ascending, unique: the places of the kept tokens in raster order.
        features: (B, K, D) for methods that merge tokens (an index is then its cluster's centre), else None.
        diagnostics: Name to (B,) values that explain the choice, such as `effective_rank`.
    """

    indices: Tensor
    features: Tensor | None = None
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)


class Pruner(Protocol):
    """A frozen dataclass with the field `keep` (tokens per crop) and any parameters of its own."""

    @property
    def keep(self) -> int:
        """K, the number of tokens kept of each crop."""
        ...

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K of the N tokens of every crop."""
        ...


def gather_tokens(features: Tensor, indices: Tensor) -> Tensor:
    """Take the rows `indices` (B, K) of `features` (B, N, D): (B, K, D)."""
    return features.gather(1, indices[:, :, None].expand(-1, -1, features.shape[-1]))


def keep_all(tokens: VisionTokens) -> Kept:
    """Return every token, in place: what any pruner does when keep >= N."""
    batch, count = tokens.attention.shape
    every = torch.arange(count, device=tokens.attention.device)
    return Kept(every[None, :].expand(batch, -1))


def rank_by(scores: Tensor) -> Tensor:
    """Return how many tokens come before each one when `scores` (B, N) fall: (B, N) float, 0..N-1, ties to the lower index.

    Counting pairs instead of sorting makes ties the same on every backend, since sorts differ in which equal comes first.
    """
    place = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    before = (other > mine) | ((other == mine) & (place[None, :] < place[:, None]))
    return before.float().sum(dim=2)


def first_by(rank: Tensor, keep: int) -> Tensor:
    """Return the places of the `keep` lowest of `rank` (B, N), whose values are all different: (B, K) int64 ascending."""
    return torch.topk(-rank, keep, dim=1).indices.sort(dim=1).values


def top_indices(scores: Tensor, keep: int) -> Tensor:
    """Return the places of the `keep` highest of `scores` (B, N) in raster order: (B, K) int64, ties to the lower index."""
    return first_by(rank_by(scores), keep)
