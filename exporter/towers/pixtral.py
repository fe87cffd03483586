"""Pixtral: patches of images of any size, rotary positions on two axes, norms of the root mean square, no class token.

Here the size is fixed, so the angles are tables. A patch is scored by the attention that it receives from all patches; a token
of several patches by the sum of theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from leanvlm.exporter.rotary import rotated
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
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Return the patches behind their norm; positions turn what attends, in each block."""
        normed: Tensor = self.embeddings(self.embed_patches(pixel_values))
        return normed

    def advance(self, block: Any, states: Tensor) -> Tensor:
        """Return what a block makes of states; heads are turned before they are laid out for attention, which fuses so."""
        attn, normed = block.attention, block.attention_norm(states)
        value = attn.v_proj(normed).reshape(*states.shape[:2], attn.num_heads, -1)
        query, key, value = (part.transpose(1, 2) for part in (*self._turned(attn, normed), value))
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        states = states + attn.o_proj(mixed)
        following: Tensor = states + block.feed_forward(block.ffn_norm(states))
        return following

    def scores(self, block: Any, states: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the attention received."""
        query, key = self._turned(block.attention, block.attention_norm(states))
        return received_scores(query.flatten(2), key.flatten(2), block.attention.num_heads)

    def _turned(self, attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys (B, N, H, d) of normed states, turned by their patches' angles."""
        query, key = (part(states).reshape(*states.shape[:2], attn.num_heads, -1) for part in (attn.q_proj, attn.k_proj))
        return rotated(query, self.cos, self.sin), rotated(key, self.cos, self.sin)


class MergedPatches(nn.Module):
    """A projector that merges patches, applied to tokens whose patches lie side by side: (…, patches * Dv) -> (…, D).

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
        patches = inner.norm(hidden.reshape(*hidden.shape[:-1], self.patches, -1))
        # The checkpoint's own merger unfolds a picture: channel by channel the patches of a token.
        merged = inner.patch_merger.merging_layer(patches.transpose(-2, -1).flatten(-2))
        features: Tensor = inner.linear_2(inner.act(inner.linear_1(merged)))
        return features
