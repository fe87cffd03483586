"""A checkpoint's vision side in fp32, for measuring: the modules that an export traces, run directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from leanvlm.exporter.checkpoint import Checkpoint
from leanvlm.exporter.pruners.base import Pruner, ScoredBlock, VisionTokens, gather_tokens
from leanvlm.runtime.preprocess import preprocess


class VisionSide:
    """Encodes images, and applies pruners to the tokens.

    Attributes:
        checkpoint: Where the model came from.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.checkpoint = checkpoint
        self._model = model
        self._projector = checkpoint.family.projector(model).to(torch.float32)
        self._towers: dict[ScoredBlock, nn.Module] = {}

    @torch.no_grad()
    def tokens(self, images: Sequence[Image.Image], scored: ScoredBlock = "feature") -> VisionTokens:
        """Return the unpruned tokens of B images, with the attention of the block that a method scores."""
        pixels = torch.from_numpy(preprocess(images, self.checkpoint.image_spec))
        hidden, keys, attention, unsplit = self._tower(scored)(pixels)
        return VisionTokens(self._projector(hidden), hidden, keys, attention, unsplit, self.checkpoint.spec.grid)

    @torch.no_grad()
    def keep(self, pruner: Pruner, tokens: VisionTokens) -> Tensor:
        """Return the embeddings (B, K, D) that a pruner hands to the decoder."""
        kept = pruner(tokens)
        if kept.hidden is None:
            return gather_tokens(tokens.features, kept.indices)
        projected: Tensor = self._projector(kept.hidden)
        return projected

    def _tower(self, scored: ScoredBlock) -> Any:
        if scored not in self._towers:
            self._towers[scored] = self.checkpoint.family.tower(self._model, scored).to(torch.float32).eval()
        return self._towers[scored]
