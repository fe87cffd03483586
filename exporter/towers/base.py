"""What a vision tower gives, and the run through a transformer's first blocks that towers have in common.

A tower is cut at its deepest feature layer or at the scored block, whichever is deeper; what lies behind never runs. The scored
block's attention is computed apart, as far as the scores need it: every block keeps its fused attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from leanvlm.exporter.towers.patches import LevelPatches
from leanvlm.runtime.preprocess import ImageSpec


class Seen(NamedTuple):
    """What a tower sees of B crops: N tokens, first those that have no position on the grid, then the patches in raster order.

    Attributes:
        hidden: (B, N, Dv), before the projector.
        keys: (B, N, H, d), key vectors of the scored block.
        saliency: (B, N) in fp32, how much attention each token gets in the scored block, averaged over heads: from the class
            token, or where there is none from all tokens on average.
        unsplit: (B, N) in fp32, the class token's attention if its heads were one; None without a class token.
        deep: (B, N, planes * D), features that the decoder adds behind its first blocks; None where it adds none.
    """

    hidden: Tensor
    keys: Tensor | None
    saliency: Tensor | None
    unsplit: Tensor | None
    deep: Tensor | None = None

    def patches(self, leading: int) -> Seen:
        """Return the same without the first tokens, which have no position on the grid."""
        return Seen(_behind(leading, self.hidden), *(_behind(leading, part) for part in self[1:]))


@overload
def _behind(first: int, part: Tensor) -> Tensor: ...
@overload
def _behind(first: int, part: Tensor | None) -> Tensor | None: ...
def _behind(first: int, part: Tensor | None) -> Tensor | None:
    """Return a tensor (B, N, …) without its first tokens."""
    return part if part is None or not first else part[:, first:]


def merged_cells(part: Tensor, rows: int, side: int) -> Tensor:
    """Put the patches of each cell of side x side side by side: (B, N, E) -> (B, N / side^2, side^2 * E).

    That is the pixel shuffle of InternVL and Idefics3: cells in raster order, and in each its patches in raster order.
    """
    return _cells(part, rows, side).transpose(2, 3).flatten(3).flatten(1, 2)


def summed_cells(part: Tensor, rows: int, side: int) -> Tensor:
    """Sum over the patches of each cell of side x side: (B, N, …) -> (B, N / side^2, …)."""
    summed = _cells(part.flatten(2) if part.dim() > 2 else part[:, :, None], rows, side).sum((2, 4)).flatten(1, 2)
    return summed.reshape(-1, summed.shape[1], *part.shape[2:])


def summed_stretches(part: Tensor, length: int) -> Tensor:
    """Sum over each stretch of so many patches: (B, N, …) -> (B, N / length, …)."""
    return part.reshape(part.shape[0], -1, length, *part.shape[2:]).sum(dim=2)


def _cells(part: Tensor, rows: int, side: int) -> Tensor:
    """Return patches (B, N, E), of so many rows, as (B, rows / side, side, columns / side, side, E)."""
    columns = part.shape[1] // rows
    return part.reshape(-1, rows // side, side, columns // side, side, part.shape[2])


class BlockTower(nn.Module):
    """The first blocks of a vision transformer: pixel values (B, 3, H, W) -> `Seen`.

    Args:
        embeddings: The checkpoint's module with the patch convolution and the positions.
        convolution: The patch convolution.
        blocks: All blocks, in order.
        layers: Which hidden states are read, 0 the embeddings and n what block n - 1 returns; several are put side by side.
        scored: The 0-based block whose attention scores the tokens.
        skipped: How many first tokens are left out of the results.
        image: The processor whose normalisation is folded in, so that the pixels are uint8 levels; None: they are normalised.
        norm: Applied to what is read.
        cell: Patches on each side of a square that become one token; its scores and keys are the sums of theirs.
    """

    def __init__(
        self,
        embeddings: Any,
        convolution: Any,
        blocks: Sequence[nn.Module],
        layers: Sequence[int],
        scored: int,
        skipped: int,
        image: ImageSpec | None,
        norm: nn.Module | None = None,
        cell: int = 1,
    ) -> None:
        super().__init__()
        self.patches = None if image is None else LevelPatches(convolution, image)
        self.embeddings = embeddings
        self.convolution = convolution
        self.norm = nn.Identity() if norm is None else norm
        self.layers, self.scored, self.skipped, self.cell = tuple(layers), scored, skipped, cell
        self.blocks = nn.ModuleList(list(blocks)[: max(*layers, scored + 1)])

    def forward(self, pixel_values: Tensor) -> Seen:
        """Run the tower."""
        states = [self.embed(pixel_values)]
        # Of a scored block behind the feature layers only the scores are computed.
        for at in range(max(*self.layers, self.scored)):
            states.append(self.advance(self.blocks[at], states[-1]))
        read = [_behind(self.skipped, states[layer]) for layer in self.layers]
        hidden = self.norm(read[0] if len(read) == 1 else torch.cat(read, dim=2))
        scores = self.scores(self.blocks[self.scored], states[self.scored])
        seen = Seen(hidden, *(_behind(self.skipped, part) for part in scores))
        if self.cell == 1:
            return seen
        rows = pixel_values.shape[2] // int(self.convolution.kernel_size[0])
        told = (None if part is None else summed_cells(part, rows, self.cell) for part in seen[1:])
        return Seen(self.merge(hidden, rows), *told)

    def merge(self, hidden: Tensor, rows: int) -> Tensor:
        """Return what cells of patches (B, N, Dv), of so many rows, become: the patches of each side by side."""
        return merged_cells(hidden, rows, self.cell)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return what the first block reads (B, N, Dv)."""
        raise NotImplementedError

    def advance(self, block: Any, states: Tensor) -> Tensor:
        """Return what a block makes of states (B, N, Dv)."""
        following: Tensor = block(states, None)
        return following

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, saliency and unsplit attention of a block that reads `states`, as `Seen` has them."""
        raise NotImplementedError

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Return the patches (B, rows * columns, Dv), without their positions."""
        if self.patches is not None:
            levels: Tensor = self.patches(pixel_values)
            return levels
        patches: Tensor = self.convolution(pixel_values)
        return patches.flatten(2).transpose(1, 2)


