"""SigLIP: patches only. Without a class token, a patch is scored by the attention that it receives from all patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from leanvlm.exporter.towers.base import BlockTower, received_scores
from leanvlm.runtime.preprocess import ImageSpec


class SiglipTower(BlockTower):
    """A `siglip_vision_model`; see `BlockTower`. Its last hidden state is read before the norm behind the blocks."""

    def __init__(self, siglip: Any, layers: Sequence[int], scored: int, image: ImageSpec | None = None) -> None:
        convolution = siglip.embeddings.patch_embedding
        super().__init__(siglip.embeddings, convolution, siglip.encoder.layers, layers, scored, 0, image)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the patches with their positions."""
        position: Tensor = self.embeddings.position_embedding.weight
        return self.embed_patches(pixel_values) + position

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the attention received."""
        attn, states = block.self_attn, block.layer_norm1(states)
        return received_scores(attn.q_proj(states), attn.k_proj(states), attn.num_heads)
