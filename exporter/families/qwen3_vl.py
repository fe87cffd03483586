"""Qwen3-VL and Cosmos-Reason2 (`model_type: qwen3_vl`): Qwen2.5-VL without windows, with learned positions and DeepStack.

The tower has a square table of positions, which is interpolated to an image's patches. What some of its blocks see is made a
plane of features each (DeepStack, arXiv 2406.04334): the decoder adds the planes to the image tokens behind its first layers.
A kept token keeps its planes; they stand behind its embedding in the same row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLForConditionalGeneration

from leanvlm.exporter import decoders
from leanvlm.exporter.families.base import Description, Parts
from leanvlm.exporter.families.qwen2_5_vl import Qwen25VlFamily
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.ranges import check_ranges
from leanvlm.exporter.towers.qwen_vit import CELL, QwenVit
from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import Between, shorten


@dataclass(frozen=True)
class PositionRanges:
    """The table of positions of a Qwen3-VL's tower."""

    num_position_embeddings: Annotated[int, Between(1, 2**20)]


class Qwen3VlFamily(Qwen25VlFamily):
    """Qwen3-VL checkpoints; images and positions are as Qwen2.5-VL's."""

    model_type = "qwen3_vl"
    model: ClassVar[Callable[[Any], nn.Module]] = Qwen3VLForConditionalGeneration
    towers: ClassVar[tuple[str, ...]] = ("qwen3_vl_vision", "qwen3_vl")
    texts: ClassVar[tuple[str, ...]] = ("qwen3_vl_text",)

    def describe(self, config: Any) -> Description:
        """Read a configuration."""
        found, vision = super().describe(config), config.vision_config
        check_ranges(PositionRanges, vision, "vision_config in config.json")
        if isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
            count = shorten(vision.num_position_embeddings)
            raise UnsupportedModelError(f"num_position_embeddings {count} is not supported: it must be a square")
        planes, layers = len(self.deep(vision)), config.text_config.num_hidden_layers
        if planes >= layers:
            raise UnsupportedModelError(
                f"{planes} deepstack_visual_indexes are not supported for a decoder of {layers} layers: it must have more"
            )
        return found

    def deep(self, vision: Any) -> list[int]:
        """Return the blocks behind which planes are made, in the order of the planes.

        Raises:
            UnsupportedModelError: They are not some of the tower's blocks, from the first to the last.
        """
        listed = vision.deepstack_visual_indexes
        known = isinstance(listed, (list, tuple)) and all(type(at) is int and 0 <= at < vision.depth for at in listed)
        # Planes come out in the order of the blocks, whatever the order of the list.
        if not known or sorted(set(listed)) != list(listed):
            raise UnsupportedModelError(
                f"deepstack_visual_indexes {shorten(listed)} is not supported: it must list blocks of {vision.depth}, in order"
            )
        return list(listed)

    def whole(self, vision: Any) -> list[int]:
        """Return the blocks that see the whole image: all of them."""
        return list(range(vision.depth))

    def window(self, vision: Any) -> int | None:
        """Return None: there are no windows."""
        return None

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model
        visual = core.model.visual
        planes = self.deep(visual.config)
        deep = dict(zip(planes, getattr(visual, "deepstack_merger_list", ()), strict=True))

        def tower(scored: ScoredBlock, image: ImageSpec | None, shape: CropShape) -> QwenVit:
            positions = interpolated(visual.pos_embed.weight, shape)
            return QwenVit(visual, shape, visual.config.depth - 1, image, positions=positions, deep=deep)

        decoder = decoders.causal_model(core.model.language_model, core.lm_head, planes=len(planes))

        def made(found: Any) -> list[Tensor]:
            return [torch.cat(list(plane)) for plane in found.get("deepstack_features") or ()]

        return replace(super().parts(model), tower=tower, decoder=decoder, planes=made)


def interpolated(table: Tensor, shape: CropShape) -> Tensor:
    """Spread a square table of positions (P, Dv) over a shape's patches, corners on corners: (N', Dv) in raster order, fp32."""
    side = isqrt(len(table))
    square = table.detach().float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    size = [CELL * shape.grid[0], CELL * shape.grid[1]]
    spread = functional.interpolate(square, size=size, mode="bilinear", align_corners=True)
    return spread[0].flatten(1).T.contiguous()
