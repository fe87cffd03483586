"""Pixtral: patches of images of any size, rotary positions on two axes, norms of the root mean square, no class token.

Here the size is fixed, so the angles are tables. A patch is scored by the attention that it receives from all patches; a token
of several patches by the sum of theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanvlm.exporter.towers.base import BlockTower, received_scores
from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.preprocess import ImageSpec


class PixtralTower(BlockTower):
    """A `pixtral` for images of one shape; see `BlockTower`.

    Args:
        vision: The checkpoint's tower.
        layer: The hidden state that is read.
        scored: The 0-based block whose attention scores the tokens.
        image: The processor whose normalisation is folded in, so that the pixels are uint8 levels; None: they are normalised.
        shape: Of the crops.
        cell: Patches on each side of a token.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, vision: Any, layer: int, scored: int, image: ImageSpec | None, shape: CropShape, cell: int) -> None:
        super().__init__(vision.ln_pre, vision.patch_conv, vision.transformer.layers, [layer], scored, 0, image, cell=cell)
        rows, columns = (cell * count for count in shape.grid)
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2)
        cos, sin = vision.patch_positional_embedding(torch.zeros(1), places)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the patches behind their norm; positions turn what attends, in each block."""
        normed: Tensor = self.embeddings(self.embed_patches(pixel_values))
        return normed

    def advance(self, block: Any, states: Tensor) -> Tensor:
        """Return what a block makes of states."""
        following: Tensor = block(states, None, position_embeddings=(self.cos, self.sin))
        return following

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the attention received."""
        attn, states = block.attention, block.attention_norm(states)
        query, key = (self._turned(project(states), attn.head_dim) for project in (attn.q_proj, attn.k_proj))
        return received_scores(query, key, attn.num_heads)

    def _turned(self, states: Tensor, head: int) -> Tensor:
        """Turn the heads of states (B, N, H * d) by their patches' angles."""
        heads = states.reshape(*states.shape[:2], -1, head)
        first, second = heads.chunk(2, dim=3)
        turned: Tensor = heads * self.cos[:, None] + torch.cat([-second, first], dim=3) * self.sin[:, None]
        return turned.flatten(2)


class MergedPatches(nn.Module):
    """A projector that merges patches, applied to tokens whose patches lie side by side: (B, N, patches * Dv) -> (B, N, D).

    Args:
        projector: The checkpoint's.
        cell: Patches on each side of a token.
    """

    def __init__(self, projector: Any, cell: int) -> None:
        super().__init__()
        self.projector, self.patches = projector, cell * cell

    def forward(self, hidden: Tensor) -> Tensor:
        """Make features of hidden states."""
        inner = self.projector
        patches = inner.norm(hidden.reshape(*hidden.shape[:2], self.patches, -1))
        # The checkpoint's own merger unfolds a picture: channel by channel the patches of a token.
        merged = inner.patch_merger.merging_layer(patches.transpose(2, 3).flatten(2))
        features: Tensor = inner.linear_2(inner.act(inner.linear_1(merged)))
        return features
