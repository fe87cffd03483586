"""CLIP: a class token in front of the patches, whose attention scores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanvlm.exporter.towers.base import BlockTower
from leanvlm.runtime.preprocess import ImageSpec


class ClipTower(BlockTower):
    """A `clip_vision_model`, with its class token or without (`skipped=1`); see `BlockTower`."""

    def __init__(
        self, clip: Any, layers: Sequence[int], scored: int, image: ImageSpec | None = None, *, skipped: int = 1
    ) -> None:
        super().__init__(clip.embeddings, clip.encoder.layers, layers, scored, skipped, image)
        self.pre_norm = clip.pre_layrnorm

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the class token and the patches with their positions, normed."""
        patches = self.embed_patches(pixel_values)
        first = self.embeddings.class_embedding.expand(patches.shape[0], 1, -1)
        position: Tensor = self.embeddings.position_embedding.weight
        embedded: Tensor = self.pre_norm(torch.cat([first, patches], dim=1) + position)
        return embedded

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the keys and softmax(q_cls K^T), averaged over heads and un-split: one row only."""
        attn = block.self_attn
        states = block.layer_norm1(states)
        query, keys = attn.q_proj(states[:, :1]).float(), attn.k_proj(states)  # (B, 1, Dv), (B, N, Dv)
        split = keys.unflatten(2, (-1, attn.head_dim))
        heads = query.unflatten(2, (-1, attn.head_dim)).transpose(1, 2)  # (B, H, 1, d)
        scores = (heads * attn.scale) @ split.float().permute(0, 2, 3, 1)
        unsplit = (query * query.shape[2] ** -0.5) @ keys.float().transpose(1, 2)
        return split, scores.softmax(dim=-1).mean(dim=1)[:, 0], unsplit.softmax(dim=-1)[:, 0]
