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
    """

    hidden: Tensor
    keys: Tensor | None
    saliency: Tensor | None
    unsplit: Tensor | None

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


class BlockTower(nn.Module):
    """The first blocks of a vision transformer: pixel values (B, 3, H, W) -> `Seen`.

    Args:
        embeddings: The checkpoint's module with the patch convolution and the positions.
        blocks: All blocks, in order.
        layers: Which hidden states are read, 0 the embeddings and n what block n - 1 returns; several are put side by side.
        scored: The 0-based block whose attention scores the tokens.
        skipped: How many first tokens are left out of the results.
        image: The processor whose normalisation is folded in, so that the pixels are uint8 levels; None: they are normalised.
    """

    def __init__(
        self,
        embeddings: Any,
        blocks: Sequence[nn.Module],
        layers: Sequence[int],
        scored: int,
        skipped: int,
        image: ImageSpec | None,
    ) -> None:
        super().__init__()
        self.patches = None if image is None else LevelPatches(embeddings.patch_embedding, image)
        self.embeddings = embeddings
        self.layers, self.scored, self.skipped = tuple(layers), scored, skipped
        self.blocks = nn.ModuleList(list(blocks)[: max(*layers, scored + 1)])

    def forward(self, pixel_values: Tensor) -> Seen:
        """Run the tower."""
        states = [self.embed(pixel_values)]
        # Of a scored block behind the feature layers only the scores are computed.
        for block in self.blocks[: max(*self.layers, self.scored)]:
            states.append(block(states[-1], None))
        read = [_behind(self.skipped, states[layer]) for layer in self.layers]
        hidden = read[0] if len(read) == 1 else torch.cat(read, dim=2)
        scores = self.scores(self.blocks[self.scored], states[self.scored])
        return Seen(hidden, *(_behind(self.skipped, part) for part in scores))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return what the first block reads (B, N, Dv)."""
        raise NotImplementedError

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, saliency and unsplit attention of a block that reads `states`, as `Seen` has them."""
        raise NotImplementedError

    def embed_patches(self, pixel_values: Tensor) -> Tensor:
        """Return the patches (B, rows * columns, Dv), without their positions."""
        if self.patches is not None:
            levels: Tensor = self.patches(pixel_values)
            return levels
        patches: Tensor = self.embeddings.patch_embedding(pixel_values)
        return patches.flatten(2).transpose(1, 2)
