"""SigLIP: patches only. Without a class token, a patch is scored by the attention that it receives from all patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leanvlm.exporter.towers.base import BlockTower
from leanvlm.runtime.preprocess import ImageSpec


class SiglipTower(BlockTower):
    """A `siglip_vision_model`; see `BlockTower`. Its last hidden state is read before the norm behind the blocks."""

    def __init__(self, siglip: Any, layers: Sequence[int], scored: int, image: ImageSpec | None = None) -> None:
        super().__init__(siglip.embeddings, siglip.encoder.layers, layers, scored, 0, image)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the patches with their positions."""
        position: Tensor = self.embeddings.position_embedding.weight
        return self.embed_patches(pixel_values) + position

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the keys, and softmax(Q K^T) averaged over heads and queries, one head at a time: N x N numbers at once."""
        attn = block.self_attn
        states = block.layer_norm1(states)
        query, keys = (proj(states).unflatten(2, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj))  # (B, N, H, d)
        received = torch.zeros_like(states[:, :, 0], dtype=torch.float32)
        for head in range(attn.num_heads):
            scores = (query[:, :, head].float() * attn.scale) @ keys[:, :, head].float().transpose(1, 2)
            received = received + scores.softmax(dim=2).mean(dim=1)
        return keys, received / attn.num_heads, None