def class_scores(query: Tensor, keys: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, saliency and unsplit attention, of the class token: softmax(q_cls K^T), one row only.

    Args:
        query: (B, 1, Dv), the class token's.
        keys: (B, N, Dv).
        heads: H.
    """
    query, split = query.float(), keys.reshape(*keys.shape[:2], heads, -1)
    single = query.reshape(-1, heads, 1, split.shape[3])
    scores = (single * split.shape[3] ** -0.5) @ split.float().permute(0, 2, 3, 1)
    unsplit = (query * query.shape[2] ** -0.5) @ keys.float().transpose(1, 2)
    return split, scores.softmax(dim=-1).mean(dim=1)[:, 0], unsplit.softmax(dim=-1)[:, 0]


def received_scores(query: Tensor, keys: Tensor, heads: int) -> tuple[Tensor, Tensor, None]:
    """Return keys and saliency: softmax(Q K^T) averaged over heads and queries, one head at a time: N x N numbers at once.

    Args:
        query: (B, N, Dv).
        keys: (B, N, Dv).
        heads: H.
    """
    query, keys = (part.reshape(*part.shape[:2], heads, -1) for part in (query, keys))  # (B, N, H, d)
    received = torch.zeros_like(keys[:, :, 0, 0], dtype=torch.float32)
    for head in range(heads):
        scores = (query[:, :, head].float() * keys.shape[3] ** -0.5) @ keys[:, :, head].float().transpose(1, 2)
        received = received + scores.softmax(dim=2).mean(dim=1)
    return keys, received / heads, None
