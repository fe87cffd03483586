"""SigLIP: patches only. Without a class token, a patch is scored by the attention that it receives from all patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from leanvlm.exporter.towers.base import BlockTower, received_scores
from leanvlm.runtime.preprocess import ImageSpec


class SiglipTower(BlockTower):
    """A `siglip_vision_model`; see `BlockTower`. Its last hidden state is read before the norm behind the blocks."""

    def __init__(
        self,
        siglip: Any,
        layers: Sequence[int],
        scored: int,
        image: ImageSpec | None = None,
        norm: nn.Module | None = None,
        cell: int = 1,
    ) -> None:
        convolution = siglip.embeddings.patch_embedding
        super().__init__(siglip.embeddings, convolution, siglip.encoder.layers, layers, scored, 0, image, norm, cell)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the patches with their positions."""
        position: Tensor = self.embeddings.position_embedding.weight
        return self.embed_patches(pixel_values) + position

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the attention received."""
        attn, states = block.self_attn, block.layer_norm1(states)
        return received_scores(attn.q_proj(states), attn.k_proj(states), attn.num_heads)


class PooledSiglip(SiglipTower):
    """A SigLIP that is read behind the norm behind its blocks, and whose tokens are the means of cells of patches.

    Args:
        siglip: The checkpoint's.
        scored: The 0-based block whose attention scores the tokens.
        image: The processor whose normalisation is folded in.
        pool: Takes the mean of each cell (B, Dv, rows, columns).
        cell: Patches on each side of one.
    """

    def __init__(self, siglip: Any, scored: int, image: ImageSpec | None, pool: nn.Module, cell: int) -> None:
        super().__init__(siglip, [len(siglip.encoder.layers)], scored, image, siglip.post_layernorm, cell)
        self.pool = pool

    def merge(self, hidden: Tensor, rows: int) -> Tensor:
        """Return the means of cells of patches (B, N, Dv), of so many rows."""
        picture = hidden.transpose(1, 2).reshape(hidden.shape[0], hidden.shape[2], rows, -1)
        means: Tensor = self.pool(picture.contiguous())
        return means.flatten(2).transpose(1, 2)
