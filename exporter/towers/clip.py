"""CLIP: a class token in front of the patches, whose attention scores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanvlm.exporter.towers.base import BlockTower, class_scores
from leanvlm.runtime.preprocess import ImageSpec


class ClipTower(BlockTower):
    """A `clip_vision_model`, with its class token or without (`skipped=1`); see `BlockTower`."""

    def __init__(
        self, clip: Any, layers: Sequence[int], scored: int, image: ImageSpec | None = None, *, skipped: int = 1
    ) -> None:
        super().__init__(clip.embeddings, clip.embeddings.patch_embedding, clip.encoder.layers, layers, scored, skipped, image)
        self.pre_norm = clip.pre_layrnorm

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the class token and the patches with their positions, normed."""
        patches = self.embed_patches(pixel_values)
        first = self.embeddings.class_embedding.expand(patches.shape[0], 1, -1)
        position: Tensor = self.embeddings.position_embedding.weight
        embedded: Tensor = self.pre_norm(torch.cat([first, patches], dim=1) + position)
        return embedded

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the class token's attention."""
        attn, states = block.self_attn, block.layer_norm1(states)
        return class_scores(attn.q_proj(states[:, :1]), attn.k_proj(states), attn.num_heads)
