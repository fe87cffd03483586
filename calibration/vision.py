"""A checkpoint's vision side in fp32, for measuring: the modules that an export traces, run directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from leanvlm.exporter.checkpoint import Checkpoint
from leanvlm.exporter.pruners.base import Pruner, ScoredBlock, VisionTokens, choose, gather_tokens
from leanvlm.exporter.towers.base import Seen
from leanvlm.runtime.crops import PIXELS, VALID, crop


class VisionSide:
    """Encodes images, and applies pruners to the tokens.

    Attributes:
        checkpoint: Where the model came from.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.checkpoint = checkpoint
        self._parts = checkpoint.family.parts(model)
        self._projector = self._parts.project.to(torch.float32)
        self._towers: dict[ScoredBlock, nn.Module] = {}

    @torch.no_grad()
    def tokens(self, images: Sequence[Image.Image], scored: ScoredBlock = "feature") -> VisionTokens:
        """Return the unpruned tokens of all crops of some images, with the attention of the block that a method scores."""
        frame = self.checkpoint.frame
        # Each image is cut as if it were alone in its prompt.
        (inputs,) = crop(images, frame.image, frame.crops, among=1).inputs.values()
        seen: Seen = self._tower(scored)(torch.from_numpy(inputs[PIXELS]))
        spec = self.checkpoint.spec
        valid = torch.from_numpy(inputs[VALID]) if VALID in inputs else None
        return VisionTokens(self._projector(seen.hidden), seen, spec.grid, spec.leading, valid).shown

    @torch.no_grad()
    def keep(self, pruner: Pruner, tokens: VisionTokens) -> Tensor:
        """Return the embeddings (B, K, D) that a pruner hands to the decoder."""
        kept = choose(pruner, tokens)
        if kept.hidden is None:
            return gather_tokens(tokens.features, kept.indices)
        projected: Tensor = self._projector(kept.hidden)
        return projected

    def _tower(self, scored: ScoredBlock) -> Any:
        if scored not in self._towers:
            self._towers[scored] = self._parts.tower(scored, None).to(torch.float32).eval()
        return self._towers[scored]
