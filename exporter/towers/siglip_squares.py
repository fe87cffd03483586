"""The SigLIP of Idefics3 and SmolVLM: positions by a patch's place in its image, and a norm behind the blocks.

A tower of theirs takes images of any size and looks positions up by where a patch is, as a share of the image. On whole squares
of the tower's own size, which is all that their processors make, that is one fixed table.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from leanvlm.exporter.towers.base import BlockTower, received_scores
from leanvlm.runtime.preprocess import ImageSpec


class SiglipSquares(BlockTower):
    """An `idefics3_vision` or `smolvlm_vision` tower on squares; see `BlockTower`.

    Args:
        tower: The checkpoint's.
        scored: The 0-based block whose attention scores the tokens.
        image: The processor whose normalisation is folded in.
        cell: Patches on each side of what becomes one token.
    """

    positions: Tensor

    def __init__(self, tower: Any, scored: int, image: ImageSpec | None, cell: int) -> None:
        embeddings, blocks = tower.embeddings, tower.encoder.layers
        convolution = embeddings.patch_embedding
        super().__init__(embeddings, convolution, blocks, [len(blocks)], scored, 0, image, tower.post_layernorm, cell)
        table = embeddings.position_embedding.weight.detach()
        # Looked up once: in a graph, what a table of this size is looked up with is not folded.
        positions = functional.embedding(_places(tower.config, type(embeddings)).to(table.device), table)
        self.register_buffer("positions", positions, persistent=False)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the patches with their positions."""
        return self.embed_patches(pixel_values) + self.positions

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the attention received."""
        attn, states = block.self_attn, block.layer_norm1(states)
        return received_scores(attn.q_proj(states), attn.k_proj(states), attn.num_heads)


@torch.no_grad()
def _places(config: Any, kind: Any) -> Tensor:
    """Return which row of the table each patch (N,) of a square has.

    The checkpoint's own code says so, run with a table of one column that holds the rows' numbers: it compares shares of a
    side in floating point. With the 26, 27 and 32 patches a side of published models each patch has its own row; with 19 or
    25 rounding moves some to their neighbour's.
    """
    narrow = copy.copy(config)
    narrow.hidden_size = 1
    embeddings = kind(narrow)
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.weight.copy_(torch.arange(embeddings.num_positions)[:, None])
    side = config.image_size // config.patch_size
    pixels = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
    found: Tensor = embeddings(pixels, torch.ones(1, side, side, dtype=torch.bool))
    return found[0, :, 0].round().long()
