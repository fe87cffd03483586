"""What every pruner takes and returns: `VisionTokens` in, `Kept` out, and the two ways of applying a choice.

A pruner is a frozen dataclass whose fields are its parameters and whose `__call__` is pure, batched and traceable.
It decides which tokens stay and knows nothing of model families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from leanvlm.exporter.towers.base import Seen
from leanvlm.runtime.errors import UnsupportedPrunerError

# Which block's attention scores the tokens: the last one below the feature layer, or the tower's last.
ScoredBlock = Literal["feature", "last"]
# What a tower may tell beside the tokens themselves: fields of `Seen`.
Signal = Literal["saliency", "keys", "unsplit"]


@dataclass(frozen=True)
class VisionTokens:
    """The image tokens of B crops, before pruning.

    Attributes:
        features: (B, N, D), after the projector.
        seen: The same tokens before the projector, and what the tower tells of them.
        grid: Rows and columns of the patches.
        leading: How many tokens stand in front of the patches and have no position on the grid; a pruner gets none.
        valid: (B, N) in fp32, 1 where a token shows the image and 0 where it is padding around it; None where all do.
    """

    features: Tensor
    seen: Seen
    grid: tuple[int, int]
    leading: int = 0
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.valid is None or not self.leading, "padding and tokens in front of the grid do not go together"

    @property
    def patches(self) -> VisionTokens:
        """The tokens that have a position on the grid, which a pruner chooses among."""
        if not self.leading:
            return self
        return VisionTokens(self.features[:, self.leading :], self.seen.patches(self.leading), self.grid)

    @property
    def shown(self) -> VisionTokens:
        """The same with neutral padding: nothing attends to it, and it is what the other tokens are on average.

        So it adds nothing to an effective rank, whose features are centred, and no entropy.
        """
        if self.valid is None:
            return self
        shows = self.valid > 0
        hidden, keys = _averaged(self.hidden, shows), self.seen.keys
        keys = None if keys is None else _averaged(keys.flatten(2), shows).reshape(keys.shape)
        told = (None if part is None else torch.where(shows, part, 0.0) for part in (self.seen.saliency, self.seen.unsplit))
        assert self.seen.deep is None, "padding and planes do not go together"
        return replace(self, features=_averaged(self.features, shows), seen=Seen(hidden, keys, *told))

    @property
    def wide(self) -> Tensor:
        """(B, N, W), the features with the planes that the decoder adds behind its first blocks."""
        return widened(self.features, self.seen.deep)

    @property
    def count(self) -> int:
        """N."""
        return self.features.shape[1]

    @property
    def hidden(self) -> Tensor:
        """(B, N, Dv), the tokens before the projector."""
        return self.seen.hidden

    @property
    def saliency(self) -> Tensor:
        """(B, N), how much attention each token gets; only for a pruner that needs `saliency`."""
        return _told(self.seen.saliency)

    @property
    def keys(self) -> Tensor:
        """(B, N, H, d), key vectors of the scored block; only for a pruner that needs `keys`."""
        return _told(self.seen.keys)

    @property
    def unsplit(self) -> Tensor:
        """(B, N), the class token's attention of one head of width H * d; only for a pruner that needs `unsplit`."""
        return _told(self.seen.unsplit)


def _averaged(part: Tensor, shows: Tensor) -> Tensor:
    """Replace what does not show the image, in tokens (B, N, E), by the average of what does."""
    weights = shows.float()[:, None, :]
    mean = (weights @ part.float()) / weights.sum(dim=2, keepdim=True).clamp(min=1.0)
    # All of a crop may be padding; then it stays as it is.
    return torch.where(shows[:, :, None] | ~shows.any(dim=1)[:, None, None], part, mean.to(part.dtype))


def _told(part: Tensor | None) -> Tensor:
    assert part is not None, "the tower does not tell what the pruner did not say that it needs"
    return part


@dataclass(frozen=True)
class Kept:
    """The choice of a pruner.

    Attributes:
        indices: (B, K) int64, ascending, unique: the indices of the kept tokens in raster order.
        hidden: (B, K, Dv) for methods that merge tokens, still to be projected (an index is then its cluster's centre);
            None for methods that only choose.
        diagnostics: Name to (B,) values that explain the choice, such as `effective_rank`.
    """

    indices: Tensor
    hidden: Tensor | None = None
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)


