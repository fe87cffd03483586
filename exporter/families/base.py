"""What a family is: where a checkpoint's vision tower, projector, decoder and image tokens are.

A family file holds one class and no pruner name. It composes small modules of ours around the checkpoint's own; nothing
foreign is patched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.runtime.preprocess import ImageSpec


@dataclass(frozen=True)
class FamilySpec:
    """The numbers of one checkpoint that the exporter needs.

    Attributes:
        tokens_per_crop: N.
        grid: Rows and columns of patches.
        image_size: Pixels on each side, (height, width), that the tower takes.
        image_token_id: The token that stands for an image in the prompt.
        feature_layer: Index of the hidden state that the projector reads, 0 = embeddings.
        blocks: Blocks of the tower.
    """

    tokens_per_crop: int
    grid: tuple[int, int]
    image_size: tuple[int, int]
    image_token_id: int
    feature_layer: int
    blocks: int

    def scored_block(self, where: ScoredBlock) -> int:
        """Return the 0-based block whose class token scores the tokens, for what a pruner asks for."""
        return self.feature_layer - 1 if where == "feature" else self.blocks - 1


class Family(Protocol):
    """One Hugging Face `model_type`."""

    model_type: str

    def spec(self, config: Any) -> FamilySpec:
        """Read the numbers from a transformers config; raise UnsupportedModelError for what is not handled."""
        ...

    def empty(self, config: Any) -> nn.Module:
        """Build the checkpoint's model on the meta device."""
        ...

    def canonical_key(self, key: str) -> str:
        """Map a weight's name, in any key layout that checkpoints use, to one common spelling."""
        ...

    def materialise_buffers(self, model: nn.Module) -> None:
        """Give real values to the buffers that no checkpoint stores."""
        ...

    def tower(self, model: nn.Module, scored: ScoredBlock = "feature", image: ImageSpec | None = None) -> nn.Module:
        """Return a module: pixel values (B, 3, H, W) -> the last four tensors of `VisionTokens`, scored as told.

        With `image` it takes uint8 levels and does the arithmetic of that processor itself.
        """
        ...

    def projector(self, model: nn.Module) -> nn.Module:
        """Return a module: hidden (B, N, Dv) -> features (B, N, D)."""
        ...

    def decoder(self, model: nn.Module) -> nn.Module:
        """Return the causal language model with `model` and `lm_head`, sharing the checkpoint's modules."""
        ...

    def embed_tokens(self, model: nn.Module) -> Tensor:
        """Return the token table (V, D)."""
        ...
