"""LLaVA-OneVision (`model_type: llava_onevision`): LLaVA-NeXT's tiles on a SigLIP tower, which has no class token.

A photograph usually becomes more tiles than the decoder should read: unpruned their tokens are interpolated to nine tiles'
(`anyres_max_9`). A pruned picture is not, since pruning is what bounds it. Several images in one prompt are one crop each,
padded to squares, with a line's end behind each: as transformers' `apply_chat_template` hands them over.

A token is scored by the attention that it receives from all tokens in the last block below the features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration

from leanvlm.exporter.families.base import Frame
from leanvlm.exporter.families.llava_next import LINE_END, LlavaNextFamily, arrangements
from leanvlm.exporter.image_processor import check_tile, read_tile_processor
from leanvlm.runtime.crops import CropRule
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.records import shorten


class LlavaOnevisionFamily(LlavaNextFamily):
    """LLaVA-OneVision checkpoints; the parts are LLaVA-NeXT's."""

    model_type = "llava_onevision"
    model: ClassVar[Callable[[Any], nn.Module]] = LlavaOnevisionForConditionalGeneration

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the image processor does."""
        shape = self.describe(config).shape
        spec = read_tile_processor(processor, ["LlavaOnevisionImageProcessor"], ["do_pad"], shape.pixels)
        check_tile("size", processor.get("size"), shape)
        if processor.get("crop_size") is not None:
            check_tile("crop_size", processor["crop_size"], shape)
        limit = re.fullmatch(r"anyres_max_(\d{1,3})", config.vision_aspect_ratio)
        if limit is None or not int(limit[1]):
            ratio = shorten(repr(config.vision_aspect_ratio))
            raise UnsupportedModelError(f"vision_aspect_ratio {ratio} is not supported; supported: anyres_max_9 and its like")
        crops = CropRule(
            "tiles",
            (shape,),
            arrangements=arrangements(config, processor, shape),
            fit="pad",
            thumbnail="first",
            several="square",
            background=_background(processor.get("image_mean", (0.48145466, 0.4578275, 0.40821073))),
        )
        return Frame(spec, crops, Layout(mosaic=True, row_end=LINE_END, limit=int(limit[1])))


def _background(mean: Any) -> tuple[int, int, int]:
    """Return the colour that squares are padded with: the mean, cut to whole levels."""
    red, green, blue = (mean,) * 3 if isinstance(mean, (int, float)) else mean
    return int(red * 255), int(green * 255), int(blue * 255)
