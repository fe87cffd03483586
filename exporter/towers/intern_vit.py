"""InternViT: a class token in front of the patches, scaled residuals, and norms of queries and keys in its largest size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanvlm.exporter.towers.base import BlockTower, class_scores
from leanvlm.runtime.preprocess import ImageSpec


class InternVit(BlockTower):
    """An `internvl_vision` tower whose class token is read for scores only; see `BlockTower`.

    Args:
        tower: The checkpoint's.
        layer: Which hidden state is read.
        scored: The 0-based block whose attention scores the tokens.
        image: The processor whose normalisation is folded in.
        norm: Applied to what is read.
        cell: Patches on each side of what becomes one token.
    """

    def __init__(self, tower: Any, layer: int, scored: int, image: ImageSpec | None, norm: nn.Module | None, cell: int) -> None:
        embeddings: Any = tower.embeddings
        convolution = embeddings.patch_embeddings.projection
        blocks: Sequence[nn.Module] = tower.encoder.layer
        super().__init__(embeddings, convolution, blocks, [layer], scored, 1, image, norm, cell)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the class token and the patches with their positions."""
        patches = self.embed_patches(pixel_values)
        embedded = torch.cat([self.embeddings.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        positions: Tensor | None = self.embeddings.position_embeddings
        return embedded if positions is None else embedded + positions

    def advance(self, block: Any, states: Tensor) -> Tensor:
        """Return what a block makes of states."""
        following: Tensor = block(states)
        return following

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the class token's attention."""
        attn, states = block.attention, block.layernorm_before(states)
        query, keys = attn.q_norm(attn.q_proj(states[:, :1])), attn.k_norm(attn.k_proj(states))
        return class_scores(query, keys, attn.num_heads)