class Pruner(Protocol):
    """A frozen dataclass with the field `keep` (tokens per crop) and any parameters of its own.

    Attributes:
        scored_block: Where the tower takes `keys` and both attentions from.
        needs: What it reads of the tower beside the tokens; a model whose tower does not tell it is refused.
    """

    scored_block: ClassVar[ScoredBlock]
    needs: ClassVar[frozenset[Signal]]

    @property
    def keep(self) -> int:
        """K, the number of tokens kept of each crop."""
        ...

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K of the N tokens of every crop."""
        ...


def enforce(holds: bool, rule: str) -> None:
    """Check a parameter when a pruner is made.

    Raises:
        UnsupportedPrunerError: `rule`, if it does not hold.
    """
    if not holds:
        raise UnsupportedPrunerError(rule)


def choose(pruner: Pruner, tokens: VisionTokens, shown: VisionTokens | None = None) -> Kept:
    """Choose among the patches; tokens without a position on the grid are always kept, in front.

    Padding is kept only where a crop has fewer other tokens than are kept: what a pruner takes of it gives way to the most
    attended of the others.

    Args:
        pruner: The method.
        tokens: The tokens.
        shown: `tokens.shown`, where it is at hand.
    """
    shown = tokens.shown if shown is None else shown
    first, kept = tokens.leading, pruner(shown.patches)
    if tokens.valid is not None and kept.indices.shape[1] < tokens.count:
        return _without_padding(kept, tokens, shown.saliency, tokens.valid)
    if not first:
        return kept
    batch = tokens.features.shape[0]
    always = torch.arange(first, device=kept.indices.device)[None, :].expand(batch, -1)
    merged = None if kept.hidden is None else torch.cat([tokens.hidden[:, :first], kept.hidden], dim=1)
    diagnostics = dict(kept.diagnostics)
    if "num_selected" in diagnostics:
        diagnostics["num_selected"] = diagnostics["num_selected"] + first
    return Kept(torch.cat([always, kept.indices + first], dim=1), merged, diagnostics)


def _without_padding(kept: Kept, tokens: VisionTokens, saliency: Tensor, valid: Tensor) -> Kept:
    """Replace padding in a choice, as far as there is anything else."""
    count, keep = tokens.count, kept.indices.shape[1]
    index = torch.arange(count, device=kept.indices.device)
    chosen = (kept.indices[:, :, None] == index).float().sum(dim=1)  # (B, N)
    # First what was chosen, then the others by attention; in both padding would come last, and comes behind all.
    order = rank_by(saliency) + count * (1 - chosen) + 2 * count * (1 - valid)
    indices = first_by(order, keep)
    diagnostics = dict(kept.diagnostics)
    if "num_selected" in diagnostics:
        most = (chosen * valid).sum(dim=1).to(diagnostics["num_selected"].dtype)
        diagnostics["num_selected"] = torch.minimum(diagnostics["num_selected"], most)
    if kept.hidden is None:
        return Kept(indices, None, diagnostics)
    same = indices[:, :, None] == kept.indices[:, None, :]  # (B, K, K)
    merged = same.to(kept.hidden.dtype) @ kept.hidden
    hidden = torch.where(same.any(dim=2)[:, :, None], merged, gather_tokens(tokens.hidden, indices))
    return Kept(indices, hidden, diagnostics)


def widened(features: Tensor, deep: Tensor | None) -> Tensor:
    """Put the planes (B, N, planes * D) behind features (B, N, D), where there are any."""
    return features if deep is None else torch.cat([features, deep.to(features.dtype)], dim=2)


def gather_tokens(features: Tensor, indices: Tensor) -> Tensor:
    """Take the rows `indices` (B, K) of `features` (B, N, D): (B, K, D)."""
    return features.gather(1, indices[:, :, None].expand(-1, -1, features.shape[-1]))


def keep_all(tokens: VisionTokens) -> Kept:
    """Return every token, in place: what any pruner does when keep >= N."""
    batch, count, _ = tokens.features.shape
    every = torch.arange(count, device=tokens.features.device)
    return Kept(every[None, :].expand(batch, -1))


def precedes(scores: Tensor, lower: Tensor | None = None) -> Tensor:
    """Return whether token j comes before token i when `scores` (B, N) fall: (B, N, N) bool at [b, i, j].

    Comparing pairs instead of sorting makes ties the same on every backend: the lower index comes first. A caller that ranks
    many times makes `lower_index` once and hands it over as `lower`.
    """
    lower = lower_index(scores) if lower is None else lower
    mine, other = scores[:, :, None], scores[:, None, :]
    return (other > mine) | ((other == mine) & lower)


def lower_index(scores: Tensor) -> Tensor:
    """Return whether j < i for `scores` (B, N): (N, N) bool at [i, j]."""
    index = torch.arange(scores.shape[1], device=scores.device)
    return index[None, :] < index[:, None]


def rank_by(scores: Tensor, lower: Tensor | None = None) -> Tensor:
    """Return how many tokens come before each one when `scores` (B, N) fall: (B, N) float, 0..N-1, all different."""
    return precedes(scores, lower).float().sum(dim=2)


def first_by(rank: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` lowest of `rank` (B, N), whose values are all different: (B, K) int64 ascending."""
    return torch.topk(-rank, keep, dim=1).indices.sort(dim=1).values


def top_indices(scores: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` highest of `scores` (B, N) in raster order: (B, K) int64, ties to the lower index."""
    return first_by(rank_by(scores), keep)


def chosen_indices(chosen: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` true values in each row of `chosen` (B, N) bool: (B, K) int64 ascending."""
    count = chosen.shape[1]
    index = torch.arange(count, device=chosen.device, dtype=torch.float32)
    return first_by(index - count * chosen.float(), keep)


def diagonal(matrix: Tensor) -> Tensor:
    """Diagonal (B, M) of (B, M, M) as one strided slice."""
    return matrix.flatten(1)[:, :: matrix.shape[1] + 1]


def cosine(tokens: Tensor) -> Tensor:
    """Return the cosine of every pair of `tokens` (B, N, D), un-centred, in fp32: (B, N, N).

    The norms are the roots of the diagonal, so that the tokens are read once and no normalised copy is made.
    """
    tokens = tokens.float()
    gram = tokens @ tokens.transpose(1, 2)
    norms = diagonal(gram).sqrt() + 1e-8
    return gram / (norms[:, :, None] * norms[:, None, :])


class MatrixRows:
    """The rows of B square matrices (B, N, N), to be taken one of each at a time, with two nodes of a graph."""

    def __init__(self, matrix: Tensor) -> None:
        batch, count, _ = matrix.shape
        self._rows = matrix.flatten(0, 1)
        self._first = torch.arange(batch, device=matrix.device)[:, None] * count

    def take(self, index: Tensor) -> Tensor:
        """Return row `index[b]` of matrix b, for `index` (B, 1) int64: (B, 1, N)."""
        return torch.nn.functional.embedding(index + self._first, self._rows)
