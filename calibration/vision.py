"""A checkpoint's vision side in fp32, for measuring: the modules that an export traces, run directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from leanvlm.exporter.checkpoint import Checkpoint
from leanvlm.exporter.pruners.base import Pruner, ScoredBlock, VisionTokens, choose, gather_tokens
from leanvlm.exporter.towers.base import Seen
from leanvlm.runtime.crops import PIXELS, VALID, Array, crop


class VisionSide:
    """Encodes images, and applies pruners to the tokens.

    Attributes:
        checkpoint: Where the model came from.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self.checkpoint = checkpoint
        self._parts = checkpoint.family.parts(model)
        self._projector = self._parts.project.to(torch.float32)
        self._towers: dict[tuple[ScoredBlock, int], nn.Module] = {}

    def tokens(self, images: Sequence[Image.Image], scored: ScoredBlock = "feature") -> VisionTokens:
        """Return the unpruned tokens of all crops of some images; see `by_shape`. Their crops must have one shape."""
        (found,) = self.by_shape(images, scored)
        return found

    @torch.no_grad()
    def by_shape(self, images: Sequence[Image.Image], scored: ScoredBlock = "feature") -> list[VisionTokens]:
        """Return the unpruned tokens of some images' crops, those of one shape together.

        Args:
            images: Each is cut as if it were alone in its prompt.
            scored: The block whose attention a method scores.
        """
        frame = self.checkpoint.frame
        cropped = crop(images, frame.image, frame.crops, among=1)
        return [self._seen(inputs, scored, shape) for shape, inputs in cropped.inputs.items()]

    def _seen(self, inputs: Mapping[str, Array], scored: ScoredBlock, shape: int) -> VisionTokens:
        seen: Seen = self._tower(scored, shape)(torch.from_numpy(inputs[PIXELS]))
        grid, leading = self.checkpoint.frame.crops.shapes[shape].grid, self.checkpoint.spec.leading
        valid = torch.from_numpy(inputs[VALID]) if VALID in inputs else None
        return VisionTokens(self._projector(seen.hidden), seen, grid, leading, valid).shown

    @torch.no_grad()
    def keep(self, pruner: Pruner, tokens: VisionTokens) -> Tensor:
        """Return the embeddings (B, K, D) that a pruner hands to the decoder."""
        kept = choose(pruner, tokens)
        if kept.hidden is None:
            return gather_tokens(tokens.features, kept.indices)
        projected: Tensor = self._projector(kept.hidden)
        return projected

    def _tower(self, scored: ScoredBlock, shape: int) -> Any:
        if (scored, shape) not in self._towers:
            tower = self._parts.tower(scored, None, self.checkpoint.frame.crops.shapes[shape])
            self._towers[scored, shape] = tower.to(torch.float32).eval()
        return self._towers[scored, shape]
