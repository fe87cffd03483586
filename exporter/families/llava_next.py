"""LLaVA-NeXT, also called LLaVA-1.6 (`model_type: llava_next`): LLaVA, with an image cut into tiles beside the whole of it.

The image is resized to the best of the listed resolutions with black around it, and cut into tiles of the tower's size. In the
prompt the whole image comes first; the tiles' tokens follow line by line as of one picture, without the padding, each line with
the learned row `image_newline` behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlavaNextForConditionalGeneration

from leanvlm.exporter.families.base import Description, Frame, Parts
from leanvlm.exporter.families.llava import LlavaFamily
from leanvlm.exporter.image_processor import check_tile, read_tile_processor
from leanvlm.runtime.crops import CropRule, CropShape
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.records import shorten

LINE_END = "image_newline"


class LlavaNextFamily(LlavaFamily):
    """LLaVA-NeXT checkpoints; the parts are LLaVA's."""

    model_type = "llava_next"
    model: ClassVar[Callable[[Any], nn.Module]] = LlavaNextForConditionalGeneration

    def describe(self, config: Any) -> Description:
        """Read a `LlavaNextConfig`.

        Raises:
            UnsupportedModelError: As LLaVA; or a class token among the image tokens, which transformers cannot lay out either.
        """
        description = super().describe(config)
        if description.leading:
            raise UnsupportedModelError(
                "vision_feature_select_strategy 'full' leaves the class token among the image tokens, and it has no place "
                "in the grid of the tiles; supported: 'default'"
            )
        return description

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the image processor does."""
        shape = self.describe(config).shape
        spec = read_tile_processor(processor, ["LlavaNextImageProcessor"], ["do_pad"], shape.pixels)
        check_tile("size", processor.get("size"), shape)
        if processor.get("crop_size") is not None:
            check_tile("crop_size", processor["crop_size"], shape)
        crops = CropRule("tiles", (shape,), arrangements=arrangements(config, processor, shape), fit="pad", thumbnail="first")
        return Frame(spec, crops, Layout(mosaic=True, row_end=LINE_END))

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model

        def inputs(pixels: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
            return {"pixel_values": pixels[None], "image_sizes": torch.tensor([size])}

        return replace(super().parts(model), inputs=inputs, extra_rows={LINE_END: core.model.image_newline})


def arrangements(config: Any, processor: Mapping[str, Any], shape: CropShape) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of tiles of the resolutions that an image may be resized to, in the checkpoint's order.

    Raises:
        UnsupportedModelError: They are no whole numbers of tiles, or the processor has others than the model.
    """
    listed, theirs = (_sizes(read.get("image_grid_pinpoints")) for read in (config.to_dict(), processor))
    if not listed:
        raise UnsupportedModelError("image_grid_pinpoints is empty; it must list the resolutions of an image")
    if theirs != listed:
        raise UnsupportedModelError("the image processor's image_grid_pinpoints are not those of config.json; make them equal")
    found = []
    for height, width in listed:
        (rows, below), (columns, beside) = divmod(height, shape.pixels[0]), divmod(width, shape.pixels[1])
        if below or beside or not rows or not columns:
            size = shorten([height, width])
            raise UnsupportedModelError(f"image_grid_pinpoints has {size}, no whole number of {shape.pixels} tiles")
        found.append((rows, columns))
    return tuple(found)


def _sizes(listed: Any) -> list[tuple[int, int]]:
    """Return a list of [height, width] as pairs; raises UnsupportedModelError."""
    many = isinstance(listed, (list, tuple))
    if not many or any(not isinstance(one, (list, tuple)) or [type(side) for side in one] != [int, int] for one in listed):
        raise UnsupportedModelError(f"image_grid_pinpoints is {shorten(listed)}; it must be a list of [height, width]")
    return [(height, width) for height, width in listed]
